"""A small projector, images near its generator's range, and comparisons that the projector's tests share."""

from __future__ import annotations

import pytest
import torch
from generators import PaperGenerator, scale_up
from torch import Tensor, nn

from defgan_fast import Projection, Projector
from defgan_fast.kernels import ops

kernels = pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")
# What holds on both paths is tested on both: the reference path is all there is without a compiler.
BACKENDS = [pytest.param("cpu", marks=kernels), "reference"]
K = 8


def make_generator(end: nn.Module | None = None) -> PaperGenerator:
    """Returns the paper's geometry, small, with weights that make its images depend on the latent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        generator = PaperGenerator(latent_size=K, width=4)
        scale_up(generator)
    if end is not None:
        generator.convolutions[-1] = end
    return generator.eval()


def make_images(generator: nn.Module, count: int = 4) -> Tensor:
    """Returns images near the generator's range."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        images = generator(torch.randn(count, K, generator=rng) * 0.7)
        return (images + 0.05 * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def make_projector(generator: nn.Module | None = None, **arguments) -> Projector:
    arguments = {"steps": 5, "restarts": 3, "lr": 8.0, **arguments}
    return Projector(make_generator() if generator is None else generator, **arguments)


def same(a: Projection, b: Projection) -> bool:
    return all(
        (x is None and y is None) or (torch.equal(x, y) and x.dtype == y.dtype)
        for x, y in zip(a, b, strict=True)
    )


def at(projection: Projection, index: slice | list[int]) -> Projection:
    """Returns the projection of some of the images."""
    return Projection(*(None if field is None else field[index] for field in projection))


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert "\n" not in text, f"an error message is one line: {text}"
    return text
