"""The critic's gradients in WGAN-GP, penalty included, without differentiating a backward pass.

Let g be the critic's gradient at an image x and P(g) the penalty. The chain rule gives
dP/dw = d/dw <g, v> with v = dP/dg held fixed, and <g, v> is the critic's directional derivative at x along v.
Between the kinks of its LeakyReLUs the critic is affine, so that the derivative is the linear network of the
same weights and slopes without biases, applied to v; and what arrives from above at its layers is what
arrived there when g was computed. The penalty therefore costs one more forward pass, of v, and nothing that
real and generated images do not need as well. All three kinds share their passes: forward, down to the
images, and to the weights. A general double backward also sends zeros, the second derivatives, through every
layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# Of a convolution's three gradients, the one that is wanted.
INPUT = [True, False, False]
WEIGHT = [False, True, False]


class CriticGradients(NamedTuple):
    """What one pass over a batch gives."""

    gradients: list[torch.Tensor]  # one for each parameter of the critic, in their order
    distance: torch.Tensor  # scalar: mean score of real less mean score of generated images
    penalty: torch.Tensor  # scalar: mean of (|g| - 1)^2, not multiplied by the weight


@torch.no_grad()
def critic_gradients(
    critic: nn.Module,
    real: torch.Tensor,
    fake: torch.Tensor,
    between: torch.Tensor,
    weight: float,
    dtype: torch.dtype | None = None,
) -> CriticGradients:
    """Gradients of ``weight * penalty - distance`` (Gulrajani et al., 2017, equation 3).

    Args:
        critic: holds ``layers``, a Sequential of Conv2d, LeakyReLU, Flatten, and one Linear at the end.
        real, fake: [N, C, H, W].
        between: [M, C, H, W] images between real and generated ones, where the penalty is taken.
        weight: of the penalty.
        dtype: of the convolutions (default: the weights' own). Scores, norms and the returned gradients have
            the weights' dtype.
    """
    count, points = len(real), len(between)
    tail = slice(2 * count, None)
    layers = list(critic.layers)  # type: ignore[arg-type]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    activations = [layer for layer in layers if isinstance(layer, nn.LeakyReLU)]
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    assert len(convolutions) == len(activations)
    full = last.weight.dtype
    dtype = dtype or full
    weights = [layer.weight.to(dtype) for layer in convolutions]

    # maps[i] enters convolution i; the map above it has the signs that its LeakyReLU saw.
    maps = [torch.cat((real, fake, between)).to(dtype)]
    for layer, kernel, activation in zip(convolutions, weights, activations, strict=True):
        bias = None if layer.bias is None else layer.bias.to(dtype)
        x = F.conv2d(maps[-1], kernel, bias, layer.stride, layer.padding)
        maps.append(F.leaky_relu_(x, activation.negative_slope))
    scores = last(maps[-1].flatten(1).to(full))
    score_real, score_fake = scores[:count].mean(), scores[count : 2 * count].mean()

    # Down: what a score's change is worth to the distance, and for the points between one each.
    signal = torch.ones_like(scores)
    signal[:count] = -1 / count
    signal[count : 2 * count] = 1 / count
    arriving: list[torch.Tensor] = []
    down = (signal * last.weight).view_as(maps[-1]).to(dtype)
    for index in reversed(range(len(convolutions))):
        arriving.insert(0, _through(down, maps[index + 1], activations[index]))
        # Below the lowest layer only the points between need a gradient.
        part = tail if index == 0 else slice(None)
        down = _backward(arriving[0][part], maps[index][part], weights[index], convolutions[index], INPUT)[0]

    # The square root has no finite derivative at zero.
    down = down.to(full)
    norms = (down.flatten(1).square().sum(1) + 1e-12).sqrt()
    penalty = (norms - 1).square().mean()
    along = (down * (weight * 2 * (norms - 1) / (norms * points)).view(-1, 1, 1, 1)).to(dtype)

    # To the weights: the points between enter with the tangent in place of the activation.
    gradients: list[torch.Tensor] = []
    for index, layer in enumerate(convolutions):
        maps[index][tail] = along
        along = F.conv2d(along, weights[index], None, layer.stride, layer.padding)
        along = _through(along, maps[index + 1][tail], activations[index])
        came = arriving[index]
        gradients.append(_backward(came, maps[index], weights[index], layer, WEIGHT)[1].to(full))
        gradients.append(came[: 2 * count].sum((0, 2, 3), dtype=full))
    maps[-1][tail] = along
    gradients.append(signal.t() @ maps[-1].flatten(1).to(full))
    gradients.append(signal[: 2 * count].sum(0))
    return CriticGradients(gradients, score_real - score_fake, penalty)


def _through(change: torch.Tensor, above: torch.Tensor, activation: nn.LeakyReLU) -> torch.Tensor:
    """``change`` times the slopes of the LeakyReLU whose output is ``above``; the same in both directions."""
    return torch.ops.aten.leaky_relu_backward(change, above, activation.negative_slope, True)


def _backward(
    arriving: torch.Tensor, given: torch.Tensor, kernel: torch.Tensor, layer: nn.Conv2d, wanted: list[bool]
) -> tuple[torch.Tensor, ...]:
    shape = (layer.stride, layer.padding, layer.dilation, False, [0, 0], 1)
    return torch.ops.aten.convolution_backward(arriving, given, kernel, None, *shape, wanted)
