"""What the compiled extension is made of: its sources, its compiler flags, and whether CUDA takes part.

Both ways of building read this one file: `setup.py` (ahead of time) and `tools/cuda_check.py` load it by its path,
because importing the package would import torch; `extension.py` (on first import) imports it as usual. So it must not
import torch or anything else of the package, and both ways build the same thing by construction.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# No -std (torch adds the one it needs), no -march (each instruction set's file names its own target, and the
# right one is chosen at run time), no -ffast-math (the same bits for every schedule need a fixed order of
# sums). -g0 undoes the -g of Python's own build, which makes the module ten times larger and slow to build;
# for a debugger there is CMakeLists.txt.
COMPILE_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-pthread"]
LINK_FLAGS = ["-pthread"]

# -fmad=false: all mappings of the work promise the same bits, so no kernel's compilation may decide by itself
# which products and sums are rounded once. Sums that want one rounding say so (fmaf, mma). -lineinfo costs nothing
# at run time and gives profilers and compute-sanitizer the source line.
NVCC_FLAGS = ["-O3", "-fmad=false", "--expt-relaxed-constexpr", "-lineinfo"]

# C++ sources see this macro in a build with CUDA, where the operator has a CUDA half.
CUDA_MACROS = ["-DDEFGAN_WITH_CUDA"]

# C++ sources whose names end so include CUDA's headers; every other one is part of every build.
CUDA_HALF = "_op_cuda.cpp"

# Folders below csrc/ that serve tests alone: the C++ tests, and the execution of CUDA kernels on the CPU.
TEST_FOLDERS = {"tests", "execution"}

# What the kernels are compiled for where no GPU is in sight and nobody says otherwise, with the first toolkit
# that knows it. The tensor-core instructions that they use begin with 8.0.
ARCHITECTURES = {
    "8.0": (11, 0),
    "8.6": (11, 1),
    "8.9": (11, 8),
    "9.0": (11, 8),
    "10.0": (12, 8),
    "12.0": (12, 8),
}

# With this record beside the extension, a torch that was exchanged after the build is noticed before its
# incompatible symbols are loaded.
BUILD_RECORD = "_C.json"


@dataclass(frozen=True)
class Decision:
    """Whether the CUDA kernels are built.

    Attributes:
        use: whether they are.
        reason: why or why not, in one clause.
        home: the toolkit that compiles them, None where they are not built.
        architectures: the `TORCH_CUDA_ARCH_LIST` to compile them for, None where they are not built.
    """

    use: bool
    reason: str
    home: str | None = None
    architectures: str | None = None

    def record(self, torch_version: str) -> dict[str, object]:
        """Returns what is written beside the extension, to be read when it is loaded."""
        record = {"torch": torch_version, "cuda": self.use, "reason": self.reason}
        return record | ({"architectures": self.architectures} if self.use else {})


def source_files(csrc: Path, cuda: bool = False) -> list[Path]:
    """Returns the sources of the extension below `csrc`, sorted; those of tests are not among them.

    Planning for a GPU (`cuda/*.cpp`) is host code without CUDA headers and part of every build, so that every
    machine can test it and say what a GPU would run.

    Args:
        csrc: the folder with the sources.
        cuda: whether the kernels, and the half of the operator that launches them, are compiled too.
    """
    suffixes = {".cpp", ".cu"} if cuda else {".cpp"}
    return [path for path in _files(csrc, suffixes) if cuda or not path.name.endswith(CUDA_HALF)]


def cuda_source_files(csrc: Path) -> list[Path]:
    """Returns the CUDA sources below `csrc`, sorted; empty where a version has none."""
    return _files(csrc, {".cu"})


def shipped_files(csrc: Path) -> list[Path]:
    """Returns what an installed package needs to compile on first import: sources and headers, sorted."""
    return _files(csrc, {".cpp", ".h", ".cu", ".cuh"})


def _files(csrc: Path, suffixes: set[str]) -> list[Path]:
    files = (path for path in csrc.rglob("*") if path.suffix in suffixes)
    return sorted(path for path in files if not TEST_FOLDERS & set(path.relative_to(csrc).parts[:-1]))


def compile_flags(cuda: bool) -> list[str]:
    """Returns the C++ compiler's flags."""
    return [*COMPILE_FLAGS, *(CUDA_MACROS if cuda else [])]


def compiler() -> str:
    """Returns the C++ compiler by name or path: the first word of `$CXX`, or c++."""
    return compiler_words()[0]


def compiler_words() -> list[str]:
    """Returns the words of `$CXX`, such as "ccache g++", or c++ where it is empty or has an open quote."""
    try:
        return shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError:
        return ["c++"]


def path_with_ninja() -> str:
    """Returns `$PATH`, with the ninja that was installed with the package before the rest where there is one.

    Its virtual environment need not be activated. Without it torch takes a ninja of the system, or builds without.
    """
    path = os.environ.get("PATH", os.defpath)
    try:
        import ninja
    except ImportError:
        return path
    return os.pathsep.join([ninja.BIN_DIR, path])


def fingerprint(csrc: Path) -> str:
    """Returns a short hash of the names and bytes of every shipped file, and of the flags they are compiled with."""
    digest = hashlib.sha256(" ".join([*compile_flags(True), *LINK_FLAGS, *NVCC_FLAGS]).encode())
    for path in shipped_files(csrc):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def release(version: str) -> str:
    """Returns the part of torch's version that decides which symbols it exports: `2.13.0+cpu` -> `2.13.0`."""
    return version.split("+")[0]


def cuda_home() -> str | None:
    """Returns the toolkit's folder: `$CUDA_HOME`, `$CUDA_PATH`, that of the nvcc on PATH, or /usr/local/cuda.

    None without a toolkit. The nvcc on PATH is asked where it lies: it may be a script that calls another one, and
    the folder above it then has no headers.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return os.environ[variable]
    homes = ["/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stderr
        except (OSError, subprocess.SubprocessError):
            said = ""
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        homes.insert(0, os.path.normpath(top.group(1).strip()) if top else str(Path(nvcc).parent.parent))
    return next((home for home in homes if Path(home, "include", "cuda_runtime.h").is_file()), None)


def nvcc_version(cuda_home: str) -> str | None:
    """Returns the toolkit's version as `nvcc --version` prints it ("13.0"), or None where nvcc does not run."""
    nvcc = shutil.which("nvcc", path=str(Path(cuda_home) / "bin"))
    if nvcc is None:
        return None
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else None


def visible_capabilities() -> list[str]:
    """Returns the compute capabilities of this machine's GPUs ("9.0"), by the driver's tool; empty without a GPU.

    Asking torch would start CUDA in this process, and a process that forks later could not use it.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^\s*(\d+\.\d+)\s*$", said, re.MULTILINE)


def architecture_list(nvcc: str, capabilities: Iterable[str] = ()) -> str:
    """Returns the `TORCH_CUDA_ARCH_LIST` to build with where it is not set: "8.0;9.0+PTX".

    Args:
        nvcc: the toolkit's version, see `nvcc_version`.
        capabilities: those of the GPUs in sight; without any the list is all of `ARCHITECTURES` that this toolkit
            knows. Its last entry carries PTX in both cases, for GPUs that are newer than the toolkit.
    """
    toolkit = _numbers(nvcc)
    known = [name for name, first in ARCHITECTURES.items() if first <= toolkit]
    chosen = set()
    for capability in capabilities:
        # Machine code runs on later minor versions of the same major version.
        fits = [name for name in known if _numbers(name) <= _numbers(capability)]
        if fits:
            chosen.add(fits[-1])
    return ";".join([name for name in known if name in chosen] or known) + "+PTX"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def decide_cuda(csrc: Path, torch_version: str, torch_cuda: str | None) -> Decision:
    """Decides whether a build made here and now has the CUDA kernels.

    What counts is the torch that is installed and the toolkit that was found, never
    `torch.cuda.is_available()`: a machine that builds need not have a GPU in sight.

    Args:
        csrc: the folder with the sources.
        torch_version: `torch.__version__`.
        torch_cuda: `torch.version.cuda`, None for a torch without CUDA.
    """
    home = cuda_home() if torch_cuda else None
    nvcc = nvcc_version(home) if home else None
    missing = why_without_cuda(torch_version, torch_cuda, home, nvcc, len(cuda_source_files(csrc)))
    if missing is not None:
        return Decision(False, missing)
    assert nvcc is not None
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture_list(nvcc, visible_capabilities())
    return Decision(True, f"CUDA {nvcc} in {home}", home, architectures)


def why_without_cuda(
    torch_version: str, torch_cuda: str | None, home: str | None, nvcc: str | None, sources: int
) -> str | None:
    """Returns why the CUDA kernels are not compiled, in one clause; None where they are.

    Args:
        torch_version: `torch.__version__`.
        torch_cuda: `torch.version.cuda`, None for a torch without CUDA.
        home: the toolkit's folder, see `cuda_home`.
        nvcc: the toolkit's version, see `nvcc_version`.
        sources: how many CUDA sources this version of the package has.
    """
    if torch_cuda is None:
        return f"torch {torch_version} is a build without CUDA"
    if sources == 0:
        return "this version of defgan_fast has no CUDA kernels"
    if home is None:
        return f"torch was built for CUDA {torch_cuda} but no toolkit was found (set CUDA_HOME)"
    if nvcc is None:
        return f"nvcc does not run in {home}"
    if nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {nvcc} but torch was built for CUDA {torch_cuda}"
    return None
