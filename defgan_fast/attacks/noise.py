"""Plain random noise: what an attack must beat to be one, and what a defence must stand anyway."""

from __future__ import annotations

import torch
from torch import nn

from defgan_fast import arguments
from defgan_fast.attacks._budget import Budget, check
from defgan_fast.attacks._meter import Meter, Progress
from defgan_fast.attacks._objective import Objective
from defgan_fast.attacks._record import Record
from defgan_fast.attacks._streams import Streams, random_step

KINDS = ("sign", "uniform")


def noise(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float = 0.3,
    *,
    norm: str = "linf",
    kind: str = "sign",
    tries: int = 10,
    early_stop: bool = True,
    targeted: bool = False,
    eot: int = 1,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> torch.Tensor:
    """Random noise of the full budget, the sanity check of "On evaluating adversarial robustness" (Carlini et al.).

    A gradient attack that breaks fewer images than this one is not working.

    Args:
        model: images to logits [N, classes]; attacked in the mode that it is in (call ``eval()`` first).
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: size of the noise in the norm, at least 0.
        norm: "linf" or "l2".
        kind: for l-infinity "sign", every pixel by plus or minus epsilon, or "uniform" in between; for l2 the
            direction is uniform in either case.
        tries: draws for each image, of which the best is returned.
        early_stop: an image that is broken is dropped from the work; False looks for a higher margin.
        targeted: labels are classes to reach.
        eot: copies of every image in each query; above 1 for randomised defences.
        seed: with an image's pixels it decides the image's noise.
        value_range: (low, high) of the pixels.
        progress: called with (done, total) after every draw.

    Returns:
        [N, C, H, W], detached: the noisy image of the largest margin.

    Raises:
        ValueError: an argument does not fit.

    Example:
        >>> noisy = noise(classifier, images, labels, epsilon=0.3, tries=100)
    """
    check(images, labels, epsilon, value_range, norm)
    arguments.choice("kind", kind, KINDS)
    arguments.count("tries", tries)
    objective, budget = Objective(model, "margin", targeted, eot), Budget(norm, epsilon, value_range)
    images = images.detach()
    record, streams = Record(images), Streams(images, seed, "noise")
    meter = Meter(progress, len(images) * tries)
    rows = torch.arange(len(images), device=images.device)
    for number in range(tries):
        if early_stop:
            rows = rows[~record.broken[rows]]
        if len(rows) == 0:
            break
        points = budget.project(
            images[rows] + random_step(images[rows], rows, streams, budget, kind), images[rows]
        )
        answer = objective.ask(points, labels[rows])
        record.offer(rows, points, answer.wrong, answer.scores, budget.holds(points, images[rows]))
        meter.at((number + 1) * len(images))
    meter.finish()
    return record.points
