"""Makes the compiled operators available, however the package was installed.

`load()` tries, in this order: the module `defgan_fast._C` that was built with the package (if it was built
for the torch that is installed now); a build that an earlier import left in the cache; compiling the sources
that the package ships, once. Where none of it works the reference path still does, so failing is a warning
and not an error. The cache is keyed by the versions of torch, Python and the package and by a hash of the
sources: an upgrade of any of them compiles anew instead of loading symbols that no longer fit.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypedDict

import torch

from . import _build
from ._version import __version__

_PACKAGE = Path(__file__).resolve().parent
_JIT_NAME = "defgan_fast_C"
_FINISHED = "finished"  # a file written after a build in the cache was loaded once


class Status(TypedDict):
    """How the compiled module came to be: see `status`."""

    built: str
    reason: str
    path: str | None


_lock = threading.Lock()
_module: ModuleType | None = None
_status: Status = {"built": "absent", "reason": "not loaded yet", "path": None}
_tried = False


def load() -> bool:
    """Loads the compiled module once; later calls answer at once.

    Returns:
        Whether `torch.ops.defgan_fast.*` have kernels. Where they have not, the first call warns once.
    """
    global _tried
    with _lock:
        if not _tried:
            _tried = True
            _load()
    return _module is not None


def module() -> ModuleType | None:
    """The compiled module, or None where there is none. Calls `load`."""
    load()
    return _module


def status() -> Status:
    """How the module was built ("ahead of time", "on first import" or "absent"), why, and where it lies."""
    load()
    return _status.copy()


def sources() -> Path | None:
    """The folder with the C++ sources, of the installed package or of the checkout; None without one."""
    for folder in (_PACKAGE / "_csrc", _PACKAGE.parent / "csrc"):
        if _build.source_files(folder):
            return folder
    return None


def _load() -> None:
    global _module, _status
    not_ahead = "it was installed without a build"
    if importlib.machinery.PathFinder.find_spec("defgan_fast._C", [str(_PACKAGE)]) is not None:
        misfit = _misfit()
        if misfit is None:
            try:
                _module = importlib.import_module("defgan_fast._C")
                reason = "built with the package"
                _status = {"built": "ahead of time", "reason": reason, "path": _module.__file__}
                return
            except ImportError as error:
                misfit = f"it cannot be loaded: {_one_line(error)}"
        not_ahead = f"of the extension built with the package, {misfit}"

    try:
        _module = _on_first_import()
        _status = {"built": "on first import", "reason": not_ahead, "path": _module.__file__}
    except (RuntimeError, OSError, ImportError) as error:
        _status = {"built": "absent", "reason": _one_line(error), "path": None}
        warnings.warn(
            f"defgan_fast runs without its kernels, on the much slower reference path: {_status['reason']}",
            RuntimeWarning,
            stacklevel=5,
        )


def _misfit() -> str | None:
    """Why the module built with the package must not be loaded beside this torch, or None."""
    try:
        record = json.loads((_PACKAGE / _build.BUILD_RECORD).read_text())
    except (OSError, ValueError):
        return "the record of its build is missing"
    built_for = record.get("torch", "unknown")
    if _build.release(built_for) != _build.release(torch.__version__):
        return f"it was built for torch {built_for}, and torch {torch.__version__} is installed"
    return None


def _on_first_import() -> ModuleType:
    """Loads the module from the cache, and compiles it into the cache where it is not there yet.

    Raises:
        RuntimeError, OSError, ImportError: with the reason, in a message of which the first line is enough.
    """
    csrc = sources()
    if csrc is None:
        raise RuntimeError(f"no C++ sources in {_PACKAGE / '_csrc'}")
    folder = _cache_root() / f"{_JIT_NAME}-{_cache_key(csrc)}"
    library = folder / f"{_JIT_NAME}.so"
    if (folder / _FINISHED).is_file() and library.is_file():
        return _import_file(library)

    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler: '{compiler}' was not found (install g++, or set CXX)")
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder / "defgan_fast.lock"):
        if (folder / _FINISHED).is_file() and library.is_file():  # another process built it meanwhile
            return _import_file(library)
        # torch's own lock is a file whose existence counts: one left by a killed build stops us for ever.
        (folder / "lock").unlink(missing_ok=True)
        print(
            f"defgan_fast: compiling the kernels for torch {torch.__version__}, once (about a minute)",
            file=sys.stderr,
            flush=True,
        )
        built = _compile(csrc, folder)
        (folder / _FINISHED).touch()
        return built


def _compile(csrc: Path, folder: Path) -> ModuleType:
    from torch.utils import cpp_extension  # slow to import, and needed only here

    with _ninja_on_path():
        built: ModuleType = cpp_extension.load(
            name=_JIT_NAME,
            sources=[str(path) for path in _build.source_files(csrc)],
            extra_cflags=_build.COMPILE_FLAGS,
            extra_ldflags=_build.LINK_FLAGS,
            extra_include_paths=[str(csrc)],
            build_directory=str(folder),
        )
    return built


def _cache_root() -> Path:
    """The folder where torch keeps compiled extensions, without importing torch's slow helper for it."""
    configured = os.environ.get("TORCH_EXTENSIONS_DIR")
    if configured:
        return Path(configured)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "torch_extensions"


def _cache_key(csrc: Path) -> str:
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    parts = (__version__, f"torch{torch.__version__}", python, platform.machine(), _build.fingerprint(csrc))
    return "-".join(parts).replace("+", "_")


def _import_file(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_JIT_NAME, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {library}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds a lock that the kernel releases when its process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Puts the ninja that was installed with the package on PATH: its environment need not be activated."""
    before = os.environ.get("PATH")
    try:
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, before or os.defpath])
    except ImportError:
        pass  # a ninja of the system may be there; torch's own message names it where it is not
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PATH", None)
        else:
            os.environ["PATH"] = before


def _one_line(error: BaseException) -> str:
    """The line of an error that says most: a compiler's first "error:", else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0])
