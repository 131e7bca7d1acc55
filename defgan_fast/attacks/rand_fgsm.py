"""RAND+FGSM: a random step first, so that a masked gradient at the image itself does not stop the attack."""

from __future__ import annotations

import torch
from torch import nn

from defgan_fast.attacks._budget import check
from defgan_fast.attacks._meter import Meter, Progress
from defgan_fast.attacks._objective import Objective
from defgan_fast.attacks._streams import Streams


def rand_fgsm(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float = 0.3,
    *,
    alpha: float = 0.05,
    loss: str = "cross_entropy",
    targeted: bool = False,
    eot: int = 1,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> torch.Tensor:
    """RAND+FGSM of "Ensemble adversarial training" (Tramèr et al., ICLR 2018), as the Defense-GAN paper runs it.

    x' = clip(x + alpha * sign(N(0, I))), then clip(x' + (epsilon - alpha) * sign(gradient of J at x')): the random
    part is taken out of the budget, so that no pixel moves by more than epsilon. Norm: l-infinity.

    Args:
        model: images to logits [N, classes]; attacked in the mode that it is in (call ``eval()`` first).
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: largest change of a pixel, at least ``alpha``.
        alpha: size of the random step, at least 0.
        loss: "cross_entropy" or "margin".
        targeted: descend to the class of ``labels`` instead of leaving it.
        eot: copies of every image in the query, whose gradients are averaged; above 1 for randomised defences.
        seed: with an image's pixels it decides the image's random step.
        value_range: (low, high) of the pixels.
        progress: called with (done, total) when the step is made.

    Returns:
        [N, C, H, W], detached.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: the model passes no gradient to its images.

    Example:
        >>> adversarial = rand_fgsm(classifier, images, labels, epsilon=0.3, alpha=0.05)
    """
    check(images, labels, epsilon, value_range)
    if not 0 <= alpha <= epsilon:
        raise ValueError(f"alpha must lie in [0, epsilon] = [0, {epsilon}], got {alpha}")
    objective = Objective(model, loss, targeted, eot)
    images = images.detach()
    if len(images) == 0:
        return images.clone()
    meter = Meter(progress, len(images))
    rows = torch.arange(len(images))
    signs = (Streams(images, seed, "rand_fgsm").uniform(rows, images.shape[1:]) - 0.5).sign()
    moved = (images + (alpha * signs).to(images)).clamp(*value_range)
    gradients = objective.differentiate(moved, labels, first=True).gradients
    assert gradients is not None
    meter.finish()
    return (moved + (epsilon - alpha) * gradients.sign()).clamp(*value_range)
