"""HopSkipJump: walks along the boundary between two classes, and needs nothing but the class of an image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from defgan_fast import arguments
from defgan_fast.attacks._budget import Budget, check, norms, over_pixels
from defgan_fast.attacks._meter import Meter, Progress
from defgan_fast.attacks._objective import Objective
from defgan_fast.attacks._record import Record
from defgan_fast.attacks._streams import Streams

# The first probe's length in units of the range; later ones are the distance over the number of pixels.
FIRST_PROBE = 0.1
MOST_HALVINGS = 25
ROWS_PER_QUERY = 1024


def hop_skip_jump(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float | None = None,
    *,
    norm: str = "linf",
    steps: int = 10,
    first_probes: int = 100,
    most_probes: int = 10_000,
    start_tries: int = 50,
    starts: Tensor | None = None,
    early_stop: bool = True,
    targeted: bool = False,
    eot: int = 1,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> Tensor:
    """HopSkipJump of "HopSkipJumpAttack: a query-efficient decision-based attack" (Chen et al., IEEE S&P 2020).

    From an image of another class it goes back to the boundary by bisection, estimates the boundary's direction
    from the classes of random probes around that point, steps along it, and repeats. Decision-based: no gradient
    and no logit is used, so that nothing which hides them hinders it. Each step costs about ``first_probes`` *
    sqrt(step) + 20 queries an image.

    Args:
        model: images to logits [N, classes], of which only the largest matters; attacked in the mode that it is in.
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: largest distance in the norm at which an image counts as broken; None: any.
        norm: "linf" or "l2".
        steps: of the walk, at least 0.
        first_probes: probes of the first step; step t takes sqrt(t) times as many.
        most_probes: bound on that number.
        start_tries: images of random noise that are tried as starting points, and the image's negative.
        starts: [N, C, H, W], starting points that are broken already, tried before noise; without them a targeted
            attack depends on noise being taken for the target.
        early_stop: an image that is broken within ``epsilon`` is dropped from the work; False (or no epsilon)
            walks on towards the image.
        targeted: labels are classes to reach.
        eot: copies of every point in each query, all of which must be wrong; above 1 for randomised defences.
        seed: with an image's pixels it decides the image's noise and probes.
        value_range: (low, high) of the pixels.
        progress: called with (done, total) after every step.

    Returns:
        [N, C, H, W], detached: the nearest broken point; the image itself where none is within ``epsilon``.

    Raises:
        ValueError: an argument does not fit.

    Example:
        >>> adversarial = hop_skip_jump(classifier, images, labels, epsilon=0.3, steps=20)
    """
    check(images, labels, epsilon, value_range, norm)
    arguments.count("steps", steps, 0)
    for name, count in (("first_probes", first_probes), ("most_probes", most_probes)):
        arguments.count(name, count)
    arguments.count("start_tries", start_tries, 0)
    if starts is not None and starts.shape != images.shape:
        raise ValueError(
            f"starts must have the images' shape {tuple(images.shape)}, got {tuple(starts.shape)}"
        )
    walk = _Walk(
        Objective(model, "margin", targeted, eot),
        Budget(norm, math.inf if epsilon is None else epsilon, value_range),
        images.detach(),
        labels,
        Streams(images, seed, "hop_skip_jump"),
    )
    meter = Meter(progress, len(images) * (steps + 1))
    rows, points = walk.begin(start_tries, starts)
    points = walk.to_boundary(rows, points)
    meter.at(len(images))
    for step in range(1, steps + 1):
        if early_stop and epsilon is not None:
            going = ~walk.record.broken[rows]
            rows, points = rows[going], points[going]
        if len(rows) == 0:
            break
        probes = min(int(first_probes * math.sqrt(step)), most_probes)
        points = walk.to_boundary(rows, walk.step(rows, points, step, probes))
        meter.at((step + 1) * len(images))
    meter.finish()
    return walk.record.points


class _Walk:
    """One attack on a batch. Points [M, C, H, W] always belong to the images of rows [M]."""

    def __init__(
        self, objective: Objective, budget: Budget, images: Tensor, labels: Tensor, streams: Streams
    ) -> None:
        arguments.choice("norm", budget.norm, ("linf", "l2"))
        self.objective, self.budget, self.images, self.labels = objective, budget, images, labels
        self.streams, self.record = streams, Record(images)
        self.low, self.high = budget.value_range

    def broken(self, rows: Tensor, points: Tensor) -> Tensor:
        """Which points are broken, [M] bool; the nearest inside the budget is recorded."""
        if len(rows) == 0:
            return torch.zeros_like(rows, dtype=torch.bool)
        answer = self.objective.ask(points, self.labels[rows])
        images, broken = self.images[rows], answer.broken
        distances = self.budget.distances(points, images)
        self.record.offer(rows, points, answer.wrong, -distances, broken & self.budget.holds(points, images))
        return broken

    def begin(self, tries: int, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images that have a broken point to start from, and that point; images broken already need none."""
        rows = torch.arange(len(self.images), device=self.images.device)
        rows = rows[~self.broken(rows, self.images)]
        points = self.images.clone()
        started = torch.zeros(len(self.images), dtype=torch.bool, device=rows.device)
        for number in range(tries + 2):
            left = rows[~started[rows]]
            if len(left) == 0:
                break
            if number == 0:
                if starts is None:
                    continue
                guess = starts[left].to(self.images).clamp(self.low, self.high)
            elif number <= tries:
                noise = self.streams.uniform(left, self.images.shape[1:])
                if number % 2 == 0:  # every other guess is black and white
                    noise = (noise > 0.5).double()
                guess = (self.low + (self.high - self.low) * noise).to(self.images)
            else:
                guess = self.low + self.high - self.images[left]
            broken = self.broken(left, guess)
            started[left] = broken
            points[left[broken]] = guess[broken]
        rows = rows[started[rows]]
        return rows, points[rows]

    def to_boundary(self, rows: Tensor, points: Tensor) -> Tensor:
        """Bisects between the images and broken points; returns broken points next to the boundary."""
        images = self.images[rows]
        pixels = images[0].numel() if len(images) else 1
        if self.budget.norm == "linf":
            far = self.budget.distances(points, images)
            least = far / pixels**2
        else:
            far = torch.ones(len(rows), dtype=torch.float64, device=points.device)
            least = far / pixels**1.5
        near, points = torch.zeros_like(far), points.clone()
        ends = points.clone()
        while True:
            open_ = ((far - near) > least).nonzero()[:, 0]
            if len(open_) == 0:
                return points
            middle = (near[open_] + far[open_]) / 2
            guess = self._between(images[open_], ends[open_], middle)
            broken = self.broken(rows[open_], guess)
            far[open_] = torch.where(broken, middle, far[open_])
            near[open_] = torch.where(broken, near[open_], middle)
            points[open_[broken]] = guess[broken]

    def _between(self, images: Tensor, ends: Tensor, amount: Tensor) -> Tensor:
        """The end's change cut to ``amount`` [M] (l-infinity), or that share of it (l2)."""
        wide = over_pixels(amount, images)
        if self.budget.norm == "linf":
            return torch.minimum(torch.maximum(ends, images - wide), images + wide)
        return images + wide * (ends - images)

    def step(self, rows: Tensor, points: Tensor, step: int, probes: int) -> Tensor:
        """Goes from the boundary along its estimated direction, as far as the point stays broken."""
        images = self.images[rows]
        distances = self.budget.distances(points, images)
        pixels = points[0].numel()
        length = distances / pixels
        if step == 1:
            length = torch.full_like(distances, FIRST_PROBE * (self.high - self.low))
        direction = self._direction(rows, points, length, probes)
        update = direction.sign() if self.budget.norm == "linf" else direction
        sizes, points = distances / math.sqrt(step), points.clone()
        left = torch.arange(len(rows), device=rows.device)
        for _ in range(MOST_HALVINGS):
            if len(left) == 0:
                break
            guess = (points[left] + over_pixels(sizes[left], points) * update[left]).clamp(
                self.low, self.high
            )
            broken = self.broken(rows[left], guess)
            points[left[broken]] = guess[broken]
            left = left[~broken]
            sizes = sizes / 2
        return points

    def _direction(self, rows: Tensor, points: Tensor, length: Tensor, probes: int) -> Tensor:
        """The unit direction into the other class, from the classes of random probes, [M, C, H, W]."""
        at_once = max(ROWS_PER_QUERY // max(len(rows), 1), 1)
        wide = over_pixels(length, points)
        total = torch.zeros_like(points, dtype=torch.float64)  # of probes by their sign
        plain = torch.zeros_like(total)  # of all probes
        signs = torch.zeros(len(rows), dtype=torch.float64, device=points.device)
        for begin in range(0, probes, at_once):
            count = min(at_once, probes - begin)
            shape = (count, *points.shape[1:])
            linf = self.budget.norm == "linf"
            drawn = 2 * self.streams.uniform(rows, shape) - 1 if linf else self.streams.normal(rows, shape)
            drawn = drawn / drawn.flatten(2).square().sum(2).sqrt().view(len(rows), count, 1, 1, 1)
            moved = (points[:, None] + wide[:, None] * drawn.to(points)).clamp(self.low, self.high)
            flat = moved.flatten(0, 1)
            answer = self.objective.ask(flat, self.labels[rows].repeat_interleave(count))
            sign = (2 * answer.broken.double() - 1).view(len(rows), count)
            change = ((moved - points[:, None]) / wide[:, None]).double()
            for probe in range(count):  # one by one, so that the sum does not depend on the batch's size
                total += sign[:, probe].view(-1, 1, 1, 1) * change[:, probe]
                plain += change[:, probe]
            signs += sign.sum(1)
        mean = signs / probes
        # The mean sign is taken off as a baseline, unless all probes agree.
        baseline = torch.where(mean.abs() == 1, 0.0, mean).view(-1, 1, 1, 1)
        estimate = total - baseline * plain
        lengths = norms(estimate)
        return (estimate / lengths.clamp(min=1e-12).view(-1, 1, 1, 1)).to(points)
