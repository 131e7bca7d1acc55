"""Writes files whole or not at all.

A crash, a full disk, a kill or a reader at any moment sees the old file or the new one. The content goes to a
temporary name in the same folder, is synced to the disk and takes the file's name; then the folder is synced,
without which the new name itself could be lost with the power.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file whole or not at all; its folder is made if need be.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        publish(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(
    path: str | os.PathLike[str], value: Any, indent: int | None = 2, sort_keys: bool = False
) -> None:
    """Writes a value as JSON with a newline at its end, as :func:`write_atomically` does.

    Raises:
        TypeError: the value does not serialise to JSON.
        OSError: the folder or the file cannot be written.
    """
    write_atomically(path, (json.dumps(value, indent=indent, sort_keys=sort_keys) + "\n").encode())


def publish(temporary: Path, path: Path) -> None:
    """Gives a complete temporary file its name, in the same folder, once its content is on the disk.

    Raises:
        OSError: the file cannot be synced or renamed.
    """
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
