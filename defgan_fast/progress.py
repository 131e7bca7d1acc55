"""One progress bar for all long work: rate and time left on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys

from tqdm import tqdm

TERMINAL_INTERVAL_S = 0.3
LOG_INTERVAL_S = 30.0


def bar(total: int, title: str, unit: str, initial: int = 0, quiet: bool = False) -> tqdm:
    """A tqdm bar on stderr; where that is no terminal, it prints rarely enough not to flood a log.

    ``quiet`` shows nothing: of several processes one reports.
    """
    interval = TERMINAL_INTERVAL_S if sys.stderr.isatty() else LOG_INTERVAL_S
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        mininterval=interval,
        maxinterval=interval,
        disable=quiet,
    )
