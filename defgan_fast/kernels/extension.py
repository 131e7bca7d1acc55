"""Makes the compiled operators available, however the package was installed.

`load()` tries, in this order: the module `defgan_fast._C` that was built with the package (if it was built
for the torch that is installed now); a build that an earlier import left in the cache; compiling the sources
that the package ships, once. Where none of it works the reference path still does, so failing is a warning
and not an error. The cache is keyed by the versions of torch, Python and the package and by a hash of the
sources: an upgrade of any of them compiles anew instead of loading symbols that no longer fit. Beside a torch
with CUDA the toolkit and the GPUs count too: a home folder may be shared by machines with different ones.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import torch

from .. import files
from .._version import __version__
from . import build

_PACKAGE = Path(__file__).resolve().parent.parent
_JIT_NAME = "defgan_fast_C"
# This file is written after a build in the cache was loaded once; it holds the library's name and its size, since
# to load a library that a full disk or a crash has cut short may kill the process.
_FINISHED = "finished"


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
            _load()
            _tried = True
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
            except Exception as error:  # an extension may raise whatever it likes while it loads
                misfit = f"it cannot be loaded: {_one_line(error)}"
        not_ahead = f"of the extension built with the package, {misfit}"

    try:
        _module = _on_first_import()
        _status = _told("on first import", not_ahead, _module, Path(_module.__file__ or "").parent)
    except Exception as error:  # compilers, disks and other people's modules fail in ways of their own
        _module = None
        reason = f"{_one_line(error)}; {_advice(error)}"
        _status |= {"built": "absent", "reason": reason, "without_cuda": reason}
        warnings.warn(
            f"defgan_fast runs without its kernels, on the much slower reference path: {reason}",
            RuntimeWarning,
            stacklevel=5,
        )


def _advice(error: BaseException) -> str:
    """Returns what to do about an error of a build, in one clause."""
    if isinstance(error, _NoCompiler):
        return "install g++ or clang, or name one in CXX, and import again"
    if isinstance(error, OSError):
        return "set TORCH_EXTENSIONS_DIR to a folder that can be written, or build with the package (docs/install.md)"
    if isinstance(error, ImportError):
        return f"delete the folders {_JIT_NAME}-* in {_cache_root()}, and import again"
    return "another compiler can be named in CXX, and docs/install.md says what is supported"


class _NoCompiler(RuntimeError):
    """The C++ compiler was not found, or does not run."""


def _told(built: str, reason: str, module: ModuleType, folder: Path) -> Status:
    """Returns the status of a module that was loaded, with what the record of its build says."""
    damaged: dict[str, Any] = {"cuda": False, "reason": "the record of its build is missing or damaged"}
    record = _record(folder) or damaged
    return {
        "built": built,
        "reason": reason,
        "path": module.__file__,
        "without_cuda": None if record["cuda"] else record["reason"],
        "architectures": record.get("architectures"),
    }


def _record(folder: Path) -> dict[str, Any] | None:
    """Returns the record of a build, None where it is missing, damaged, or that of an older version."""
    try:
        record = json.loads((folder / build.BUILD_RECORD).read_text())
    except (OSError, ValueError):
        return None
    expected = {"torch": str, "cuda": bool, "reason": str}
    if not isinstance(record, dict) or not all(isinstance(record.get(k), t) for k, t in expected.items()):
        return None
    return record


def _misfit() -> str | None:
    """Returns why the module built with the package must not be loaded beside this torch, or None."""
    record = _record(_PACKAGE)
    if record is None:
        return "the record of its build is missing or damaged"
    if build.release(record["torch"]) != build.release(torch.__version__):
        return f"it was built for torch {record['torch']}, and torch {torch.__version__} is installed"
    return None


def _on_first_import() -> ModuleType:
    """Returns the module from the cache, and compiles it into the cache where it is not there yet.

    Raises:
        Exception: with the reason, in a message of which `_one_line` is enough.
    """
    csrc = sources()
    if csrc is None:
        raise RuntimeError(f"no C++ sources in {_PACKAGE / '_csrc'}")
    folder = _cache_root() / f"{_JIT_NAME}-{_cache_key(csrc)}"
    library = _finished(folder)
    if library is not None:
        return _import_file(library)

    _check_compiler()
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder / "defgan_fast.lock"):
        library = _finished(folder)
        if library is not None:  # another process built it meanwhile
            return _import_file(library)
        # torch's own lock is a file whose existence counts: one left by a killed build stops us for ever.
        (folder / "lock").unlink(missing_ok=True)
        decision = build.decide_cuda(csrc, torch.__version__, torch.version.cuda)
        _announce(f"torch {torch.__version__}, once (about a minute{', CUDA kernels longer' * decision.use})")
        try:
            built = _compile(csrc, folder, decision)
        except Exception as error:
            if not decision.use:
                raise
            # A host compiler that this nvcc refuses, say, is no reason to go without the CPU kernels.
            decision = build.Decision(False, f"compiling them failed: {_one_line(error)}")
            _announce(f"torch {torch.__version__} again, without CUDA: {decision.reason}")
            built = _compile(csrc, folder, decision)
        record = decision.record(torch.__version__)
        library = Path(built.__file__ or "")
        files.write_json(folder / build.BUILD_RECORD, record, indent=None)
        files.write_atomically(folder / _FINISHED, f"{library.name}\n{library.stat().st_size}\n".encode())
        return built


def _check_compiler() -> None:
    """Checks that the C++ compiler runs, which torch takes for granted.

    Raises:
        _NoCompiler: it was not found, or does not say its version.
    """
    name = build.compiler()
    if shutil.which(name) is None:
        raise _NoCompiler(f"no C++ compiler: '{name}' was not found")
    command = [*build.compiler_words(), "--version"]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise _NoCompiler(f"the C++ compiler does not run: {_one_line(error)}") from None
    if tried.returncode:
        said = _one_line(RuntimeError(tried.stderr.strip() or tried.stdout.strip() or "no message"))
        raise _NoCompiler(
            f"the C++ compiler does not run: '{shlex.join(command)}' ended with {tried.returncode} ({said})"
        )


def _announce(what: str) -> None:
    print(f"defgan_fast: compiling the kernels for {what}", file=sys.stderr, flush=True)


def _finished(folder: Path) -> Path | None:
    """Returns the library that an earlier import has built and loaded, None where it or its record is damaged."""
    try:
        name, size = (folder / _FINISHED).read_text().split("\n")[:2]
        library = folder / name
        whole = library.is_file() and library.stat().st_size == int(size)
    except (OSError, ValueError):
        return None
    return library if whole and _record(folder) is not None else None


def _compile(csrc: Path, folder: Path, cuda: build.Decision) -> ModuleType:
    """Returns the module, compiled and linked in `folder`."""
    from torch.utils import cpp_extension  # slow to import, and needed only here

    # torch looks at CXX by itself, and stumbles over one that is empty.
    variables = {"PATH": build.path_with_ninja(), "CXX": shlex.join(build.compiler_words())}
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
    return files.caches() / "torch_extensions"


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
