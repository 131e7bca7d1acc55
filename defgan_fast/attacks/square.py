"""The Square attack: random search with squares of colour, which needs the logits and no gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from defgan_fast import arguments
from defgan_fast.attacks._budget import Budget, check
from defgan_fast.attacks._meter import Meter, Progress
from defgan_fast.attacks._objective import Answer, Objective
from defgan_fast.attacks._record import Record
from defgan_fast.attacks._streams import Streams

# The share of pixels in a square is halved when so many of 10,000 queries are spent (the authors' schedule, which
# shrinks with the number of queries).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float = 0.3,
    *,
    queries: int = 1000,
    first_share: float = 0.8,
    early_stop: bool = True,
    targeted: bool = False,
    eot: int = 1,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> Tensor:
    """Square Attack of Andriushchenko, Croce, Flammarion, Hein, "Square Attack" (ECCV 2020).

    Begins with vertical stripes of plus or minus epsilon, then moves squares of pixels to plus or minus epsilon,
    each channel by its own sign, and keeps what raises the margin. Norm: l-infinity. Score-based: it asks for
    logits only, so that a masked gradient does not hinder it. Where it beats a gradient attack, that attack's
    gradient is at fault.

    Args:
        model: images to logits [N, classes]; attacked in the mode that it is in (call ``eval()`` first).
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: largest change of a pixel, at least 0.
        queries: for each image, at least 1.
        first_share: share of the pixels that the first squares cover, in (0, 1]; AutoAttack's 0.8.
        early_stop: an image that is broken is dropped from the work; False looks for a higher margin.
        targeted: labels are classes to reach.
        eot: copies of every image in each query, whose margins are averaged; above 1 for randomised defences.
        seed: with an image's pixels it decides the image's squares.
        value_range: (low, high) of the pixels.
        progress: called with (done, total) after every query.

    Returns:
        [N, C, H, W], detached: the point of the largest margin.

    Raises:
        ValueError: an argument does not fit.

    Example:
        >>> adversarial = square(classifier, images, labels, epsilon=0.3, queries=5000)
    """
    check(images, labels, epsilon, value_range)
    arguments.count("queries", queries)
    arguments.number("first_share", first_share, above=0)
    if first_share > 1:
        raise ValueError(f"first_share must be at most 1, got {first_share}")
    images = images.detach()
    budget, record = Budget("linf", epsilon, value_range), Record(images)
    objective, streams = Objective(model, "margin", targeted, eot), Streams(images, seed, "square")
    meter = Meter(progress, len(images) * queries)
    rows = torch.arange(len(images), device=images.device)
    for query in range(queries):
        if early_stop:
            rows = rows[~record.broken[rows]]
        if len(rows) == 0:
            break
        if query == 0:
            points = images[rows] + _stripes(images[rows], rows, streams, epsilon)
        else:
            share = first_share * share_left(query, queries)
            points = record.points[rows] + _squares(images[rows], rows, streams, epsilon, share)
        points = budget.project(points, images[rows])
        answer: Answer = objective.ask(points, labels[rows])
        record.offer(rows, points, answer.wrong, answer.scores, budget.holds(points, images[rows]))
        meter.at((query + 1) * len(images))
    meter.finish()
    return record.points


def share_left(query: int, queries: int) -> float:
    """Returns the factor on the share of pixels at a query: one half to the number of halvings behind it."""
    spent = 10_000 * query // queries
    return 0.5 ** sum(spent > halving for halving in HALVINGS)


def _stripes(images: Tensor, rows: Tensor, streams: Streams, epsilon: float) -> Tensor:
    """A change of plus or minus epsilon, one sign for each channel and column, [M, C, 1, W]."""
    _, channels, _, width = images.shape
    signs = (streams.uniform(rows, (channels, 1, width)) - 0.5).sign()
    return (epsilon * signs).to(images)


def _squares(images: Tensor, rows: Tensor, streams: Streams, epsilon: float, share: float) -> Tensor:
    """A change of plus or minus two epsilon inside one square of each image, [M, C, H, W].

    Two epsilon reach the other side of the ball from anywhere in it, so that the square ends at one side.
    """
    _, channels, height, width = images.shape
    side = max(round(math.sqrt(share * height * width)), 1)
    side = min(side, height, width)
    drawn = streams.uniform(rows, (2 + channels,))
    top = (drawn[:, 0] * (height - side + 1)).long().view(-1, 1, 1, 1)
    left = (drawn[:, 1] * (width - side + 1)).long().view(-1, 1, 1, 1)
    line, column = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    inside = (line >= top) & (line < top + side) & (column >= left) & (column < left + side)
    signs = (drawn[:, 2:] - 0.5).sign().view(-1, channels, 1, 1)
    return (2 * epsilon * signs * inside).to(images)
