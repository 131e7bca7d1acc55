"""Every kind of mistake that the tests of the CUDA kernels are for, planted into the kernels' own sources: each must be
found, by the executor (a race, an overrun, a read of what nothing wrote, ...) or by the distance from the float64
reference; and the same build with no bug switched on must pass.

Each bug is one edit of one line. All are compiled into one library, each behind a condition that a variable switches
on, since compiling takes longer than running. Barriers are found by themselves: a barrier that a kernel gains is
tested without anybody's doing, and one whose removal nobody notices is one too many.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
from dataclasses import dataclass

import on_cpu
import pytest
import torch
from generators import make_case
from torch import Tensor, nn

from defgan_fast import load_generator, reference
from defgan_fast.plan import interpret, lower

pytestmark = pytest.mark.slow
CSRC = on_cpu.ROOT / "csrc"
SWITCH = """
#pragma once
extern "C" {
inline int defgan_planted_bug = 0;
}
namespace defgan::cuda {
inline bool planted(int bug) { return defgan_planted_bug == bug; }
}  // namespace defgan::cuda
"""

RACE, NOTHING_WRITTEN, OUT_OF_BOUNDS = "race: ", "which nothing has written", "out of bounds: "
MISALIGNED, PARTING, CONSTANT = "which is not aligned", "lanes of one warp part", "by load_constant"
# Not the executor but the result: it is farther from the float64 reference than float16 allows.
VALUES = "values"
# Latents may differ from the reference's by this part of the way that the reference has gone: float16 has 11 bits and
# ReLU masks flip where a sum is within rounding of zero, so the error of one step is near the root of 2**-11, 0.02.
TOLERANCE = 0.06


@dataclass(frozen=True)
class Bug:
    """One edit. PLANTED in `new` is true (1) where the bug is switched on.

    Attributes:
        file: below csrc/cuda.
        old: text that occurs once in the file.
        case: the projection that shows it.
        found: any of these in the failure's message, or VALUES.
    """

    name: str
    file: str
    old: str
    new: str
    case: str
    found: tuple[str, ...]


FUSED, CONVOLUTION, LAYERED = "fused.h", "fused_convolution.h", "layered.h"
GEMM, PACKING = "gemm.h", "packing.h"
BUGS = [
    # fused
    Bug(
        "pixels, one too many",
        FUSED,
        "i < G::kPixels * (kGroupRows / 2); i +=",
        "i < G::kPixels * (kGroupRows / 2) + PLANTED; i +=",
        "fused",
        (RACE, NOTHING_WRITTEN),
    ),
    Bug(
        "rows, one too many",
        FUSED,
        "if (row < p.call.rows)",
        "if (row < p.call.rows + PLANTED)",
        "fused",
        (OUT_OF_BOUNDS,),
    ),
    Bug(
        "zeros not whole",
        FUSED,
        "i < G::kZeroBytes / 16; i +=",
        "i < G::kZeroBytes / 16 - PLANTED; i +=",
        "fused",
        (NOTHING_WRITTEN,),
    ),
    Bug(
        "last chunks skipped",
        CONVOLUTION,
        "chunk < kChunks; chunk += kUnrolled",
        "chunk < kChunks - kUnrolled * PLANTED; chunk += kUnrolled",
        "fused",
        (VALUES,),
    ),
    Bug(
        "the next chunk's source",
        CONVOLUTION,
        "source[i] = source_at(tap, i) + lane * 16;",
        "source[i] = source_at(tap, i) + lane * 16 + PLANTED * Storage<S>::kBlockBytes;",
        "fused",
        (VALUES, NOTHING_WRITTEN),
    ),
    Bug(
        "a row of pixels too low",
        FUSED,
        "const int oy = pixel / G::kH3 + G::kPad - 2 * py,",
        "const int oy = pixel / G::kH3 + G::kPad - 2 * py + PLANTED,",
        "fused",
        (VALUES,),
    ),
    Bug(
        "mask of another tile",
        FUSED,
        "sum[m], mask[n] >> (4 * m))",
        "sum[m], mask[n] >> (4 * m + PLANTED))",
        "fused",
        (VALUES,),
    ),
    Bug(
        "misaligned fragment",
        FUSED,
        "tile / 2 * G::kBlock + lane * 16 +",
        "tile / 2 * G::kBlock + lane * (16 - 4 * PLANTED) +",
        "fused",
        (MISALIGNED,),
    ),
    Bug(
        "misaligned matrix row",
        FUSED,
        "(pixel == kNone ? G::kZero : G::kImage + pixel * G::kSlot)",
        "(pixel == kNone ? G::kZero : G::kImage + pixel * G::kSlot + 8 * PLANTED)",
        "fused",
        (MISALIGNED,),
    ),
    Bug(
        "a lane left out",
        FUSED,
        "const bool has_latents = warp < kLatentTiles;",
        "const bool has_latents = warp < kLatentTiles && lane < 32 - PLANTED;",
        "fused",
        (PARTING, "deadlock: "),
    ),
    Bug("mask shifted", FUSED, "uint16_t(mask));", "uint16_t(mask >> PLANTED));", "fused", (VALUES,)),
    # layered and split
    Bug(
        "pieces, one too many",
        LAYERED,
        "i < pieces * groups; i +=",
        "i < pieces * groups + PLANTED; i +=",
        "layered",
        (RACE, OUT_OF_BOUNDS, NOTHING_WRITTEN),
    ),
    Bug(
        "errors, one row too many",
        LAYERED,
        "if (lane == 0 && row_of(group, row) < p.call.rows)",
        "if (lane == 0 && row_of(group, row) < p.call.rows + PLANTED)",
        "layered",
        (OUT_OF_BOUNDS,),
    ),
    Bug(
        "latents, one row too many",
        LAYERED,
        "if (r >= p.call.rows) continue;",
        "if (r >= p.call.rows + PLANTED) continue;",
        "layered",
        (OUT_OF_BOUNDS,),
    ),
    Bug(
        "blocks do the same work",
        LAYERED,
        "thread = block_index() % p.blocks_per_team * block_threads() +",
        "thread = block_index() % p.blocks_per_team * block_threads() * !PLANTED +",
        "split",
        (RACE,),
    ),
    Bug(
        "a group of the next team",
        LAYERED,
        "groups = int(int64_t(p.group_count) * (team + 1) / p.teams)",
        "groups = int(int64_t(p.group_count) * (team + 1 + PLANTED) / p.teams)",
        "split",
        (RACE,),
    ),
    Bug(
        "tasks skipped",
        LAYERED,
        "task += warps)",
        "task += warps + PLANTED)",
        "layered",
        (VALUES, NOTHING_WRITTEN),
    ),
    Bug(
        "zeros of a group not whole",
        LAYERED,
        "i < groups * zeros; i +=",
        "i < groups * zeros - PLANTED; i +=",
        "layered",
        (NOTHING_WRITTEN,),
    ),
    Bug(
        "velocity not zeroed",
        LAYERED,
        "store_global(velocity + channel * kGroupRows + row, 0.0f);",
        "if (!PLANTED) store_global(velocity + channel * kGroupRows + row, 0.0f);",
        "layered",
        (NOTHING_WRITTEN,),
    ),
    Bug(
        "the next entry of a map",
        LAYERED,
        "scaled(load_constant(index + s.index + position), position, v);",
        "scaled(load_constant(index + s.index + position + PLANTED), position, v);",
        "layered",
        (VALUES, OUT_OF_BOUNDS, NOTHING_WRITTEN),
    ),
    Bug(
        "another row's gradient",
        LAYERED,
        "(pixel * kGroupRows + row)",
        "(pixel * kGroupRows + (row ^ PLANTED))",
        "split",
        (VALUES,),
    ),
    Bug(
        "last step of a product skipped",
        GEMM,
        "if (step + n >= steps) return;",
        "if (step + n >= steps - PLANTED) return;",
        "layered",
        (VALUES,),
    ),
    Bug(
        "activations as constants",
        GEMM,
        "b[n][i] = load_global(reinterpret_cast<const Vec4*>(buffers[i] + int64_t(unit) * kSourceUnit));",
        "const Vec4* at = reinterpret_cast<const Vec4*>(buffers[i] + int64_t(unit) * kSourceUnit);"
        "b[n][i] = PLANTED ? load_constant(at) : load_global(at);",
        "layered",
        (CONSTANT,),
    ),
    Bug(
        "next group's activations",
        GEMM,
        "buffers[i] = p.groups + (real ? at.group : 0) *",
        "buffers[i] = p.groups + (real ? at.group + PLANTED : 0) *",
        "split",
        (RACE, OUT_OF_BOUNDS, NOTHING_WRITTEN),
    ),
    Bug(
        "channels left out, float32",
        GEMM,
        "(kPadded / kUnit);",
        "(kPadded / kUnit) - 2 * PLANTED;",
        "float32",
        (VALUES,),
    ),
    # packing
    Bug(
        "vectors, one number too many",
        PACKING,
        "i < v.count; i +=",
        "i < v.count + PLANTED; i +=",
        "layered",
        (RACE, OUT_OF_BOUNDS),
    ),
    Bug(
        "pieces of a matrix, one too many",
        PACKING,
        "piece < pieces; piece +=",
        "piece < pieces + PLANTED; piece +=",
        "layered",
        (RACE, OUT_OF_BOUNDS),
    ),
]
# Of barriers that order no memory accesses the CPU execution shows nothing:
UNSEEN = {
    # Lanes meet again after a branch before a collective; on the CPU they meet in the collective itself.
    (GEMM, "finish_fragment"),
    (GEMM, "accumulate"),
}


def _barriers() -> list[Bug]:
    bugs = []
    for file, case in ((FUSED, "fused"), (LAYERED, "float32"), (GEMM, "layered"), (PACKING, "layered")):
        text = (CSRC / "cuda" / file).read_text()
        for match in re.finditer(r"\b(sync_block|sync_warp|meet)\(\);", text):
            function = re.findall(r"DEFGAN_DEVICE(?:_NOINLINE)?[^;{}]*?(\w+)\(", text[: match.start()])[-1]
            if (file, function) in UNSEEN:
                continue
            before, line = text[: match.start()], text.count("\n", 0, match.start()) + 1
            # The text up to the line's beginning makes it unique.
            bugs.append(
                Bug(
                    f"{match[1]} of line {line} in {function}",
                    file,
                    f"@{len(before)}",
                    match[0],
                    case,
                    (RACE, NOTHING_WRITTEN),
                )
            )
    return bugs


BARRIERS = _barriers()
ALL = BUGS + BARRIERS


def _plant(file: str, text: str) -> str:
    edits = []
    for number, bug in enumerate(ALL, 1):
        if bug.file != file:
            continue
        if bug.old.startswith("@"):
            start, old, new = int(bug.old[1:]), bug.new, f"if (!planted({number})) {bug.new}"
        else:
            assert text.count(bug.old) == 1, f"{file} has no longer, or more than once: {bug.old}"
            start, old, new = text.index(bug.old), bug.old, bug.new.replace("PLANTED", f"planted({number})")
        edits.append((start, start + len(old), new))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> on_cpu.Kernels:
    """Returns the kernels with every bug in them, all switched off."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(CSRC, folder / "csrc")
    for file in (FUSED, CONVOLUTION, LAYERED, GEMM, PACKING):
        path = folder / "csrc" / "cuda" / file
        path.write_text(_plant(file, path.read_text()))
    # One fused geometry is enough, and compiles three times as fast.
    path = folder / "csrc" / "cuda" / "geometries.h"
    path.write_text(
        re.sub(r"body\(Mnist(TensorFlow)?Geometry\{\}\)", "body(DigitsGeometry{})", path.read_text())
    )
    (folder / "planted.h").write_text(SWITCH)
    return on_cpu.Kernels(on_cpu.build(folder / "csrc", folder, ["-include", str(folder / "planted.h")]))


@dataclass(frozen=True)
class Projection:
    """Holds what a case runs, and what float64 makes of it."""

    images: Tensor
    z0: Tensor
    plan: str
    parameters: tuple[Tensor, ...]
    rates: list[float]
    momentum: float
    precision: str
    mapping: str
    blocks: int
    latents: Tensor
    errors: Tensor

    def run(self, kernels: on_cpu.Kernels, seed: int = 0) -> on_cpu.Result:
        return kernels.project(
            self.images,
            self.z0,
            self.parameters,
            self.plan,
            self.rates,
            self.momentum,
            precision=self.precision,
            mapping=self.mapping,
            blocks=self.blocks,
            seed=seed,
        )

    def distance(self, result: on_cpu.Result) -> float:
        """Returns the largest relative distance of a row's latent from the reference's."""
        gone = (self.latents - self.z0.double()).norm(dim=-1)
        return ((result.latents - self.latents).norm(dim=-1) / gone).max().item()


@functools.cache
def projection(case: str) -> Projection:
    # Every case has rows for more than one block or team and a last group that is not full.
    steps = 2
    if case == "fused":
        generator: nn.Module = load_generator("digits")
        k, lr, momentum, restarts = 64, 10.0, 0.7, 3
        with torch.no_grad():
            images = generator(torch.randn(3, k) * 0.5)
        z0 = torch.randn(restarts, k) / 8
        precision, mapping, blocks = "float16", "fused", 1
    else:
        family = {"layered": "unfoldable-norm-a", "split": "latent-as-map", "float32": "linear-a"}[case]
        made = make_case(family, images=3, restarts=4)
        generator, images, z0, lr, momentum = made.generator, made.images, made.z0, made.lr, made.momentum
        precision = "float32" if case == "float32" else "float16"
        mapping, blocks = ("split", 4) if case == "split" else ("layered", 2)
    plan = lower(generator, z0.shape[-1])
    parameters = tuple(p.detach().clone() for p in plan.tensors(generator))
    rates = [lr] * steps
    tensors = [p.double() for p in parameters]
    latents, errors = reference.project(
        lambda z: interpret(plan, tensors, z), images.double(), z0.double(), rates, momentum
    )
    return Projection(
        images, z0, plan.text, parameters, rates, momentum, precision, mapping, blocks, latents, errors
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", ["fused", "layered", "split", "float32"])
def test_without_a_bug_all_is_well(library: on_cpu.Kernels, case: str, seed: int) -> None:
    one = projection(case)
    result = one.run(library, seed)
    assert result.mapping == one.mapping
    assert one.distance(result) < TOLERANCE
    torch.testing.assert_close(result.errors.double(), one.errors, rtol=0.02, atol=0)


@pytest.mark.parametrize("bug", ALL, ids=lambda bug: f"{bug.file}-{bug.name}".replace(" ", "_"))
def test_a_planted_bug_is_found(library: on_cpu.Kernels, bug: Bug) -> None:
    one = projection(bug.case)
    switch = ctypes.c_int.in_dll(library._library, "defgan_planted_bug")
    switch.value = ALL.index(bug) + 1
    message, distance = "", 0.0
    try:
        distance = one.distance(one.run(library))
    except on_cpu.KernelFailure as failure:
        message = str(failure)
    finally:
        switch.value = 0
    if message:
        assert any(phrase in message for phrase in bug.found), f"not found as expected: {message}"
    else:
        assert VALUES in bug.found, "the executor did not notice"
        assert not distance < TOLERANCE, f"only {distance:.3f} away from the reference"
