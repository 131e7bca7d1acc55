"""What several models share: initialisation, layout in memory, and TensorFlow's SAME padding."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def initialise(model: nn.Module) -> None:
    """He's uniform initialisation with zero biases, as in the improved-WGAN code the paper builds on.

    A stride of s in a transposed convolution means that only 1 / s^2 of the taps meet an output pixel, which
    the fan-in has to count; PyTorch's default leaves such layers with vanishing activations.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fan_in = float(module.in_features)
        elif isinstance(module, nn.Conv2d):
            fan_in = float(module.in_channels * math.prod(module.kernel_size))
        elif isinstance(module, nn.ConvTranspose2d):
            fan_in = module.in_channels * math.prod(module.kernel_size) / math.prod(module.stride)
        else:
            continue
        bound = math.sqrt(6.0 / fan_in)
        nn.init.uniform_(module.weight, -bound, bound)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def initialise_to_unit_norm(model: nn.Module) -> None:
    """Gaussian weights, scaled to a norm of 1 for every output, with zero biases.

    The classifiers of the released code begin like this: with half of :func:`initialise`'s variance.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight)
            with torch.no_grad():
                norms = (module.weight.flatten(1).square().sum(1) + 1e-7).sqrt()
                module.weight.div_(norms.view(-1, *[1] * (module.weight.dim() - 1)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def to_channels_last(model: ModuleT, device: torch.device) -> ModuleT:
    """Move ``model`` with its weights in the layout that convolution libraries compute in.

    Other layouts they reorder at every call. Values, and what is saved, stay the same.
    """
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros that TensorFlow's SAME puts before and after an axis of ``size``; the odd one goes after.

    The output has ceil(size / stride) positions.
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """Conv2d padded like TensorFlow's SAME: ceil(size / stride) outputs, the odd zero right and below.

    PyTorch's own ``padding="same"`` refuses strides, and a symmetric padding cannot place the odd zero.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C', ceil(H / s), ceil(W / s)]."""
        top, bottom = same_padding(input.shape[-2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(input.shape[-1], self.kernel_size[1], self.stride[1])
        return super().forward(F.pad(input, (left, right, top, bottom)))
