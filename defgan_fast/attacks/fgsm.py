"""The fast gradient sign method: one step of size epsilon along the sign of the loss's gradient."""

from __future__ import annotations

import torch
from torch import nn

from defgan_fast.attacks._budget import Budget, check
from defgan_fast.attacks._meter import Meter, Progress
from defgan_fast.attacks._objective import Objective


def fgsm(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float = 0.3,
    value_range: tuple[float, float] = (0.0, 1.0),
    *,
    norm: str = "linf",
    loss: str = "cross_entropy",
    targeted: bool = False,
    eot: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """FGSM of "Explaining and harnessing adversarial examples" (Goodfellow, Shlens, Szegedy, ICLR 2015).

    Equation 1 of the Defense-GAN paper: x + epsilon * sign(gradient of J(x, y) with respect to x), clipped to
    the pixel range. With ``norm="l2"`` the step is epsilon along the gradient itself. There is one step only, so
    it is returned whether or not it breaks the image.

    Args:
        model: images to logits [N, classes]; attacked in the mode that it is in (call ``eval()`` first).
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: largest change in the norm, at least 0.
        value_range: (low, high) of the pixels.
        norm: "linf" or "l2".
        loss: "cross_entropy" or "margin".
        targeted: descend to the class of ``labels`` instead of leaving it.
        eot: copies of every image in the query, whose gradients are averaged; above 1 for randomised defences.
        seed: not used, nothing is drawn; it is here because every attack takes one.
        progress: called with (done, total) when the step is made.

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
    check(images, labels, epsilon, value_range, norm)
    objective = Objective(model, loss, targeted, eot)
    images = images.detach()
    meter = Meter(progress, len(images))
    if len(images) == 0:
        return images.clone()
    gradients = objective.differentiate(images, labels, first=True).gradients
    assert gradients is not None
    step = epsilon * Budget(norm, epsilon, value_range).ascent(gradients)
    meter.finish()
    return (images + step).clamp(*value_range)
