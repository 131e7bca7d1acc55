"""What is changed after construction is noticed, what is wrong is said at construction."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from projectors import BACKENDS, K, kernels, make_generator, make_images, make_projector, one_line, same
from torch import Tensor, nn

from defgan_fast import Projector
from defgan_fast.plan import structure_of


def stack(slope: float = 0.2) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(K, 12), nn.LeakyReLU(slope), nn.Linear(12, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4))
    ).eval()


def replace_layer(projector: Projector) -> None:
    torch.manual_seed(6)
    projector.generator[2] = nn.Linear(12, 16, bias=False)


def change_slope(projector: Projector) -> None:
    projector.generator[1].negative_slope = 0.9


def exchange_activation(projector: Projector) -> None:
    projector.generator[1] = nn.ReLU()


def add_hook(projector: Projector) -> None:
    projector.generator[1].register_forward_hook(lambda module, inputs, output: output * 0.5)


CHANGES = [replace_layer, change_slope, exchange_activation, add_hook]


@pytest.mark.filterwarnings("ignore:running on the reference path")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_generator_is_noticed(change) -> None:
    projector = make_projector(stack())
    images = torch.rand(3, 1, 4, 4)
    before = projector.project(images)
    change(projector)
    after = projector.project(images)
    assert not same(before, after)
    expected = projector.generator(after.latents).detach()
    torch.testing.assert_close(after.images, expected, rtol=1e-5, atol=1e-6)
    assert same(after, make_projector(projector.generator).project(images))


def test_a_structure_is_the_same_until_it_changes() -> None:
    generator = stack()
    before = structure_of(generator)
    with torch.no_grad():
        generator[0].weight.mul_(2)
    assert structure_of(generator) == structure_of(copy.deepcopy(generator)) == before
    assert structure_of(pickle.loads(pickle.dumps(generator))) == before
    assert structure_of(stack(0.3)) != before


@kernels
def test_a_changed_backend_is_noticed() -> None:
    projector, images = make_projector(), make_images(make_generator())
    assert projector.backend_for(images) == "cpu"
    projector.backend = "reference"
    assert same(projector.project(images), make_projector(backend="reference").project(images))
    assert projector.backend_for(images) == "reference"
    projector.backend = "auto"
    assert same(projector.project(images), make_projector().project(images))
    projector.backend = "gpu"
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*, got 'gpu'"):
        projector(images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_seed_or_count_of_restarts_is_noticed(backend: str) -> None:
    projector, images = make_projector(backend=backend), make_images(make_generator())
    projector.seed, projector.restarts = 9, 2
    expected = make_projector(backend=backend, seed=9, restarts=2).project(images)
    assert same(projector.project(images), expected)


@kernels
def test_why_the_reference_path_is_taken() -> None:
    assert make_projector().why_reference is None
    assert make_projector(backend="reference").why_reference == "the reference backend was asked for"
    refused = make_projector(nn.Sequential(stack(), nn.Softplus()))
    assert refused.why_reference == (
        "generator Sequential cannot be lowered: layer '1' (Softplus) is not supported"
    )
    assert make_projector(stack().double()).why_reference == "generator Sequential is float64"


@kernels
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled"])
def test_float64_images_of_a_float32_generator_take_the_kernels(gradient: str) -> None:
    projector = make_projector(gradient=gradient)
    images = make_images(make_generator())
    double = images.double().requires_grad_()
    assert projector.backend_for(double) == "cpu"
    assert projector.precision_for(double) == "float32"
    found, expected = projector.project(double), projector.project(images)
    assert found.images.dtype == torch.float64
    assert torch.equal(found.images, expected.images.double())
    for one, other in zip(found[1:5], expected[1:5], strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    z0 = torch.randn(len(images), 2, K, dtype=torch.float64)
    assert torch.equal(
        projector.project(double, z0=z0).latents, projector.project(images, z0=z0.float()).latents
    )
    found.images.sum().backward()
    assert double.grad is not None
    assert double.grad.dtype == torch.float64
    assert (double.grad != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_starting_points_of_an_encoder_are_not_taken_as_restarts(backend: str) -> None:
    projector, images = make_projector(backend=backend), make_images(make_generator())
    z0 = torch.randn(len(images), K)
    with pytest.raises(
        ValueError, match=rf"z0 must .*got \[4, {K}\] for 4 images: pass z0\[:, None\]"
    ) as caught:
        projector.project(images, z0=z0)
    one_line(caught)
    for index, each in enumerate(projector.project(images, z0=z0[:, None]).latents):
        alone = projector.project(images[index : index + 1], z0=z0[index : index + 1])
        torch.testing.assert_close(each, alone.latents[0])
    shared = z0.expand(len(images), -1, -1)
    assert projector.project(images, z0=shared).all_errors.shape == (4, 4)
    assert same(
        make_projector(backend=backend, restarts=4).project(images, z0=z0),
        projector.project(images, z0=shared),
    )


@pytest.mark.parametrize(
    ("argument", "most"), [("steps", 1_000_000), ("restarts", 65_536), ("max_rows", 2**31 - 1)]
)
def test_sizes_beyond_every_use_are_refused(argument: str, most: int) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} must be at most {most}, got {2**40}$"):
        make_projector(**{argument: 2**40})


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(K, 16)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.linear(z).view(-1, 1, 4, 4) + labels


def test_a_conditional_generator_is_refused_at_construction() -> None:
    with pytest.raises(
        TypeError, match=r"generator Conditional must take latents alone.*'labels'.*wrap"
    ) as caught:
        make_projector(Conditional())
    one_line(caught)


@pytest.mark.filterwarnings("ignore:running on the reference path")
def test_a_generator_that_fails_says_why() -> None:
    classifier = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(4 * 24 * 24, 10))
    projector = make_projector(classifier)
    assert "with latents [3, 1] it raises RuntimeError: " in (projector.why_reference or "")
    with pytest.raises(
        ValueError, match=r"Sequential does not tell its latent size \(with latents .*pass z0"
    ) as caught:
        projector(torch.rand(2, 1, 28, 28))
    one_line(caught)


def test_autocast_in_float16_is_named() -> None:
    images = make_images(make_generator())
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(ValueError, match=r"^autocast must be in bfloat16"),
    ):
        make_projector()(images)
