"""What the compiled extension is made of: its sources, its compiler flags, and whether CUDA takes part.

Both ways of building read this one file: `setup.py` (ahead of time) loads it by its path, because importing
the package would import torch; `_extension.py` (on first import) imports it as usual. So it must not import
torch or anything else of the package, and both ways build the same thing by construction.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# No -std (torch adds the one it needs), no -march (each instruction set's file names its own target, and the
# right one is chosen at run time), no -ffast-math (the same bits for every schedule need a fixed order of
# sums). -g0 undoes the -g of Python's own build, which makes the module ten times larger and slow to build;
# for a debugger there is CMakeLists.txt.
COMPILE_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-pthread"]
LINK_FLAGS = ["-pthread"]

# With this record beside the extension, a torch that was exchanged after the build is noticed before its
# incompatible symbols are loaded.
BUILD_RECORD = "_C.json"


@dataclass(frozen=True)
class Decision:
    """Whether the CUDA kernels are built, and the reason in one clause."""

    use: bool
    reason: str


def source_files(csrc: Path) -> list[Path]:
    """The C++ sources of the extension below `csrc`, sorted; the C++ tests are not among them."""
    return sorted([*csrc.glob("*.cpp"), *csrc.glob("cpu/*.cpp")])


def cuda_source_files(csrc: Path) -> list[Path]:
    """The CUDA sources below `csrc`, sorted; empty where a version has none."""
    return sorted(csrc.glob("cuda/*.cu"))


def shipped_files(csrc: Path) -> list[Path]:
    """What an installed package needs in order to compile on first import: sources and headers, sorted."""
    suffixes = {".cpp", ".h", ".cu", ".cuh"}
    files = (path for path in csrc.rglob("*") if path.suffix in suffixes)
    return sorted(path for path in files if "tests" not in path.relative_to(csrc).parts)


def fingerprint(csrc: Path) -> str:
    """A short hash of the names and bytes of every shipped file, and of the flags they are compiled with."""
    digest = hashlib.sha256(" ".join(COMPILE_FLAGS + LINK_FLAGS).encode())
    for path in shipped_files(csrc):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def release(version: str) -> str:
    """`2.13.0+cpu` -> `2.13.0`: the part of torch's version that decides which symbols it exports."""
    return version.split("+")[0]


def nvcc_version(cuda_home: str) -> str | None:
    """The toolkit's version as `nvcc --version` prints it ("13.0"), or None where nvcc does not run."""
    nvcc = shutil.which("nvcc", path=str(Path(cuda_home) / "bin"))
    if nvcc is None:
        return None
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", text)
    return found.group(1) if found else None


def decide_cuda(
    torch_version: str, torch_cuda: str | None, cuda_home: str | None, nvcc: str | None, sources: int
) -> Decision:
    """Decides whether the CUDA kernels are compiled.

    What counts is the torch that is installed and the toolkit that was found, never
    `torch.cuda.is_available()`: a machine that builds need not have a GPU in sight.

    Args:
        torch_version: `torch.__version__`.
        torch_cuda: `torch.version.cuda`, None for a torch without CUDA.
        cuda_home: `torch.utils.cpp_extension.CUDA_HOME`, None where no toolkit was found.
        nvcc: the toolkit's version, see `nvcc_version`.
        sources: how many CUDA sources this version of the package has.
    """
    if torch_cuda is None:
        return Decision(False, f"torch {torch_version} is a build without CUDA")
    if sources == 0:
        return Decision(False, "this version of defgan_fast has no CUDA kernels")
    if cuda_home is None:
        return Decision(
            False, f"torch was built for CUDA {torch_cuda} but no toolkit was found (set CUDA_HOME)"
        )
    if nvcc is None:
        return Decision(False, f"nvcc does not run in {cuda_home}")
    if nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        return Decision(False, f"nvcc is of CUDA {nvcc} but torch was built for CUDA {torch_cuda}")
    return Decision(True, f"CUDA {nvcc} in {cuda_home}")
