"""The CUDA kernels' own sources, run on the CPU: fused, layered and split against float64 and against each other.

Two references. `reference.py` in float64 is the specification; a 16-bit kernel differs from it mostly by ReLU masks
that flip where a sum lies within rounding of zero, so its error grows like the root of the precision. A second
reference computes in float64 too but rounds where the kernels round (weights, stored activations, stored gradients),
which leaves the order of sums and the few masks that this decides: a much sharper test. The bounds are those found
when the method was tried in 16 bits on the MNIST generator (gradient of one step, medians over rows).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import on_cpu
import pytest
import torch
from generators import Case, TensorFlowAligned, make_case, shipped_case
from torch import Tensor, nn

from defgan_fast import models, reference
from defgan_fast.plan import Layer, Plan, decoder_of, interpret, latent_size_of, lower
from defgan_fast.plan.activations import ACTIVATIONS
from defgan_fast.starts import starting_points

pytestmark = pytest.mark.slow
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of one step's gradient, relative: against float64, and against float64 rounded at the kernels' points.
TO_EXACT = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 6.5e-2}
TO_ROUNDED = {"float16": 4e-3, "bfloat16": 3e-2}
# Every kind of stage: matrices of all sorts, upsampling, maps, reorders, norms folded and not, columns and not.
FAMILIES = [
    "paper",
    "tensorflow",
    "transposed-a",
    "rectangular-a",
    "linear-a",
    "one-pixel-a",
    "upsampling-a",
    "upsampling-b",
    "unfoldable-norm-a",
    "latent-as-map",
    "flattened",
    "many-channels",
    "many-positions-and-taps",
]


@functools.cache
def lowered(case: Case) -> Plan:
    return lower(case.generator, case.latent_size)


def parameters(case: Case) -> list[Tensor]:
    return [p.detach() for p in lowered(case).tensors(case.generator)]


def run(case: Case, rates: Sequence[float], precision: str, mapping: str, **options: Any) -> on_cpu.Result:
    options = {"images": case.images, "z0": case.z0, "momentum": case.momentum, "blocks": 2} | options
    return on_cpu.kernels().project(
        parameters=parameters(case),
        plan=lowered(case).text,
        rates=rates,
        precision=precision,
        mapping=mapping,
        **options,
    )


@functools.cache
def exact(case: Case, rates: tuple[float, ...], momentum: float) -> tuple[Tensor, Tensor]:
    twin = copy.deepcopy(case.generator).double()
    decoder = decoder_of(twin, case.latent_size)
    return reference.project(decoder, case.images.double(), case.z0.double(), rates, momentum)


class _Store(torch.autograd.Function):
    """Rounds what a layer leaves in memory: its activation's output forward, its gradient backward."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
        stored = ACTIVATIONS[layer.activation].apply(total, layer.slope).to(dtype).double()
        ctx.save_for_backward(stored)
        ctx.layer, ctx.dtype = layer, dtype
        return stored

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return (gradient * derivative(ctx.layer, y)).to(ctx.dtype).double(), None, None


def derivative(layer: Layer, y: Tensor) -> Tensor:
    """Returns the activation's slope where its output is y."""
    return {
        "identity": lambda: torch.ones_like(y),
        "relu": lambda: (y > 0).double(),
        "leaky_relu": lambda: torch.where(y > 0, 1.0, layer.slope),
        "sigmoid": lambda: y * (1 - y),
        "tanh": lambda: 1 - y * y,
    }[layer.activation]()


def rounded_gradient(case: Case, precision: str) -> Tensor:
    """Returns the gradient of every row's error at z0 [B, R, k], in float64 rounded where the kernels round."""
    plan, dtype = lowered(case), DTYPES[precision]
    tensors = [p.to(dtype).double() if p.dim() > 1 else p.double() for p in parameters(case)]
    count, restarts = len(case.images), len(case.z0)
    z = case.z0.to(dtype).double().repeat(count, 1).requires_grad_()
    x: Tensor = z
    for n, layer in enumerate(plan.layers):
        alone = replace(layer, activation="identity")
        x = interpret(Plan((alone,), layer.shape_out, plan.parameters), tensors, x.flatten(1))
        if n + 1 < len(plan.layers):
            x = _Store.apply(x, layer, dtype)
    last = plan.layers[-1]
    y = ACTIVATIONS[last.activation].apply(x.detach(), last.slope)
    targets = case.images.double().repeat_interleave(restarts, 0).reshape(y.shape)
    delta = ((y - targets) * derivative(last, y)).to(dtype).double()
    (gradient,) = torch.autograd.grad(x, z, delta)
    return (gradient * 2 / case.images[0].numel()).view(count, restarts, -1)


def gradient_rate(case: Case) -> float:
    """Returns a rate at which a step is about a latent's own length, so that z0 - z1 keeps the gradient's digits."""
    z1, _ = exact(case, (1.0,), 0.0)
    return (case.z0.norm(dim=-1).median() / (case.z0 - z1).norm(dim=-1).median()).item()


def relative(got: Tensor, expected: Tensor) -> float:
    """Returns the median over rows."""
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median().item()


def check_one_step(case: Case, precision: str, mapping: str, **options: Any) -> None:
    rate = gradient_rate(case)
    result = run(case, [rate], precision, mapping, momentum=0.0, **options)
    assert result.mapping == mapping
    taken = (case.z0 - result.latents.double()) / rate
    expected = (case.z0 - exact(case, (rate,), 0.0)[0]) / rate
    assert relative(taken, expected) < TO_EXACT[precision]
    # A folded norm rounds the product of weight and scale, which the reference's layers do not know.
    if precision in TO_ROUNDED and all(layer.norm is None for layer in lowered(case).layers):
        assert relative(taken, rounded_gradient(case, precision)) < TO_ROUNDED[precision]


def check_errors(case: Case, result: on_cpu.Result) -> None:
    """Checks that the final error is float32 at the latents that came out, in every precision."""
    twin = copy.deepcopy(case.generator).double()
    expected = reference.reconstruction_errors(
        decoder_of(twin, case.latent_size),
        result.latents.double().flatten(0, 1),
        case.images.double().repeat_interleave(case.z0.shape[0], 0),
    )
    torch.testing.assert_close(result.errors.double().flatten(), expected.detach(), rtol=2e-5, atol=1e-9)


# A stage of every kind once more is enough where each case is projected six times.
FEWER = ["transposed-a", "linear-a", "one-pixel-a", "unfoldable-norm-a", "latent-as-map"]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@functools.cache
def paper_case(alignment: str) -> Case:
    """Returns the paper's generator in full width with weights that move, two images and five restarts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        generator = (
            models.Generator(128, 64, [1, 28, 28]) if alignment == "torch" else TensorFlowAligned(128, 64)
        )
        for module in generator.modules():
            if isinstance(module, nn.Linear | nn.ConvTranspose2d):
                fan_in = module.weight.shape[0] * (25 / 4 if module.weight.dim() == 4 else 1)
                if module.weight.dim() == 2:
                    fan_in = module.weight.shape[1]
                nn.init.normal_(module.weight, 0, 1.4 / fan_in**0.5)
                nn.init.normal_(module.bias, 0, 0.1)
        generator.eval()
        with torch.no_grad():
            images = decoder_of(generator, 128)(torch.randn(2, 128) * 0.3)
    return Case(generator, images, starting_points(0, 5, 128), 20.0, 3)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_one_step_of_any_plan(case: Case, precision: str) -> None:
    check_one_step(case, precision, "layered")


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_three_steps_and_the_error_that_picks(case: Case, precision: str) -> None:
    rates = (case.lr,) * 3
    result = run(case, rates, precision, "layered", seed=5)
    check_errors(case, result)
    _, before = exact(case, (), case.momentum)
    z, expected = exact(case, rates, case.momentum)
    assert expected.median() < before.median(), "the case does not move"
    bound = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}[precision]
    assert ((result.errors - expected).abs() / expected).median() < bound
    travelled = (z - case.z0).norm(dim=-1)
    assert ((result.latents - z).norm(dim=-1) / travelled).median() < 3 * bound


@pytest.mark.parametrize("name", FEWER)
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_bits_depend_on_nothing_but_the_row(name: str, precision: str) -> None:
    """Mapping, blocks of a team, order of threads, rows in flight and place in the batch change no bit."""
    case = make_case(name)
    rates = [case.lr] * 2
    whole = run(case, rates, precision, "layered")
    for mapping, options in (
        ("layered", {"blocks": 1, "seed": 1}),
        ("layered", {"blocks": 3, "max_rows": 5}),
        ("split", {"blocks": 2, "seed": 2}),
        ("split", {"blocks": 5, "max_rows": 9}),
    ):
        other = run(case, rates, precision, mapping, **options)
        assert torch.equal(other.latents, whole.latents), (mapping, options)
        assert torch.equal(other.errors, whole.errors), (mapping, options)
    one = run(case, rates, precision, "split", images=case.images[3:], z0=case.z0[1:2])
    assert torch.equal(one.latents, whole.latents[3:, 1:2])
    assert torch.equal(one.errors, whole.errors[3:, 1:2])
    each = run(case, rates, precision, "layered", z0=case.z0.expand(len(case.images), -1, -1))
    assert torch.equal(each.latents, whole.latents)


def test_decoding_matches_the_generator(case: Case) -> None:
    latents = torch.randn(11, case.latent_size, generator=torch.Generator().manual_seed(1))
    plan = lowered(case)
    decode = functools.partial(on_cpu.kernels().decode, parameters=parameters(case), plan=plan.text)
    images = decode(latents, shape=plan.image_shape)
    twin = copy.deepcopy(case.generator).double()
    with torch.no_grad():
        expected = decoder_of(twin, case.latent_size)(latents.double())
    assert (images - expected).abs().max() < 2e-5 * max(1.0, expected.abs().max().item())
    assert torch.equal(decode(latents[7:8], shape=plan.image_shape, blocks=1), images[7:8])
    assert torch.equal(
        decode(latents, shape=plan.image_shape, max_rows=3, precision="float16", seed=4), images
    )


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_fused_digits(precision: str) -> None:
    """The shipped generator is tested for one step, then across mappings, orders of threads and partial groups."""
    case = shipped_case("digits")
    check_one_step(case, precision, "fused")
    rates = [case.lr] * 2
    whole = run(case, rates, precision, "fused")
    check_errors(case, whole)
    for mapping, options in (
        ("layered", {}),
        ("split", {"blocks": 3}),
        ("fused", {"seed": 7, "max_rows": 11}),
    ):
        other = run(case, rates, precision, mapping, **options)
        assert torch.equal(other.latents, whole.latents), (mapping, options)
        assert torch.equal(other.errors, whole.errors), (mapping, options)
    one = run(case, rates, precision, "fused", images=case.images[2:3], z0=case.z0[3:])
    assert torch.equal(one.latents, whole.latents[2:3, 3:])


@pytest.mark.parametrize("alignment", ["torch", "tensorflow"])
def test_fused_at_full_width(alignment: str) -> None:
    """The paper's geometry, d = 64: one step against both references; in one alignment the same bits as split."""
    case = paper_case(alignment)
    assert latent_size_of(case.generator) == 128
    check_one_step(case, "float16", "fused", seed=9)
    if alignment == "tensorflow":
        return
    fused = run(case, [case.lr], "float16", "fused")
    split = run(case, [case.lr], "float16", "split", blocks=4)
    assert torch.equal(fused.latents, split.latents)
    assert torch.equal(fused.errors, split.errors)


def test_three_fused_steps_at_full_width() -> None:
    case = paper_case("torch")
    rates = (case.lr,) * 3
    result = run(case, rates, "bfloat16", "fused")
    check_errors(case, result)
    _, before = exact(case, (), case.momentum)
    _, expected = exact(case, rates, case.momentum)
    assert expected.median() < before.median(), "the case does not move"
    assert ((result.errors - expected).abs() / expected).median() < 5e-2


def test_no_step_returns_the_starting_points() -> None:
    case = make_case("linear-a")
    result = run(case, [], "float16", "split")
    assert torch.equal(result.latents, case.z0.expand(len(case.images), -1, -1))
    check_errors(case, result)


def test_an_overflowing_row_shows_it_and_disturbs_nobody() -> None:
    """1e6 is infinite in float16: its row ends without a finite error, the others keep their bits."""
    case = make_case("paper")
    rates = [case.lr] * 2
    whole = run(case, rates, "float16", "layered")
    wild = case.z0.clone()
    wild[2] = 1e6
    result = run(case, rates, "float16", "layered", z0=wild)
    assert not torch.isfinite(result.errors[:, 2]).any()
    kept = [0, 1, 3]
    assert torch.equal(result.latents[:, kept], whole.latents[:, kept])
    assert torch.equal(result.errors[:, kept], whole.errors[:, kept])


def test_an_overflowing_row_has_the_same_bits_in_any_tile() -> None:
    """In float32 the tile, which depends on the blocks of a team, must not decide what an infinity meets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        generator = nn.Sequential(
            nn.Linear(3, 20 * 16),
            nn.Unflatten(1, (20, 4, 4)),
            nn.Conv2d(20, 20, 1),
            nn.Conv2d(20, 20, 1),
            nn.Conv2d(20, 1, 1),
            nn.Sigmoid(),
        )
        for module in generator.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.constant_(module.weight, 0.5)  # one sign: an infinity stays one, and the image finite
        case = Case(generator.eval(), torch.rand(4, 1, 4, 4), torch.rand(4, 3), 0.1, 1)
    case.z0[1] = 3e38
    wide = run(case, [], "float32", "layered", blocks=1)
    narrow = run(case, [], "float32", "layered", blocks=16)
    # Products of infinities with the zeros of padded channels are seen, by both.
    assert wide.errors[:, 1].isnan().all()
    torch.testing.assert_close(narrow.errors, wide.errors, rtol=0, atol=0, equal_nan=True)


def test_more_stages_than_tiles_are_chosen_for_beforehand() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        generator = nn.Sequential(
            nn.Linear(4, 3 * 4),
            nn.Unflatten(1, (3, 2, 2)),
            *[nn.LeakyReLU(0.99) for _ in range(70)],
            nn.ConvTranspose2d(3, 1, 2, 2),
            nn.Sigmoid(),
        ).eval()
        case = Case(generator, torch.rand(2, 1, 4, 4), torch.randn(3, 4), 1.0, 1)
    assert 2 * len(lowered(case).layers) + 2 > 128  # kMaxChoices
    check_one_step(case, "float32", "layered")
    check_one_step(case, "float16", "layered")


def test_fused_is_refused_for_other_geometries() -> None:
    case = make_case("linear-a")
    with pytest.raises(
        on_cpu.KernelFailure, match="no fused kernel was compiled for this generator's geometry"
    ):
        run(case, [case.lr], "float16", "fused")
    digits = shipped_case("digits")
    with pytest.raises(on_cpu.KernelFailure, match="float32 has no fused kernel"):
        run(digits, [digits.lr], "float32", "fused")
