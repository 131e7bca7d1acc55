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
from planted_bugs import ALL, CSRC, VALUES, Bug
from torch import Tensor, nn

from defgan_fast import load_generator, reference
from defgan_fast.plan import interpret, lower

pytestmark = pytest.mark.slow
SWITCH = """
#pragma once
extern "C" {
inline int defgan_planted_bug = 0;
}
namespace defgan::cuda {
inline bool planted(int bug) { return defgan_planted_bug == bug; }
}  // namespace defgan::cuda
namespace defgan {
using cuda::planted;
}
"""
# Latents may differ from the reference's by this part of the way that the reference has gone: float16 has 11 bits and
# ReLU masks flip where a sum is within rounding of zero, so the error of one step is near the root of 2**-11, 0.02.
TOLERANCE = 0.06


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
    for file in sorted({bug.file for bug in ALL}):
        path = folder / "csrc" / "cuda" / file
        # Asking whether a bug is switched on is nothing for a constant expression.
        path.write_text(_plant(file, path.read_text()).replace("constexpr bool ranks", "inline bool ranks"))
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
    radius: float
    keep: reference.Keep | None

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
            radius=self.radius,
            keep=self.keep,
        )

    def distance(self, result: on_cpu.Result) -> float:
        """Returns the largest relative distance of a row's latent from the reference's."""
        start = reference.on_sphere(self.z0.double(), self.radius)
        gone = (self.latents - start).norm(dim=-1)
        gone = gone.where(gone > 0, gone.max())  # some rows stop where they start
        return ((result.latents - self.latents).norm(dim=-1) / gone).max().item()


FAMILIES_OF = {
    "layered": "unfoldable-norm-a",
    "split": "latent-as-map",
    "float32": "linear-a",
    "on a sphere": "unfoldable-norm-a",
    "ties": "linear-a",
}
CASES = ("fused", "fused on a sphere", *FAMILIES_OF)


@functools.cache
def projection(case: str) -> Projection:
    # Every case has rows for more than one block or team and a last group that is not full.
    steps, radius, keep = 2, 0.0, None
    if case in ("fused", "fused on a sphere"):
        generator: nn.Module = load_generator("digits")
        k, lr, momentum, restarts = 64, 10.0, 0.7, 3
        with torch.no_grad():
            images = generator(torch.randn(3, k) * 0.5)
        z0 = torch.randn(restarts, k) / 8
        precision, mapping, blocks = "float16", "fused", 1
        if case == "fused on a sphere":
            radius, keep = 4.0, ((1, 2),)
    else:
        family = FAMILIES_OF[case]
        made = make_case(family, images=3, restarts=4)
        generator, images, z0, lr, momentum = made.generator, made.images, made.z0, made.lr, made.momentum
        precision = "float32" if case in ("float32", "ties") else "float16"
        if case in ("float32", "on a sphere"):
            radius = 2.0
        if case == "ties":  # the second half of the restarts begins where the first one does
            z0, keep, steps = z0[:2].repeat(2, 1), ((0, 3), (1, 1)), 3
        mapping, blocks = ("split", 4) if case == "split" else ("layered", 2)
    plan = lower(generator, z0.shape[-1])
    parameters = tuple(p.detach().clone() for p in plan.tensors(generator))
    rates = [lr] * steps
    tensors = [p.double() for p in parameters]
    arguments = (images.double(), z0.double(), rates, momentum, keep or (), None, radius)
    latents, errors, _ = reference.project_keeping(lambda z: interpret(plan, tensors, z), *arguments)
    settings = (rates, momentum, precision, mapping, blocks)
    return Projection(images, z0, plan.text, parameters, *settings, latents, errors, radius, keep)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
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
