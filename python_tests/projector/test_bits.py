"""The same bits whatever the batch, `max_rows`, the number of threads, the layout; seeds and starting points."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from projectors import BACKENDS, K, at, kernels, make_generator, make_images, make_projector, same
from torch import Tensor

from defgan_fast.starts import starting_points


@kernels
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_image_has_the_bits_that_it_has_in_a_batch(
    images: Tensor, precision: str, dtype: torch.dtype
) -> None:
    projector = make_projector(precision=precision)
    x = images.to(dtype)
    whole = projector.project(x)
    for i in range(len(x)):
        assert same(projector.project(x[i : i + 1]), at(whole, slice(i, i + 1)))
        assert torch.equal(projector(x[i : i + 1])[0], whole.images[i])
    assert same(projector.project(x.flip(0)), at(whole, [3, 2, 1, 0]))


@kernels
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_max_rows_or_threads(images: Tensor, precision: str) -> None:
    generator = make_generator()
    whole = make_projector(generator, precision=precision).project(images)
    before = torch.get_num_threads()
    try:
        for threads, max_rows in ((1, None), (2, None), (5, None), (2, 1), (1, 2), (2, 4), (1, 7), (2, 1000)):
            torch.set_num_threads(threads)
            projector = make_projector(generator, precision=precision, max_rows=max_rows)
            assert same(projector.project(images), whole), f"{threads} threads, max_rows={max_rows}"
            one = projector.project(images[3:])
            assert same(one, at(whole, slice(3, None))), f"{threads} threads, max_rows={max_rows}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("max_rows", [1, 2, 5])
def test_max_rows_on_the_reference_path(images: Tensor, max_rows: int) -> None:
    """The same values; bits are not promised there."""
    whole = make_projector(backend="reference").project(images)
    parts = make_projector(backend="reference", max_rows=max_rows).project(images)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_seed_same_bits(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend, seed=21)
    first = projector.project(images)
    torch.manual_seed(1234)
    assert same(projector.project(images), first)
    assert same(make_projector(backend=backend, seed=21).project(images), first)
    assert same(make_projector(backend=backend, seed=2).project(images, seed=21), first)
    assert same(projector.project(images, z0=starting_points(21, 3, K)), first)
    other = make_projector(backend=backend, seed=22).project(images)
    assert not torch.equal(other.all_errors, first.all_errors)
    assert same(projector.project(images, seed=22), other)
    assert same(projector.project(images), first), "the seed of one call must not stay"


@kernels
def test_more_restarts_keep_the_first_ones(images: Tensor) -> None:
    few, many = make_projector(restarts=2).project(images), make_projector(restarts=6).project(images)
    assert torch.equal(many.all_errors[:, :2], few.all_errors)
    assert (many.errors <= few.errors).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_seed_points_are_fresh_but_reproducible(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend, seed=None)
    torch.manual_seed(5)
    first, second = projector.project(images), projector.project(images)
    assert not torch.equal(first.all_errors, second.all_errors)
    torch.manual_seed(5)
    assert same(projector.project(images), first)
    assert same(projector.project(images, seed=4), make_projector(backend=backend, seed=4).project(images))
    twice = projector.project(images[:1].expand(2, -1, -1, -1))
    assert not torch.equal(twice.all_errors[0], twice.all_errors[1]), "each image must get points of its own"


def test_fresh_points_are_normal_over_root_k() -> None:
    """With a rate that moves nothing, the latents that come back are the starting points."""
    generator = make_generator()
    x = make_images(generator, 40)
    projector = make_projector(generator, seed=None, steps=1, restarts=1, lr=1e-12)
    z = torch.cat([projector.project(x).latents for _ in range(5)]).flatten() * math.sqrt(K)
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / len(z))


@pytest.mark.parametrize("backend", BACKENDS)
def test_starting_points_shared_and_per_image(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend)
    z0 = torch.randn(2, K)  # its own R: 2, not 3
    shared = projector.project(images, z0=z0)
    assert shared.all_errors.shape == (4, 2)
    assert same(projector.project(images, z0=z0.expand(4, 2, K)), shared)
    own = torch.randn(4, 2, K)
    own[2] = z0
    got = projector.project(images, z0=own)
    torch.testing.assert_close(got.all_errors[2], shared.all_errors[2], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(got.all_errors[1], shared.all_errors[1], rtol=1e-3)
    assert same(projector.project(images, z0=own.transpose(0, 1).contiguous().transpose(0, 1)), got)
    if backend == "cpu":
        for i in range(4):
            one = projector.project(images[i : i + 1], z0=own[i])
            assert same(one, at(got, slice(i, i + 1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_images_does_not_matter(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend)
    expected = projector.project(images)
    wide = torch.zeros(4, 1, 28, 56)
    wide[..., ::2] = images
    for x in (
        images.to(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        wide[..., ::2],
        images.flip(0).flip(0),
    ):
        assert same(projector.project(x), expected)
    assert same(
        projector.project(images[:1].expand(4, -1, -1, -1)), projector.project(images[:1].repeat(4, 1, 1, 1))
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled", "none"])
def test_an_empty_batch(images: Tensor, backend: str, gradient: str) -> None:
    projector = make_projector(backend=backend, gradient=gradient)
    for x in (images[:0], images[:0].clone().requires_grad_()):
        p = projector.project(x)
        assert p.images.shape == (0, 1, 28, 28)
        assert p.latents.shape == (0, K)
        assert p.errors.shape == p.restarts.shape == (0,)
        assert p.all_errors.shape == (0, 3)
    if gradient != "none":
        p.images.sum().backward()
        assert x.grad.shape == x.shape
    make_projector(backend=backend, seed=None)(images[:0])
    projector.project(images[:0], z0=torch.randn(0, 3, K))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled", "none"])
def test_images_are_left_alone(images: Tensor, backend: str, gradient: str) -> None:
    projector = make_projector(backend=backend, gradient=gradient)
    for needs in (False, True):
        x = images.clone().requires_grad_(needs)
        version = x._version
        out = projector(x)
        assert torch.equal(x, images)
        assert x._version == version
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        with torch.no_grad():
            out.zero_()
        assert torch.equal(x, images)
    z0 = starting_points(0, 3, K)
    kept = z0.clone()
    p = projector.project(images, z0=z0)
    p.latents.zero_()
    assert torch.equal(z0, kept)
    assert torch.equal(projector.project(images).all_errors, p.all_errors)


PEAK = """
import resource, sys, torch

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(2)
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
sys.path.insert(0, sys.argv[1])
from generators import PaperGenerator
from defgan_fast import Projector
projector = Projector(PaperGenerator(128, 64), steps=1, restarts=10, backend="cpu")
projector(torch.rand(200, 1, 28, 28))
print(peak() - before)
"""


@kernels
def test_peak_memory() -> None:
    """200 images x 10 restarts of the paper's generator: 300 MB above torch at most."""
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(Path(__file__).parents[1])],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert float(out) < 300, f"{out} MB"
