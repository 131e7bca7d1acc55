"""The gradient that all gradient attacks share, and the checks of their arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def check(
    images: torch.Tensor, labels: torch.Tensor, epsilon: float, value_range: tuple[float, float]
) -> None:
    """Raise ValueError, naming the argument, where an attack could not mean what it computes."""
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{len(images)}], got {labels.dtype} {tuple(labels.shape)}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, got {epsilon}")
    if not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")


def loss_gradient(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradient of the cross-entropy with respect to the images, [N, C, H, W].

    The losses are summed over the batch, so that an image's gradient does not depend on its neighbours.
    Parameters collect no gradients, and the surrounding ``no_grad`` of a caller does not matter.

    Raises:
        RuntimeError: the model's output does not depend on the images differentiably: an attack by a
            gradient of zeros would report any defence as perfect.
    """
    with torch.enable_grad():
        variable = images.detach().clone().requires_grad_()
        loss = F.cross_entropy(model(variable), labels, reduction="sum")
        if not loss.requires_grad:
            raise RuntimeError("model must pass gradients to its images, got a detached output")
        (gradient,) = torch.autograd.grad(loss, variable, allow_unused=True)
    if gradient is None:
        raise RuntimeError(
            "model must pass gradients to its images, got an output that does not depend on them"
        )
    return gradient
