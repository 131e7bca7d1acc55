"""The CUDA kernels' own sources, compiled for the CPU and called from Python.

The library is `csrc/cuda/execution/driver.cpp` and what it needs, built by the C++ compiler into `build/cuda-on-cpu`,
named by a hash of the sources and the flags, so that it is compiled once for each state of them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ("float32", "float16", "bfloat16")
MAPPINGS = ("auto", "fused", "layered", "split")
# No contraction: where a kernel wants a fused multiply-add it says so, on a GPU too (-fmad=false).
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-w"]
UNITS: list[tuple[str, list[str]]] = [
    # The longest first: they decide when the build is done.
    ("execution/driver_kernels.cpp", ["-O1", "-DDEFGAN_STORAGE=Half", "-DDEFGAN_RUN=run_float16"]),
    ("execution/driver_kernels.cpp", ["-O1", "-DDEFGAN_STORAGE=Bfloat16", "-DDEFGAN_RUN=run_bfloat16"]),
    ("execution/driver_kernels.cpp", ["-O1", "-DDEFGAN_STORAGE=float", "-DDEFGAN_RUN=run_float32"]),
    ("execution/accesses.cpp", ["-O3"]),
    ("execution/scheduling.cpp", ["-O3"]),
    ("execution/meetings.cpp", ["-O3"]),
    ("execution/primitives.cpp", ["-O3"]),
    ("execution/failures.cpp", ["-O1"]),
    ("execution/shadow.cpp", ["-O2"]),
    ("execution/fiber.cpp", ["-O2"]),
    ("execution/driver.cpp", ["-O1"]),
    ("execution/driver_nearest.cpp", ["-O1"]),
    ("execution/driver_keeping.cpp", ["-O1"]),
    ("keep_rows.cpp", ["-O1"]),
    ("program.cpp", ["-O1"]),
    ("nearest_search.cpp", ["-O1"]),
    ("enqueue.cpp", ["-O1"]),
    ("../plan.cpp", ["-O1"]),
    ("../geometry.cpp", ["-O1"]),
]


def build(
    csrc: Path = ROOT / "csrc", target: Path = ROOT / "build" / "cuda-on-cpu", flags: Sequence[str] = ()
) -> Path:
    """Compiles the library, unless this state of the sources has been compiled already.

    Args:
        csrc: the folder of the C++ sources.
        target: where objects and libraries are kept.
        flags: more flags for every unit.

    Raises:
        subprocess.CalledProcessError: the compiler failed; its messages are in ``stderr``.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    digest = hashlib.sha256(repr((compiler, FLAGS, list(flags), UNITS)).encode())
    for path in sorted([*csrc.glob("*.*"), *csrc.glob("cuda/**/*.*")]):
        digest.update(path.relative_to(csrc).as_posix().encode() + path.read_bytes())
    folder = target / digest.hexdigest()[:16]
    library = folder / "libdefgan_cuda_on_cpu.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def compile_unit(n: int) -> Path:
        source, own = UNITS[n]
        made = folder / f"{n}.{os.getpid()}.o"
        command = [*compiler, *FLAGS, *flags, *own, "-c", str(csrc / "cuda" / source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, range(len(UNITS))))
    linked = folder / f"{os.getpid()}.so"
    subprocess.run([*compiler, "-shared", "-o", str(linked), *map(str, objects)], check=True)
    linked.rename(library)
    for made in objects:
        made.unlink()
    return library


class KernelFailure(RuntimeError):
    """A kernel did what no kernel may do, or an argument was refused; the message is the library's."""


@dataclass
class Result:
    """Holds a projection's latents [B, R, k], errors and steps [B, R] (-1: not told), and how it was carried out."""

    latents: Tensor
    errors: Tensor
    steps: Tensor
    mapping: str
    teams: int
    blocks_per_team: int


@dataclass
class Kept:
    """What a device keeps of a search's candidates: their images with what they were decoded from, and whether."""

    memory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    valid: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))


class Kernels:
    """Calls the library's two functions on tensors."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.defgan_error.restype = ctypes.c_char_p

    def project(
        self,
        images: Tensor,
        z0: Tensor,
        parameters: Sequence[Tensor],
        plan: str,
        rates: Sequence[float],
        momentum: float,
        precision: str = "float16",
        mapping: str = "auto",
        blocks: int = 2,
        max_rows: int = 0,
        seed: int = 0,
        radius: float = 0.0,
        keep: Sequence[tuple[int, int]] | None = None,
    ) -> Result:
        """Does what the op `project` does, on a pretended device of ``blocks`` multiprocessors.

        ``seed`` decides the order in which threads run. With ``keep`` it does what the op `project_keeping` does.
        """
        images, z0 = images.float().contiguous(), z0.float().contiguous()
        restarts, k = z0.shape[-2:]
        latents = torch.full((len(images), restarts, k), torch.nan)
        errors = torch.full((len(images), restarts), torch.nan)
        steps = torch.full((len(images), restarts), -1)
        schedule = (ctypes.c_int * 3)()
        pairs = () if keep is None else tuple(keep)
        self._call(
            "defgan_project",
            *self._generator(plan, precision, parameters),
            *self._pointers(images, z0),
            ctypes.c_int(z0.dim() == 3),
            ctypes.c_int64(len(images)),
            ctypes.c_int(restarts),
            (ctypes.c_float * max(len(rates), 1))(*rates),
            ctypes.c_int(len(rates)),
            ctypes.c_float(momentum),
            ctypes.c_float(radius),
            ctypes.c_int(-1 if keep is None else len(pairs)),
            *((ctypes.c_int64 * max(len(pairs), 1))(*(pair[i] for pair in pairs)) for i in (0, 1)),
            ctypes.c_int(MAPPINGS.index(mapping)),
            ctypes.c_int(blocks),
            ctypes.c_int64(max_rows),
            ctypes.c_uint64(seed),
            *self._pointers(latents, errors, steps),
            schedule,
        )
        return Result(latents, errors, steps, MAPPINGS[schedule[0]], schedule[1], schedule[2])

    def decode(
        self,
        latents: Tensor,
        parameters: Sequence[Tensor],
        plan: str,
        shape: Sequence[int],
        precision: str = "float32",
        blocks: int = 2,
        max_rows: int = 0,
        seed: int = 0,
    ) -> Tensor:
        """Does what the op `decode` does; ``shape`` is that of one image."""
        latents = latents.float().contiguous()
        images = torch.full((len(latents), *shape), torch.nan)
        self._call(
            "defgan_decode",
            *self._generator(plan, precision, parameters),
            *self._pointers(latents),
            ctypes.c_int64(len(latents)),
            ctypes.c_int(blocks),
            ctypes.c_int64(max_rows),
            ctypes.c_uint64(seed),
            *self._pointers(images),
        )
        return images

    def nearest(
        self,
        images: Tensor,
        candidates: Tensor,
        parameters: Sequence[Tensor],
        plan: str,
        restarts: int,
        draws: Tensor | None = None,
        kept: Kept | None = None,
        blocks: int = 2,
        seed: int = 0,
    ) -> Tensor:
        """As the op `nearest`; ``kept``: what the device keeps from call to call, made anew where there is none."""
        images, candidates = images.float().contiguous(), candidates.float().contiguous()
        kept = kept or Kept()
        size = ctypes.c_int64()
        indices = torch.full((len(images), restarts), -1)
        generator = self._generator(plan, "float32", parameters)
        del generator[1]  # the precision

        def call() -> None:
            self._call(
                "defgan_nearest",
                *generator,
                *self._pointers(candidates),
                ctypes.c_int64(len(candidates)),
                *self._pointers(images),
                ctypes.c_void_p(None if draws is None else draws.data_ptr()),
                ctypes.c_int64(len(images)),
                ctypes.c_int64(restarts),
                ctypes.c_int(blocks),
                ctypes.c_uint64(seed),
                ctypes.c_void_p(kept.memory.data_ptr() if len(kept.memory) else None),
                *self._pointers(kept.valid),
                ctypes.byref(size),
                *self._pointers(indices),
            )

        if not len(kept.memory):
            call()  # tells the size alone
            kept.memory = torch.empty(size.value // 8, dtype=torch.int64)
        call()
        return indices

    def _generator(self, plan: str, precision: str, parameters: Sequence[Tensor]) -> list[object]:
        self._held = [p.detach().float().contiguous() for p in parameters]
        count = len(self._held)
        return [
            plan.encode(),
            ctypes.c_int(PRECISIONS.index(precision)),
            (ctypes.c_void_p * max(count, 1))(*(p.data_ptr() for p in self._held)),
            (ctypes.c_int64 * max(count, 1))(*(p.numel() for p in self._held)),
            ctypes.c_int(count),
        ]

    @staticmethod
    def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(t.data_ptr()) for t in tensors]

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self._library, name)(*arguments):
            raise KernelFailure(self._library.defgan_error().decode())


@functools.cache
def kernels() -> Kernels:
    """Returns the library of the sources as they are."""
    return Kernels(build())
