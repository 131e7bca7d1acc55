"""Projected gradient descent: many small sign steps, each brought back into the ball around the image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from defgan_fast.attacks._gradient import check, loss_gradient


def pgd(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float = 0.3,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = False,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    on_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """PGD of "Towards deep learning models resistant to adversarial attacks" (Madry et al., ICLR 2018).

    Each step adds ``step_size`` times the sign of the loss's gradient, then clips to the ball of radius
    ``epsilon`` around the image and to the pixel range. Norm: l-infinity. Untargeted. Through a projector
    with the straight-through gradient this is BPDA (Athalye, Carlini, Wagner, ICML 2018).

    Args:
        model: images to logits [N, classes]; attacked in the mode that it is in (call ``eval()`` first).
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes.
        epsilon: radius of the ball, at least 0.
        steps: at least 1.
        step_size: by default 2.5 * epsilon / steps, which can cross the ball.
        random_start: begin at a uniform point of the ball instead of at the image.
        seed: of the random start; the same points on every device.
        value_range: (low, high) of the pixels.
        on_step: called after every step with its number, from 1, to show progress.

    Returns:
        [N, C, H, W], detached: the last point, which is not always the one of largest loss.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: the model passes no gradient to its images.

    Example:
        >>> defended = torch.nn.Sequential(projector, classifier).eval()
        >>> adversarial = pgd(defended, images, labels, epsilon=0.3, steps=10)
        >>> (adversarial - images).abs().max() <= 0.3 + 1e-6
        tensor(True)
    """
    check(images, labels, epsilon, value_range)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if step_size is None:
        step_size = 2.5 * epsilon / steps
    if not step_size >= 0:
        raise ValueError(f"step_size must be at least 0, got {step_size}")
    images = images.detach()
    low = (images - epsilon).clamp(min=value_range[0])
    high = (images + epsilon).clamp(max=value_range[1])
    current = images.clone()
    if random_start:
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        current = current + ((noise * 2 - 1) * epsilon).to(images)
        current = torch.minimum(torch.maximum(current, low), high)
    for step in range(1, steps + 1):
        current = current + step_size * loss_gradient(model, current, labels).sign()
        current = torch.minimum(torch.maximum(current, low), high)
        if on_step:
            on_step(step)
    return current
