"""Counts the useful work of a projection, from the network alone and independently of the kernels.

A multiply-add is useful if it is between an input element and a weight that really exists: taps that fall
on padding, on a crop or between the elements of a strided input are not counted, whoever computes them.
Nearest upsampling followed by a convolution counts as the convolution over the small input that it is equal
to. So all backends are credited with the same work, and the share of the machine's peak is not flattered by
zeros.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from defgan_fast.benchmark.generators import Crop


def flop_per_step(generator: nn.Module, latent_size: int) -> int:
    """FLOP of one row and one step, forward pass and gradient with respect to z; two per multiply-add."""
    return 4 * multiply_adds(generator, latent_size)


def multiply_adds(generator: nn.Module, latent_size: int) -> int:
    """Useful multiply-adds of one forward pass of one latent.

    Args:
        generator: any module made of Linear, Conv2d, ConvTranspose2d, nearest Upsample, a Crop directly after a
            convolution, and layers that do not multiply by a matrix; called once with a zero latent.
        latent_size: k.
    """
    total = 0
    factors = (1, 1)  # of an Upsample since the last layer with a matrix
    last: tuple[nn.Module, torch.Size, tuple[int, int], int] | None = None  # and its count

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total, factors, last
        size_in, size_out = inputs[0].shape[2:], output.shape[2:]
        if isinstance(layer, nn.Upsample):
            factors = (factors[0] * size_out[0] // size_in[0], factors[1] * size_out[1] // size_in[1])
            return
        if isinstance(layer, Crop):
            assert last is not None, "a crop follows the convolution whose output it cuts"
            layer, size_in, factors, counted = last
            total -= counted
        if isinstance(layer, nn.Linear):
            total += layer.in_features * layer.out_features
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            pairs = math.prod(
                _pairs(layer, axis, size_in[axis], size_out[axis], factors[axis]) for axis in (0, 1)
            )
            counted = pairs * layer.in_channels * layer.out_channels // layer.groups
            total += counted
            last = (layer, size_in, factors, counted)
        factors = (1, 1)

    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Upsample, Crop)
    hooks = [layer.register_forward_hook(count) for layer in generator.modules() if isinstance(layer, kinds)]
    try:
        parameter = next(generator.parameters())
        with torch.no_grad():
            generator(torch.zeros(1, latent_size, dtype=parameter.dtype, device=parameter.device))
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _pairs(layer: nn.Conv2d | nn.ConvTranspose2d, axis: int, size_in: int, size_out: int, factor: int) -> int:
    """The pairs (input element, output element) of one axis that a weight connects."""
    kernel, stride, padding = layer.kernel_size[axis], layer.stride[axis], layer.padding[axis]
    if isinstance(padding, str):
        raise ValueError(f"padding must be given as numbers, got '{padding}'")
    if isinstance(layer, nn.ConvTranspose2d):
        reached = ((i, stride * i + tap - padding) for i in range(size_in) for tap in range(kernel))
        return len({(i // factor, o) for i, o in reached if 0 <= o < size_out})
    read = ((stride * o + tap - padding, o) for o in range(size_out) for tap in range(kernel))
    return len({(i // factor, o) for i, o in read if 0 <= i < size_in})
