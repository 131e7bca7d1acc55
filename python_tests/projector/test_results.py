"""What a projection returns: every field against the specification, shapes, dtypes, defaults."""

from __future__ import annotations

import copy

import pytest
import torch
from generators import scale_up
from projectors import BACKENDS, K, kernels, make_generator, make_projector, same
from torch import Tensor, nn

from defgan_fast import Projection, Projector, reference
from defgan_fast.starts import starting_points


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_field_against_the_specification(images: Tensor, backend: str) -> None:
    """steps, staircase, starting points and selection, all from the constructor's arguments, against float64."""
    generator = make_generator()
    p = make_projector(
        generator,
        steps=7,
        restarts=4,
        lr=6.0,
        momentum=0.6,
        lr_decay=0.2,
        decay_at=0.5,
        seed=3,
        backend=backend,
    ).project(images)
    twin = copy.deepcopy(generator).double()
    latents, errors = reference.project(
        twin, images.double(), starting_points(3, 4, K).double(), [6.0] * 4 + [6.0 * 0.2] * 3, 0.6
    )
    _, before = reference.project(twin, images.double(), starting_points(3, 4, K).double(), [], 0.6)
    assert errors.median() < before.median() * 2 / 3, "the case does not move"
    torch.testing.assert_close(p.all_errors.double(), errors, rtol=1e-3, atol=1e-7)
    assert ((p.all_errors - errors).abs() / errors).median() < 1e-4
    best = errors.argmin(1)
    assert len(set(best.tolist())) > 1, (
        "images with one best restart for all cannot tell per image from per batch"
    )
    assert torch.equal(p.restarts, best)
    rows = torch.arange(len(images))
    torch.testing.assert_close(p.latents.double(), latents[rows, best], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(p.errors, p.all_errors.amin(1), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(p.images.double(), twin(p.latents.double()), rtol=1e-5, atol=1e-5)
    # The reported error is that of the reported image.
    torch.testing.assert_close(
        p.errors, (p.images - images).square().flatten(1).mean(1), rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("wrong", ["no step", "one step fewer", "one restart for the batch", "other seed"])
def test_wrong_projectors_are_seen(images: Tensor, wrong: str) -> None:
    """The differences that the test above must notice are far above its tolerances."""
    generator = make_generator()
    z0 = starting_points(3, 4, K).double()
    twin, x = copy.deepcopy(generator).double(), images.double()
    rates = [6.0] * 4 + [1.2] * 3
    latents, errors = reference.project(twin, x, z0, rates, 0.6)
    if wrong == "one restart for the batch":
        assert not torch.equal(errors.argmin(1), errors.sum(0).argmin().expand(len(x)))
        return
    cut = {"no step": [], "one step fewer": rates[:-1], "other seed": rates}[wrong]
    z0 = starting_points(4, 4, K).double() if wrong == "other seed" else z0
    other_latents, other = reference.project(twin, x, z0, cut, 0.6)
    assert ((other - errors).abs() / errors).median() > 1e-3
    assert (other_latents - latents).abs().max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(images: Tensor, backend: str, dtype: torch.dtype) -> None:
    projector = make_projector(backend=backend)
    x = images.to(dtype)
    p = projector.project(x)
    assert isinstance(p, Projection)
    assert p.images.shape == x.shape
    assert p.images.dtype == dtype
    assert p.latents.shape == (4, K)
    assert p.errors.shape == p.restarts.shape == (4,)
    assert p.all_errors.shape == (4, 3)
    assert p.latents.dtype == p.errors.dtype == p.all_errors.dtype == torch.float32
    assert p.restarts.dtype == torch.int64
    assert all(t.device == x.device for t in p if t is not None)
    assert torch.equal(projector(x), p.images)
    # The work is in float32 whatever the images' dtype: only the result is rounded.
    assert torch.equal(projector(x.float()).to(dtype), p.images)
    if dtype == torch.float32:
        assert projector.precision_for(x) == "float32"


def test_float64_generators_run_on_the_reference_path(images: Tensor) -> None:
    generator = make_generator().double()
    projector = make_projector(generator)
    x = images.double()
    p = projector.project(x)
    assert p.images.dtype == torch.float64
    assert projector.precision_for(x) == "float64"
    assert projector.backend_for(x) == "reference"
    z0 = starting_points(0, 3, K).double()
    _, errors = reference.project(generator, x, z0, [8.0] * 4 + [0.8], 0.7)
    torch.testing.assert_close(p.all_errors, errors, rtol=1e-9, atol=1e-12)


def test_float64_generator_takes_float32_images(images: Tensor) -> None:
    p = make_projector(make_generator().double()).project(images)
    assert p.images.dtype == torch.float32
    torch.testing.assert_close(p.images, make_projector()(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kernels
def test_sixteen_bit_generators(images: Tensor, dtype: torch.dtype) -> None:
    """Their weights are used as they are, the arithmetic stays in float32."""
    generator = make_generator().to(dtype)
    rounded = copy.deepcopy(generator).float()
    assert same(make_projector(generator).project(images), make_projector(rounded).project(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_channels(backend: str) -> None:
    torch.manual_seed(5)
    generator = nn.Sequential(
        nn.ConvTranspose2d(K, 9, 4), nn.ReLU(), nn.ConvTranspose2d(9, 3, 4, 2, 1), nn.Tanh()
    )
    scale_up(generator)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    p = make_projector(generator, backend=backend).project(x)
    assert p.images.shape == x.shape
    _, errors = reference.project(
        lambda z: generator(z[:, :, None, None]), x, starting_points(0, 3, K), [8.0] * 4 + [0.8], 0.7
    )
    torch.testing.assert_close(p.all_errors, errors, rtol=1e-3, atol=1e-6)


def test_repr_says_what_it_is() -> None:
    text = repr(make_projector(steps=17, seed=5))
    assert "steps=17" in text
    assert "seed=5" in text


def test_defaults_are_the_contracts() -> None:
    p = Projector(make_generator())
    got = (
        p.steps,
        p.restarts,
        p.lr,
        p.momentum,
        p.lr_decay,
        p.decay_at,
        p.seed,
        p.precision,
        p.gradient,
        p.backend,
    )
    assert got == (200, 10, 10.0, 0.7, 0.1, 0.8, 0, "auto", "straight_through", "auto")
    assert p.max_rows is None
    assert p.validate is None
    with pytest.raises(TypeError):
        Projector(make_generator(), 100)  # everything but the generator is a keyword
