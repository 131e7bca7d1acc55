"""Writes rendered tables into documents, so that no number there is typed by hand."""

from __future__ import annotations

import shlex


def insert(document: str, text: str, begin: str, end: str) -> str:
    """Returns ``document`` with ``text`` between its marks ``begin`` and ``end``.

    Raises:
        ValueError: the marks are not there.
    """
    before, first, rest = document.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(
            f"--markdown must be a file with the lines {shlex.quote(begin)} and {shlex.quote(end)}"
        )
    return f"{before}{begin}\n{text}\n{end}{after}"
