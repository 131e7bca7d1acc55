"""Writes files whole or not at all, locks them, and knows where caches go.

A crash, a full disk, a kill or a reader at any moment sees the old file or the new one. The content goes to a
temporary name in the same folder, is synced to the disk and takes the file's name; then the folder is synced,
without which the new name itself could be lost with the power.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # only POSIX systems have it
    fcntl = None  # type: ignore[assignment]


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
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def caches() -> Path:
    """Returns the user's folder of caches: ``$XDG_CACHE_HOME``, by default ``~/.cache``.

    Raises:
        OSError: the user has no home folder; "~" would become a folder of that name wherever the process runs.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not folder.is_absolute():
        raise OSError(f"no folder for caches: HOME or XDG_CACHE_HOME must be an absolute path, got {folder}")
    return folder


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds a lock that the system releases with the process, however that ends.

    Args:
        path: of the lock's file, which is made and stays empty.
        on_wait: called where another process holds the lock, before the wait for it.

    Raises:
        OSError: the file cannot be made, or the system has no such locks.
    """
    if fcntl is None:
        raise OSError(f"{path} cannot be locked: this system has no fcntl, only POSIX systems have")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
