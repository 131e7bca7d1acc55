"""The Carlini-Wagner attack: the nearest adversarial image in l2, by Adam on the pixels behind a tanh."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from defgan_fast import arguments
from defgan_fast.attacks._adam import Adam
from defgan_fast.attacks._budget import Budget, check, over_pixels
from defgan_fast.attacks._meter import Meter, Progress
from defgan_fast.attacks._objective import Objective
from defgan_fast.attacks._record import Record

SEARCH = {"iterations": 1000, "learning_rate": 0.01, "initial_c": 0.01, "search_steps": 9}
"""Settings that find near images: those of Carlini and Wagner with a tenth of their iterations."""

# A pixel at the end of the range would lie at infinity behind the tanh.
INSIDE = 1 - 1e-6
LARGEST_C = 1e10
# Carlini and Wagner look ten times a search whether the loss still falls, by this factor.
CHECKS, FALLING = 10, 0.9999


def cw(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float | None = None,
    *,
    iterations: int = 100,
    learning_rate: float = 10.0,
    initial_c: float = 100.0,
    search_steps: int = 1,
    confidence: float = 0.0,
    abort_early: bool = True,
    early_stop: bool = True,
    targeted: bool = False,
    eot: int = 1,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> Tensor:
    """CW-l2 of "Towards evaluating the robustness of neural networks" (Carlini, Wagner, IEEE S&P 2017).

    Minimises, for each image by itself, the squared l2 distance plus c * max(confidence - margin, 0), where the
    margin is the largest other logit minus the label's. The defaults are the Defense-GAN paper's recipe: 100
    iterations at rate 10 with c = 100 and a single search. At that rate the first step sends most pixels to an
    end of the range, where the tanh passes no gradient: the recipe breaks undefended classifiers at distances of
    many units. ``cw(..., **SEARCH)`` is the attack as its authors meant it. Distances are measured in units of the
    range, so that c means the same for [0, 1] and [-1, 1].

    Args:
        model: images to logits [N, classes]; attacked in the mode that it is in (call ``eval()`` first).
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: largest l2 distance at which an image counts as broken; None: any, as in both papers.
        iterations: of Adam in each search.
        learning_rate: of Adam, behind the tanh.
        initial_c: the first weight of the margin.
        search_steps: how often c is adapted, by bisection, to the least that still breaks the image; from 10 on
            the last search repeats the least c that has succeeded.
        confidence: margin that an adversarial image must have.
        abort_early: an image whose loss has stopped falling is dropped from the search.
        early_stop: an image that is broken within ``epsilon`` is dropped from the work; False (or no epsilon)
            looks for a nearer one.
        targeted: descend to the class of ``labels`` instead of leaving it.
        eot: copies of every image in each query, whose margins are averaged; above 1 for randomised defences.
        seed: not used, nothing is drawn; it is here because every attack takes one.
        value_range: (low, high) of the pixels.
        progress: called with (done, total) after every iteration.

    Returns:
        [N, C, H, W], detached: the nearest broken point; the image itself where none is within ``epsilon``.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: the model passes no gradient to its images.

    Example:
        >>> adversarial = cw(classifier, images, labels, **carlini_wagner.SEARCH)
        >>> (adversarial - images).flatten(1).norm(dim=1).mean()
        tensor(1.3)
    """
    check(images, labels, epsilon, value_range)
    for name, count in (("iterations", iterations), ("search_steps", search_steps)):
        arguments.count(name, count)
    for name, value in (("learning_rate", learning_rate), ("initial_c", initial_c)):
        arguments.number(name, value, above=0)
    arguments.number("confidence", confidence, least=0)
    images = images.detach()
    budget = Budget("l2", math.inf if epsilon is None else epsilon, value_range)
    record, objective = Record(images), Objective(model, "margin", targeted, eot)
    meter = Meter(progress, len(images) * iterations * search_steps)
    if len(images) == 0:
        return record.points
    everything = torch.arange(len(images), device=images.device)
    answer = objective.differentiate(images, labels, first=True)
    already = answer.broken & (answer.scores >= confidence)
    record.offer(everything, images, answer.wrong, torch.zeros_like(answer.scores), already)
    search = _Search(objective, budget, record, images, labels, confidence, learning_rate)
    search.early_stop = early_stop and epsilon is not None
    search.abort_every = max(iterations // CHECKS, 1) if abort_early else 0
    c = Constants(len(images), initial_c, images.device)
    for number in range(search_steps):
        if search_steps >= 10 and number == search_steps - 1:
            c.repeat_least()
        found = search.run(
            search.going(everything[~already]), c.values, iterations, meter, number * iterations * len(images)
        )
        c.adapt(found)
    meter.finish()
    return record.points


class _Search:
    """Adam from the images themselves, over those that are not finished."""

    abort_every: int = 0
    early_stop: bool = False

    def __init__(
        self,
        objective: Objective,
        budget: Budget,
        record: Record,
        images: Tensor,
        labels: Tensor,
        confidence: float,
        learning_rate: float,
    ) -> None:
        self.objective, self.budget, self.record = objective, budget, record
        self.images, self.labels = images, labels
        self.confidence, self.learning_rate = confidence, learning_rate
        low, high = budget.value_range
        self.middle, self.half = (high + low) / 2, (high - low) / 2
        # 16-bit images are searched in float32: a tanh near its ends has no bits left otherwise.
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        self.origin = torch.atanh(((wide - self.middle) / self.half * INSIDE).clamp(-INSIDE, INSIDE))

    def going(self, rows: Tensor) -> Tensor:
        """Returns those of the rows whose images are not finished."""
        return rows[~(self.record.broken[rows] & self.early_stop)]

    def run(self, rows: Tensor, c: Tensor, iterations: int, meter: Meter, before: int) -> Tensor:
        """One search over the images of rows [M] with weights c [N]; returns which of all were broken, [N] bool."""
        found = torch.zeros(len(self.images), dtype=torch.bool, device=self.images.device)
        adam = Adam.begin(torch.zeros_like(self.origin[rows]))  # the change behind the tanh
        checked = torch.full_like(c[rows], torch.inf)  # losses at the last check
        for iteration in range(iterations):
            if len(rows) == 0:
                break
            tanh = torch.tanh(self.origin[rows] + adam.values)
            losses, gradients = self._look(rows, tanh, c[rows], found, iteration == iterations - 1)
            meter.at(before + (iteration + 1) * len(self.images))
            if gradients is None:
                break
            gradients = gradients * self.half * (1 - tanh * tanh)
            adam = adam.step(gradients, iteration + 1, self.learning_rate)
            going = ~(self.record.broken[rows] & self.early_stop)
            if self.abort_every and iteration % self.abort_every == 0:
                going = going & (losses <= FALLING * checked)
                checked = losses
            rows, adam, checked = rows[going], adam.keep(going), checked[going]
        meter.at(before + iterations * len(self.images))
        return found

    def _look(
        self, rows: Tensor, tanh: Tensor, c: Tensor, found: Tensor, last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Losses [M] float64 and their gradients by the points; successes are recorded and marked in ``found``."""
        images, labels = self.images[rows], self.labels[rows]
        points = (self.middle + self.half * tanh).to(images.dtype)
        answer = self.objective.ask(points, labels) if last else self.objective.differentiate(points, labels)
        success = answer.broken & (answer.scores >= self.confidence)
        found[rows] |= success
        distances = self.budget.distances(points, images)
        self.record.offer(rows, points, answer.wrong, -distances, success & self.budget.holds(points, images))
        short = self.confidence - answer.scores.double()
        unit = (2 * self.half) ** 2
        losses = distances.square() / unit + c * short.clamp(min=0)
        if answer.gradients is None:
            return losses, None
        weight = torch.where(short >= 0, c, 0.0)
        gradients = (2 / unit) * (points - images).to(tanh.dtype)
        return losses, gradients - over_pixels(weight.to(tanh.dtype), gradients) * answer.gradients


class Constants:
    """The weight c of each image and the bisection between weights that failed and that succeeded, in float64."""

    def __init__(self, count: int, initial: float, device: torch.device) -> None:
        self.values = torch.full((count,), float(initial), dtype=torch.float64, device=device)
        self.failed = torch.zeros_like(self.values)
        self.succeeded = torch.full_like(self.values, LARGEST_C)

    def adapt(self, found: Tensor) -> None:
        """Halves the interval of images that have succeeded once; multiplies the others' c by ten."""
        self.succeeded = torch.where(found, torch.minimum(self.succeeded, self.values), self.succeeded)
        self.failed = torch.where(found, self.failed, torch.maximum(self.failed, self.values))
        between = (self.failed + self.succeeded) / 2
        self.values = torch.where(self.succeeded < LARGEST_C, between, self.values * 10)

    def repeat_least(self) -> None:
        """Takes the least weight that has succeeded, where one has."""
        self.values = torch.where(self.succeeded < LARGEST_C, self.succeeded, self.values)
