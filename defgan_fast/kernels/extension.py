"""Makes the compiled operators available, however the package was installed.

`load()` tries, in this order: the module `defgan_fast._C` that was built with the package (if it was built
for the torch that is installed now); a build that an earlier import left in the cache; compiling the sources
that the package ships, once. Where none of it works the reference path still does, so failing is a warning
and not an error. The cache is keyed by the versions of torch, Python and the package and by a hash of the
sources: an upgrade of any of them compiles anew instead of loading symbols that no longer fit. Beside a torch
with CUDA the toolkit and the GPUs count too: a home folder may be shared by machines with different ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import platform
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

from .._version import __version__
from . import build

_PACKAGE = Path(__file__).resolve().parent.parent
_JIT_NAME = "defgan_fast_C"
_FINISHED = (
    "finished"  # this file is written after a build in the cache was loaded once; it holds the library's name
)


class Status(TypedDict):
    """How the compiled module came to be.

    Attributes:
        built: "ahead of time", "on first import" or "absent".
        reason: why so.
        path: where the module lies, None where it is absent.
        without_cuda: why it has no CUDA kernels, None where it has.
        architectures: the CUDA architectures that it was compiled for.
    """

    built: str
    reason: str
    path: str | None
    without_cuda: str | None
    architectures: str | None


_lock = threading.Lock()
_module: ModuleType | None = None
_status: Status = {
    "built": "absent",
    "reason": "not loaded yet",
    "path": None,
    "without_cuda": None,
    "architectures": None,
}
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
    """Returns the compiled module, or None where there is none; loads it first."""
    load()
    return _module


def status() -> Status:
    """Returns how the module was built, why, and where it lies; loads it first."""
    load()
    return _status.copy()


def has_cuda() -> bool:
    """Returns whether the compiled module has the CUDA kernels; a GPU to run them on is another question."""
    return load() and _status["without_cuda"] is None


def sources() -> Path | None:
    """Returns the folder with the C++ sources, of the installed package or of the checkout; None without one."""
    for folder in (_PACKAGE / "_csrc", _PACKAGE.parent / "csrc"):
        if build.source_files(folder):
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
                _status = _told("ahead of time", "built with the package", _module, _PACKAGE)
                return
            except ImportError as error:
                misfit = f"it cannot be loaded: {_one_line(error)}"
        not_ahead = f"of the extension built with the package, {misfit}"

    try:
        _module = _on_first_import()
        _status = _told("on first import", not_ahead, _module, Path(_module.__file__ or "").parent)
    except (RuntimeError, OSError, ImportError) as error:
        _status |= {"built": "absent", "reason": _one_line(error), "without_cuda": _one_line(error)}
        warnings.warn(
            f"defgan_fast runs without its kernels, on the much slower reference path: {_status['reason']}",
            RuntimeWarning,
            stacklevel=5,
        )


def _told(built: str, reason: str, module: ModuleType, folder: Path) -> Status:
    """Returns the status of a module that was loaded, with what the record of its build says."""
    record = json.loads((folder / build.BUILD_RECORD).read_text())
    return {
        "built": built,
        "reason": reason,
        "path": module.__file__,
        "without_cuda": None if record["cuda"] else record["reason"],
        "architectures": record.get("architectures"),
    }


def _misfit() -> str | None:
    """Returns why the module built with the package must not be loaded beside this torch, or None."""
    try:
        record = json.loads((_PACKAGE / build.BUILD_RECORD).read_text())
    except (OSError, ValueError):
        return "the record of its build is missing"
    built_for = record.get("torch", "unknown")
    if build.release(built_for) != build.release(torch.__version__):
        return f"it was built for torch {built_for}, and torch {torch.__version__} is installed"
    return None


def _on_first_import() -> ModuleType:
    """Returns the module from the cache, and compiles it into the cache where it is not there yet.

    Raises:
        RuntimeError, OSError, ImportError: with the reason, in a message of which the first line is enough.
    """
    csrc = sources()
    if csrc is None:
        raise RuntimeError(f"no C++ sources in {_PACKAGE / '_csrc'}")
    folder = _cache_root() / f"{_JIT_NAME}-{_cache_key(csrc)}"
    library = _finished(folder)
    if library is not None:
        return _import_file(library)

    if shutil.which(build.compiler()) is None:
        raise RuntimeError(f"no C++ compiler: '{build.compiler()}' was not found (install g++, or set CXX)")
    folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder / "defgan_fast.lock"):
        library = _finished(folder)
        if library is not None:  # another process built it meanwhile
            return _import_file(library)
        # torch's own lock is a file whose existence counts: one left by a killed build stops us for ever.
        (folder / "lock").unlink(missing_ok=True)
        decision = build.decide_cuda(csrc, torch.__version__, torch.version.cuda)
        _announce(f"torch {torch.__version__}, once (about a minute{', CUDA kernels longer' * decision.use})")
        try:
            built = _compile(csrc, folder, decision)
        except RuntimeError as error:
            if not decision.use:
                raise
            # A host compiler that this nvcc refuses, say, is no reason to go without the CPU kernels.
            decision = build.Decision(False, f"compiling them failed: {_one_line(error)}")
            _announce(f"torch {torch.__version__} again, without CUDA: {decision.reason}")
            built = _compile(csrc, folder, decision)
        record = decision.record(torch.__version__)
        (folder / build.BUILD_RECORD).write_text(json.dumps(record) + "\n")
        (folder / _FINISHED).write_text(Path(built.__file__ or "").name)
        return built


def _announce(what: str) -> None:
    print(f"defgan_fast: compiling the kernels for {what}", file=sys.stderr, flush=True)


def _finished(folder: Path) -> Path | None:
    """Returns the library that an earlier import has built and loaded, or None."""
    try:
        library = folder / (folder / _FINISHED).read_text()
    except OSError:
        return None
    return library if library.is_file() else None


def _compile(csrc: Path, folder: Path, cuda: build.Decision) -> ModuleType:
    """Returns the module, compiled and linked in `folder`."""
    from torch.utils import cpp_extension  # slow to import, and needed only here

    variables = {"PATH": build.path_with_ninja()}
    if cuda.use:
        cpp_extension.CUDA_HOME = cuda.home
        variables["TORCH_CUDA_ARCH_LIST"] = cuda.architectures or ""
    with _environment(variables):
        built: ModuleType = cpp_extension.load(
            name=_JIT_NAME,
            sources=[
                str(_under_its_own_name(path, csrc, folder)) for path in build.source_files(csrc, cuda.use)
            ],
            extra_cflags=build.compile_flags(cuda.use),
            extra_cuda_cflags=build.NVCC_FLAGS,
            extra_ldflags=build.LINK_FLAGS,
            extra_include_paths=[str(csrc)],
            build_directory=str(folder),
            with_cuda=cuda.use,
        )
    return built


def _under_its_own_name(source: Path, csrc: Path, folder: Path) -> Path:
    """Returns a file in `folder` that includes `source` and is named by its whole path below `csrc`.

    torch names an object by its source's file name alone, and cpu/ and cuda/ have files of the same name.
    """
    wrapper = folder / "-".join(source.relative_to(csrc).parts)
    text = f'#include "{source.resolve()}"\n'
    if not wrapper.is_file() or wrapper.read_text() != text:  # ninja goes by its time of change
        wrapper.write_text(text)
    return wrapper


def _cache_root() -> Path:
    """Returns the folder where torch keeps compiled extensions, without importing torch's slow helper for it."""
    configured = os.environ.get("TORCH_EXTENSIONS_DIR")
    if configured:
        return Path(configured)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "torch_extensions"


def _cache_key(csrc: Path) -> str:
    """Returns the part of the cache folder's name that changes with whatever the build depends on."""
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    parts = (__version__, f"torch{torch.__version__}", python, platform.machine(), build.fingerprint(csrc))
    return "-".join(parts + _cuda_key()).replace("+", "_")


def _cuda_key() -> tuple[str, ...]:
    """Returns a hash of what decides the CUDA half of a build and may differ between machines or days.

    It is quick, and starts no CUDA in this process.
    """
    if torch.version.cuda is None:
        return ()
    toolkit = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")]
    cards = sorted(
        line.partition(":")[2].strip()
        for file in Path("/proc/driver/nvidia/gpus").glob("*/information")
        for line in file.read_text().splitlines()
        if line.startswith("Model")
    )
    text = repr((toolkit, shutil.which("nvcc"), Path("/usr/local/cuda").exists(), sorted(set(cards))))
    return (hashlib.sha256(text.encode()).hexdigest()[:8],)


def _import_file(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(library.stem, library)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {library}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Holds a lock that the operating system releases when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables until the block ends."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _one_line(error: BaseException) -> str:
    """Returns the line of an error that says most: a compiler's first "error:", else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0])
