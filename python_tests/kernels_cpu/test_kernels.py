"""The compiled ops against the specification in float64, on generators of every kind, for every instruction set.

Descent amplifies rounding and rows on a ReLU's kink differ in any two implementations, so one step's gradient and
the losses after 20 steps are compared by their medians over rows (never by loosened maxima), on projections whose
loss is shown to fall.
"""

from __future__ import annotations

import copy
import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from generators import FAMILIES, Case, make_case, shipped_case

from defgan_fast import reference
from defgan_fast.kernels import extension, ops
from defgan_fast.plan import Plan, decoder_of, lower
from defgan_fast.weights import shipped

pytestmark = pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")

_module = extension.module()
SETS: list[str] = _module.instruction_sets() if _module else []


# The shipped generators of one geometry take the same path through the kernels: make test runs one of them.
_SHIPPED = [
    pytest.param(name, marks=pytest.mark.slow) if name == "fashion_mnist" else name
    for name in shipped("generator")
]


@pytest.fixture(scope="module", params=[*FAMILIES, *_SHIPPED])
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param) if request.param in FAMILIES else shipped_case(request.param)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DEFGAN_CPU_ISA", request.param)
    assert _module is not None
    assert _module.active_instruction_set() == request.param
    return request.param


@functools.cache
def lowered(case: Case) -> Plan:
    return lower(case.generator, case.latent_size)


def run_op(
    case: Case,
    rates: list[float],
    precision: str = "float32",
    momentum: float | None = None,
    max_rows: int = 0,
):
    plan = lowered(case)
    return torch.ops.defgan_fast.project(
        case.images,
        case.z0,
        [p.detach() for p in plan.tensors(case.generator)],
        plan.text,
        rates,
        case.momentum if momentum is None else momentum,
        precision,
        max_rows,
        False,
    )


def exact(case: Case, rates: list[float], momentum: float | None = None):
    """Runs the specification in float64, once for all instruction sets."""
    return _exact(case, tuple(rates), case.momentum if momentum is None else momentum)


@functools.cache
def _exact(case: Case, rates: tuple[float, ...], momentum: float):
    twin = copy.deepcopy(case.generator).double()
    return reference.project(
        decoder_of(twin, case.latent_size),
        case.images.double(),
        case.z0.double(),
        rates,
        momentum,
    )


def gradient_rate(case: Case) -> float:
    """Returns a rate at which a step is about a latent's own length, so that z0 - z1 keeps the gradient's digits."""
    z1, _ = exact(case, [1.0], momentum=0.0)
    return (case.z0.norm(dim=-1).median() / (case.z0 - z1).norm(dim=-1).median()).item()


def gradient_error(case: Case, latents: torch.Tensor, rate: float) -> float:
    """Returns the median over rows of the relative error of the gradient that one step of plain descent took."""
    z1, _ = exact(case, [rate], momentum=0.0)
    taken, expected = case.z0 - latents.double(), case.z0 - z1
    return ((taken - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


def test_one_step_is_the_gradient(case: Case, instruction_set: str) -> None:
    rate = gradient_rate(case)
    latents, _ = run_op(case, [rate], momentum=0.0)
    assert gradient_error(case, latents, rate) < 1e-5


def test_losses_after_20_steps(case: Case, instruction_set: str) -> None:
    rates = [case.lr] * case.steps
    latents, errors = run_op(case, rates)
    z, expected = exact(case, rates)
    _, before = exact(case, [])
    assert expected.median() < before.median() * 2 / 3, "the case does not move"
    assert ((errors - expected).abs() / expected).median() < 1e-4
    travelled = (z - case.z0).norm(dim=-1)
    assert ((latents - z).norm(dim=-1) / travelled).median() < 1e-3


def test_one_step_too_few_would_be_seen(case: Case) -> None:
    """The comparison above has teeth: a projector that stops a step early, or never moves, is far outside it."""
    rates = [case.lr] * case.steps
    _, expected = exact(case, rates)
    for steps in (0, case.steps - 1):
        _, errors = run_op(case, rates[:steps])
        assert ((errors - expected).abs() / expected).median() > 1e-3


def test_bfloat16_is_as_close_as_torch_gets(case: Case, instruction_set: str) -> None:
    """One step's gradient has at most twice the error of PyTorch's own bfloat16 layers (plus 1e-3)."""
    rate = gradient_rate(case)
    latents, errors = run_op(case, [rate], "bfloat16", momentum=0.0)
    ours = gradient_error(case, latents, rate)
    narrow = copy.deepcopy(case.generator).bfloat16()
    decoder = decoder_of(narrow, case.latent_size)
    theirs_z, _ = reference.project(
        lambda z: decoder(z.bfloat16()).float(), case.images, case.z0, [rate], 0.0
    )
    theirs = gradient_error(case, theirs_z, rate)
    assert ours <= 2 * theirs + 1e-3, f"bfloat16 gradient error {ours}, PyTorch's {theirs}"
    # The final error is evaluated in float32 at the latents that came out.
    at_latents = reference.reconstruction_errors(
        decoder_of(case.generator, case.latent_size),
        latents.flatten(0, 1),
        case.images.repeat_interleave(case.z0.shape[0], 0),
    )
    torch.testing.assert_close(errors.flatten(), at_latents, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_batch_chunk_or_threads(
    case: Case, instruction_set: str, precision: str
) -> None:
    rates = [case.lr] * 3
    plan = lowered(case)
    parameters = [p.detach() for p in plan.tensors(case.generator)]

    def run(images: torch.Tensor, z0: torch.Tensor, max_rows: int = 0):
        return torch.ops.defgan_fast.project(
            images, z0, parameters, plan.text, rates, case.momentum, precision, max_rows, False
        )

    whole = run(case.images, case.z0)
    before = torch.get_num_threads()
    try:
        for threads, max_rows in ((2, 0), (3, 0), (2, 1), (1, 3)):
            torch.set_num_threads(threads)
            for got, expected in zip(run(case.images, case.z0, max_rows), whole, strict=True):
                assert torch.equal(got, expected), f"{threads} threads, max_rows={max_rows}"
        for i in (0, len(case.images) - 1):
            for got, expected in zip(run(case.images[i : i + 1], case.z0), whole, strict=True):
                assert torch.equal(got, expected[i : i + 1]), f"image {i}"
            for got, expected in zip(run(case.images[i : i + 1], case.z0[1:2]), whole, strict=True):
                assert torch.equal(got, expected[i : i + 1, 1:2]), f"image {i}, restart 1"
    finally:
        torch.set_num_threads(before)


def test_decode_matches_the_generator(case: Case, instruction_set: str) -> None:
    plan = lowered(case)
    parameters = [p.detach() for p in plan.tensors(case.generator)]
    latents = torch.randn(7, case.latent_size, generator=torch.Generator().manual_seed(1))
    images = torch.ops.defgan_fast.decode(latents, parameters, plan.text, 0)
    twin = copy.deepcopy(case.generator).double()
    with torch.no_grad():
        expected = decoder_of(twin, case.latent_size)(latents.double())
    assert (images - expected).abs().max() < 2e-5 * max(1.0, expected.abs().max().item())
    for i in range(7):
        one = torch.ops.defgan_fast.decode(latents[i : i + 1], parameters, plan.text, 0)
        assert torch.equal(one, images[i : i + 1])


def test_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFGAN_CPU_ISA", "mmx")
    case = make_case("linear-a")
    with pytest.raises(
        ValueError, match=r"DEFGAN_CPU_ISA: instruction set must be one of baseline.*got 'mmx'"
    ):
        run_op(case, [case.lr])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_no_code_for_a_wide_target_can_leak(name: str, tmp_path: Path) -> None:
    """An inline function compiled in one of these files could be the copy that the linker keeps for all callers,
    and crash a machine without the set: so they must define nothing that is merged between files."""
    compiler, reader = shutil.which("c++"), shutil.which("nm")
    if compiler is None or reader is None:
        pytest.skip("needs c++ and nm")
    source = Path(__file__).parents[2] / "csrc" / "cpu" / f"kernels_{name}.cpp"
    made = tmp_path / "kernels.o"
    subprocess.run([compiler, "-std=c++17", "-O1", "-w", "-c", source, "-o", made], check=True)
    listing = subprocess.run(
        [reader, "-C", "--defined-only", made], check=True, capture_output=True, text=True
    )
    merged = [line for line in listing.stdout.splitlines() if re.search(r" [WwVu] (?!DW\.ref)", line)]
    assert not merged
