"""The mistakes that `test_planted_bugs.py` plants into the CUDA kernels: each is one edit of one line."""

from __future__ import annotations

import re
from dataclasses import dataclass

import on_cpu

CSRC = on_cpu.ROOT / "csrc"

RACE, NOTHING_WRITTEN, OUT_OF_BOUNDS = "race: ", "which nothing has written", "out of bounds: "
MISALIGNED, PARTING, CONSTANT = "which is not aligned", "lanes of one warp part", "by load_constant"
# Not the executor but the result: it is farther from the float64 reference than float16 allows.
VALUES = "values"


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
SPHERE, KEEPING, LEGS = "sphere.h", "keep_rows.h", "../legs.h"
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
        "store_global(velocity + channel",
        "if (!PLANTED) store_global(velocity + channel",
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
    # latents on a sphere, rows that are dropped
    Bug(
        "a start that is not scaled",
        FUSED,
        "if (radius > 0 && p.call.velocities == nullptr)",
        "if (radius > 0 && p.call.velocities == nullptr && !PLANTED)",
        "fused on a sphere",
        (VALUES,),
    ),
    Bug(
        "another start that is not scaled",
        LAYERED,
        "if (scales && p.call.velocities == nullptr) {",
        "if (scales && p.call.velocities == nullptr && !PLANTED) {",
        "on a sphere",
        (VALUES,),
    ),
    Bug(
        "a step that is not scaled",
        FUSED,
        "if (radius > 0) apart",
        "if (radius > 0 && !PLANTED) apart",
        "fused on a sphere",
        (VALUES,),
    ),
    Bug(
        "the norm taken of a tile alone",
        SPHERE,
        "total.x += sum.x;",
        "total.x = sum.x + (PLANTED ? 0.0 : total.x);",
        "fused on a sphere",
        (VALUES,),
    ),
    Bug(
        "the norm of another row",
        SPHERE,
        "square(z[0]) + square(z[2])",
        "square(z[0]) + square(z[2 + PLANTED])",
        "on a sphere",
        (VALUES,),
    ),
    Bug(
        "an input that is not scaled",
        LAYERED,
        "store_input(buffers(group) + input",
        "if (!PLANTED) store_input(buffers(group) + input",
        "float32",
        (VALUES,),
    ),
    Bug(
        "the worst rows kept",
        KEEPING,
        "error, i) ? 1 : 0;",
        "error, i) != PLANTED ? 1 : 0;",
        "ties",
        (VALUES, NOTHING_WRITTEN),
    ),
    Bug(
        "the last of equals kept",
        LEGS,
        "? a < b :",
        "? (PLANTED ? a > b : a < b) :",
        "ties",
        (VALUES,),
    ),
    Bug(
        "a velocity that is not carried",
        KEEPING,
        "store_global(p.next_velocities + to, load_constant(p.velocities + from));",
        "store_global(p.next_velocities + to, PLANTED ? 0.0f : load_constant(p.velocities + from));",
        "fused on a sphere",
        (VALUES,),
    ),
    Bug(
        "results of another restart",
        KEEPING,
        "p.all_latents + (int64_t(image) * p.restarts + restart) * k",
        "p.all_latents + (int64_t(image) * p.restarts + (PLANTED ? i : restart)) * k",
        "ties",
        (VALUES,),
    ),
    Bug(
        "rows ranked, one too few",
        KEEPING,
        "for (int j = 0; j < p.rows; ++j) rank +=",
        "for (int j = 0; j < p.rows - PLANTED; ++j) rank +=",
        "ties",
        (VALUES, OUT_OF_BOUNDS, RACE),
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
    (LAYERED, "scale_latents"),
}


CASE_OF_BARRIERS = (
    (FUSED, "fused"),
    (LAYERED, "float32"),
    (GEMM, "layered"),
    (PACKING, "layered"),
    (SPHERE, "fused on a sphere"),
    (KEEPING, "ties"),
)


def _barriers() -> list[Bug]:
    bugs = []
    for file, case in (
        (FUSED, "fused"),
        (LAYERED, "float32"),
        (GEMM, "layered"),
        (PACKING, "layered"),
        (KEEPING, "ties"),
    ):
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
