"""Projected gradient descent: many steps along the gradient, each brought back into the ball around the image.

Two rules choose the steps. "fixed" is the method of Madry et al. "auto" is Auto-PGD: momentum, and a step that
is halved, image by image, when it no longer pays; it has no step size to tune.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from defgan_fast import arguments
from defgan_fast.attacks._budget import Budget, check, over_pixels
from defgan_fast.attacks._meter import Meter, Progress
from defgan_fast.attacks._objective import Answer, Objective
from defgan_fast.attacks._record import Record
from defgan_fast.attacks._streams import Streams, random_step

STEP_RULES = ("fixed", "auto")
# Auto-PGD's constants (Croce and Hein, section 3.1): the weight of the new direction, the share of steps that must
# gain, and the checkpoints: the first after 0.22 of the steps, each interval 0.03 shorter, none below 0.06.
MOMENTUM, GAINING = 0.75, 0.75
FIRST_CHECK, CHECK_DECREASE, LEAST_CHECK = 0.22, 0.03, 0.06


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float = 0.3,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = False,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    *,
    norm: str = "linf",
    step_rule: str = "fixed",
    restarts: int = 1,
    loss: str = "cross_entropy",
    early_stop: bool = True,
    targeted: bool = False,
    eot: int = 1,
    progress: Progress | None = None,
) -> Tensor:
    """PGD of "Towards deep learning models resistant to adversarial attacks" (Madry et al., ICLR 2018).

    Each step adds ``step_size`` times the direction of steepest ascent in the norm (l-infinity: the gradient's
    sign; l2: the gradient over its length), then goes back into the ball of radius ``epsilon`` around the image
    and into the pixel range. ``step_rule="auto"`` is APGD of "Reliable evaluation of adversarial robustness with
    an ensemble of diverse parameter-free attacks" (Croce, Hein, ICML 2020). Through a projector with the
    straight-through gradient this is BPDA (Athalye, Carlini, Wagner, ICML 2018).

    Args:
        model: images to logits [N, classes]; attacked in the mode that it is in (call ``eval()`` first).
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: radius of the ball, at least 0.
        steps: at least 1.
        step_size: by default 2.5 * epsilon / steps, which can cross the ball. "auto" begins with 2 * epsilon and
            takes none.
        random_start: begin at a random point of the ball instead of at the image; restarts after the first
            always do.
        seed: with an image's pixels it decides the image's starting points.
        value_range: (low, high) of the pixels.
        norm: "linf" or "l2".
        step_rule: "fixed" or "auto".
        restarts: how often the attack begins anew, at least 1.
        loss: "cross_entropy" or "margin".
        early_stop: an image that is broken (with ``eot``: in every copy) is dropped from the work. With False all
            steps are made, in search of the largest loss, as an attack that is to transfer to another model needs.
        targeted: descend to the class of ``labels`` instead of leaving it.
        eot: copies of every image in each query, whose gradients are averaged; above 1 for randomised defences.
        progress: called with (done, total) after every step.

    Returns:
        [N, C, H, W], detached: for each image the best point inside the budget: one that is broken before one
        that is not, then the one of largest loss.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: the model passes no gradient to its images.

    Example:
        >>> defended = torch.nn.Sequential(projector, classifier).eval()
        >>> adversarial = pgd(defended, images, labels, epsilon=0.3, steps=40, step_rule="auto")
        >>> (adversarial - images).abs().max() <= 0.3 + 1e-6
        tensor(True)
    """
    check(images, labels, epsilon, value_range, norm)
    arguments.count("steps", steps)
    arguments.count("restarts", restarts)
    arguments.choice("step_rule", step_rule, STEP_RULES)
    if step_size is None:
        step_size = 2.5 * epsilon / steps
    elif step_rule == "auto":
        raise ValueError(f'step_size must be None for step_rule "auto", got {step_size}')
    arguments.number("step_size", step_size, least=0)
    images = images.detach()
    climb = _Climb(Objective(model, loss, targeted, eot), Budget(norm, epsilon, value_range), images, labels)
    climb.early_stop, climb.steps = early_stop, steps
    climb.meter = Meter(progress, len(images) * restarts * (steps + 1))
    streams = Streams(images, seed, "pgd") if random_start or restarts > 1 else None
    for restart in range(restarts):
        rows = torch.arange(len(images), device=images.device)
        if early_stop:
            rows = rows[~climb.record.broken]
        if len(rows) == 0:
            break
        start = images[rows]
        if streams is not None and (random_start or restart):
            start = climb.budget.project(
                start + random_step(start, rows, streams, climb.budget, "uniform"), start
            )
        climb.restart = restart
        if step_rule == "fixed":
            climb.fixed(rows, start, step_size)
        else:
            climb.auto(rows, start)
    climb.meter.finish()
    return climb.record.points


def climb_automatically(
    objective: Objective,
    budget: Budget,
    images: Tensor,
    labels: Tensor,
    steps: int,
    early_stop: bool,
    meter: Meter,
) -> Tensor:
    """Returns the best points [N, C, H, W] of one climb of Auto-PGD up any objective, from the images themselves."""
    climb = _Climb(objective, budget, images, labels)
    climb.early_stop, climb.steps, climb.meter = early_stop, steps, meter
    if len(images):
        climb.auto(torch.arange(len(images), device=images.device), images)
    meter.finish()
    return climb.record.points


class _Climb:
    """One attack on a batch: both step rules, over the images that are not finished yet."""

    meter: Meter
    early_stop: bool
    steps: int
    restart: int = 0

    def __init__(self, objective: Objective, budget: Budget, images: Tensor, labels: Tensor) -> None:
        self.objective, self.budget, self.images, self.labels = objective, budget, images, labels
        self.record = Record(images)

    def fixed(self, rows: Tensor, points: Tensor, step_size: float) -> None:
        """Climbs by steps of one size from points [M, C, H, W] of the images of rows [M]."""
        for step in range(self.steps + 1):
            answer, going = self._look(rows, points, step)
            if answer.gradients is None or not bool(going.any()):
                return
            rows, points = rows[going], points[going]
            moved = points + step_size * self.budget.ascent(answer.gradients[going])
            points = self.budget.project(moved, self.images[rows])

    def auto(self, rows: Tensor, points: Tensor) -> None:
        """Climbs by Auto-PGD from points [M, C, H, W] of the images of rows [M]."""
        answer, going = self._look(rows, points, 0)
        state = _State.start(rows, points, answer, 2 * self.budget.epsilon).keep(going)
        interval = max(int(FIRST_CHECK * self.steps), 1)
        next_check = interval
        for step in range(1, self.steps + 1):
            if len(state.rows) == 0:
                return
            moved = self._momentum_step(state, first=step == 1)
            answer, going = self._look(state.rows, moved, step)
            gradients = answer.gradients if answer.gradients is not None else state.gradients
            state = state.advance(moved, answer.scores.double(), gradients)
            if step == next_check:
                state = state.check(interval)
                interval = max(
                    interval - max(int(CHECK_DECREASE * self.steps), 1), max(int(LEAST_CHECK * self.steps), 1)
                )
                next_check += interval
            state = state.keep(going)

    def _momentum_step(self, state: _State, first: bool) -> Tensor:
        """The step of equation 1 of Croce and Hein: a projected gradient step, averaged with the last change."""
        images, points = self.images[state.rows], state.points
        step = over_pixels(state.step_sizes, points) * self.budget.ascent(state.gradients)
        target = self.budget.project(points + step, images)
        if first:
            return target
        blended = points + MOMENTUM * (target - points) + (1 - MOMENTUM) * (points - state.previous)
        return self.budget.project(blended, images)

    def _look(self, rows: Tensor, points: Tensor, step: int) -> tuple[Answer, Tensor]:
        """Asks the model about points, records them, and says which images go on, [M] bool.

        The last point of a climb needs no gradient.
        """
        labels, images = self.labels[rows], self.images[rows]
        if step == self.steps:
            answer = self.objective.ask(points, labels)
        else:
            answer = self.objective.differentiate(points, labels, first=step == 0 and self.restart == 0)
        self.record.offer(rows, points, answer.wrong, answer.scores, self.budget.holds(points, images))
        self.meter.at(len(self.images) * (self.restart * (self.steps + 1) + step + 1))
        going = ~self.record.broken[rows] if self.early_stop else torch.ones_like(rows, dtype=torch.bool)
        return answer, going


class _State(NamedTuple):
    """Auto-PGD's memory of each image, M rows."""

    rows: Tensor  # [M] which images
    points: Tensor  # [M, C, H, W]
    previous: Tensor  # the points before
    gradients: Tensor  # at points
    scores: Tensor  # [M] float64, at points
    best_points: Tensor
    best_gradients: Tensor
    best_scores: Tensor
    step_sizes: Tensor  # [M] float64
    gains: Tensor  # [M] steps since the last checkpoint that raised the score
    checked_scores: Tensor  # best_scores at the last checkpoint
    halved: Tensor  # [M] bool, whether the last checkpoint halved the step

    @staticmethod
    def start(rows: Tensor, points: Tensor, answer: Answer, step_size: float) -> _State:
        scores, gradients = answer.scores.double(), answer.gradients
        assert gradients is not None
        return _State(
            rows,
            points,
            points,
            gradients,
            scores,
            points,
            gradients,
            scores,
            torch.full_like(scores, step_size),
            torch.zeros_like(scores),
            scores,
            torch.zeros_like(rows, dtype=torch.bool),
        )

    def keep(self, going: Tensor) -> _State:
        """The state of the images that go on."""
        return self if bool(going.all()) else _State(*(values[going] for values in self))

    def advance(self, points: Tensor, scores: Tensor, gradients: Tensor) -> _State:
        """The state after a step to ``points``."""
        better = scores > self.best_scores
        wide = better.view(-1, 1, 1, 1)
        return self._replace(
            points=points,
            previous=self.points,
            gradients=gradients,
            scores=scores,
            best_points=torch.where(wide, points, self.best_points),
            best_gradients=torch.where(wide, gradients, self.best_gradients),
            best_scores=torch.where(better, scores, self.best_scores),
            gains=self.gains + (scores > self.scores),
        )

    def check(self, interval: int) -> _State:
        """The state after a checkpoint: where steps did not pay they are halved and start from the best point."""
        few = self.gains < GAINING * interval
        stuck = ~self.halved & (self.checked_scores >= self.best_scores)
        halve = few | stuck
        wide = halve.view(-1, 1, 1, 1)
        return self._replace(
            points=torch.where(wide, self.best_points, self.points),
            gradients=torch.where(wide, self.best_gradients, self.gradients),
            step_sizes=torch.where(halve, self.step_sizes / 2, self.step_sizes),
            gains=torch.zeros_like(self.gains),
            checked_scores=self.best_scores,
            halved=halve,
        )
