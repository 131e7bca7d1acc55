"""The fast gradient sign method: one step of size epsilon along the sign of the loss's gradient."""

from __future__ import annotations

import torch
from torch import nn

from defgan_fast.attacks._gradient import check, loss_gradient


def fgsm(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float = 0.3,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """FGSM of "Explaining and harnessing adversarial examples" (Goodfellow, Shlens, Szegedy, ICLR 2015).

    Equation 1 of the Defense-GAN paper: x + epsilon * sign(gradient of J(x, y) with respect to x), clipped to
    the pixel range. Norm: l-infinity. Untargeted.

    Args:
        model: images to logits [N, classes]; attacked in the mode that it is in (call ``eval()`` first).
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes.
        epsilon: largest change of a pixel, at least 0.
        value_range: (low, high) of the pixels.

    Returns:
        [N, C, H, W], detached. A pixel whose gradient is zero stays as it is.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: the model passes no gradient to its images.

    Example:
        >>> adversarial = fgsm(classifier, images, labels, epsilon=0.3)
        >>> (adversarial - images).abs().max() <= 0.3
        tensor(True)
    """
    check(images, labels, epsilon, value_range)
    step = epsilon * loss_gradient(model, images, labels).sign()
    return (images.detach() + step).clamp(*value_range)
