"""A plan in plain PyTorch: the check of a lowering, and the path of gradients through all steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .layers import Layer, Plan


def interpret(plan: Plan, tensors: Sequence[Tensor], latents: Tensor) -> Tensor:
    """Returns the images of latents, differentiably.

    Args:
        plan: the lowered generator.
        tensors: its parameters, as the plan numbers them.
        latents: [N, k], of any floating dtype, to which parameters are converted.

    Returns:
        [N, C, H, W], in the latents' dtype.
    """
    x = latents.reshape(len(latents), *plan.layers[0].shape_in)

    def parameter(index: int) -> Tensor | None:
        return None if index < 0 else tensors[index].to(x.dtype)

    for layer in plan.layers:
        x = KINDS[layer.kind](layer, x, parameter(layer.weight), parameter(layer.bias))
        if layer.norm is not None:
            x = _normalised(layer, x, *map(parameter, layer.norm))
        x = ACTIVATIONS[layer.activation].apply(x, layer.slope)
    return x.reshape(len(x), *plan.image_shape)


def _linear(layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    return F.linear(x.flatten(1), weight, bias).reshape(len(x), *layer.shape_out)


def _conv_transpose(layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    (_, height, width), (top, left) = layer.shape_out, layer.pad
    x = F.conv_transpose2d(x, weight, stride=layer.stride)
    # Output o is position o + pad of the full one; past its end there is nothing but the bias.
    x = F.pad(x, (-left, width + left - x.shape[3], -top, height + top - x.shape[2]))
    return x if bias is None else x + bias[:, None, None]


def _conv(layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    (_, height, width), (top, left) = layer.shape_out, layer.pad
    x = x.repeat_interleave(layer.upsample[0], 2).repeat_interleave(layer.upsample[1], 3)
    right = layer.stride[1] * (width - 1) + layer.kernel[1] - left - x.shape[3]
    below = layer.stride[0] * (height - 1) + layer.kernel[0] - top - x.shape[2]
    return F.conv2d(F.pad(x, (left, right, top, below)), weight, bias, stride=layer.stride)


def _map(layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    (_, height, width), (top, left) = layer.shape_out, layer.pad
    rows = (torch.arange(height, device=x.device) + top) // layer.upsample[0]
    columns = (torch.arange(width, device=x.device) + left) // layer.upsample[1]
    return x[:, :, rows][:, :, :, columns]


def _reorder(layer: Layer, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.reshape(len(x), *layer.shape_out)


KINDS: dict[str, Callable[[Layer, Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "linear": _linear,
    "conv_transpose": _conv_transpose,
    "conv": _conv,
    "map": _map,
    "reorder": _reorder,
}
"""What each kind of layer does to [N, *shape_in] with its weight and bias, before norm and activation."""


def _normalised(
    layer: Layer,
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    assert mean is not None
    assert variance is not None
    scale = (variance + layer.eps).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    per_element = mean.numel() == math.prod(layer.shape_out)
    form = layer.shape_out if per_element else (layer.shape_out[0], 1, 1)
    return x * scale.reshape(form) + shift.reshape(form)
