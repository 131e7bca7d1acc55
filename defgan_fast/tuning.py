"""The settings that suit a generator: successive halving over rates and starting points, then over restarts and steps.

The paper's rate of 10 suits its own generators. What suits another one depends on how fast its images change with the
latent, and on which latents it was trained. Every trial is a projection of some clean images; what counts is the mean
squared error. Three rounds, each on more images: all rates and starting points with few steps, the better third of
them with more, and the best few with every number of restarts and steps. One run with many restarts tells the errors of
fewer as well, since starting points come in a fixed order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import arguments, progress
from .candidates import candidates_that_fit

RATES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
CANDIDATES = 8192
BEGINNINGS: tuple[dict[str, Any], ...] = (
    {},
    {"start_std": 1.0},
    {"start_std": 1.0, "radius": "auto"},
    {"starts": "nearest"},
    {"starts": "nearest", "radius": "auto"},
)
STEPS = (10, 25, 50, 100)
RESTARTS = (1, 2, 4)
PAPER = (10, 200)  # restarts and steps, tried with the best rate and beginning alone
TOLERANCE = 1.1
"""The cheapest settings are chosen whose error is at most so many times the least one found."""
NEGLIGIBLE = 1e-4
"""An error of this part of the images' variance is as good as none."""

_FIRST, _SECOND, _LAST = len(RATES) * len(BEGINNINGS), 13, 4
# Row-steps of all rounds for each image of the last one.
_COST = (
    _FIRST * 2 * 25 / 3 + _SECOND * 2 * 50 * 2 / 3 + _LAST * max(RESTARTS) * sum(STEPS) + PAPER[0] * PAPER[1]
)


class _Projects(Protocol):
    def project(self, images: Tensor) -> Any: ...


class Trial(NamedTuple):
    """What some settings lead to.

    Attributes:
        settings: the rate and the starting points.
        restarts: R.
        steps: L.
        error: mean squared error of the chosen restarts, over images; infinite where one is not finite.
    """

    settings: dict[str, Any]
    restarts: int
    steps: int
    error: float

    @property
    def row_steps(self) -> int:
        """Steps that all restarts of an image take together."""
        return self.restarts * self.steps


def tune(
    make: Callable[..., _Projects],
    generator: nn.Module,
    images: Tensor,
    budget: int,
    seed: int,
    verbose: bool,
    fixed: dict[str, Any],
) -> dict[str, Any]:
    """Does what `Projector.tune` says; `make` makes a projector from a generator and settings."""
    budget = arguments.count("budget", budget)
    if not isinstance(images, Tensor) or images.dim() != 4 or not len(images):
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must have shape [N, C, H, W] with N at least 1, got {got}")
    images = _some(images, max(2, round(budget / _COST)))
    known = {"seed": seed, "candidates": min(CANDIDATES, candidates_that_fit(images.shape[1:])), **fixed}
    with progress.bar(int(_COST * len(images)), "tuning", "row-step", quiet=not verbose) as bar:

        def run(settings: dict[str, Any], restarts: int, steps: int, part: Tensor) -> Iterator[Trial]:
            projector = make(generator, **known, **settings, restarts=restarts, steps=steps)
            with torch.no_grad():
                errors = projector.project(part).all_errors.double()
            bar.update(len(part) * restarts * steps)
            for fewer in sorted({restarts, *(count for count in RESTARTS if count < restarts)}):
                error = errors[:, :fewer].nan_to_num(torch.inf).amin(1).mean().item()
                yield Trial(settings, fewer, steps, error)

        trials = _rounds(run, images)
    settings = chosen(trials, float(images.double().var()))
    if verbose:
        print(table(trials, settings), file=sys.stderr)
    return {
        **fixed,
        **settings.settings,
        **({"candidates": known["candidates"]} if "starts" in settings.settings else {}),
        "seed": seed,
        "restarts": settings.restarts,
        "steps": settings.steps,
    }


def _rounds(
    run: Callable[[dict[str, Any], int, int, Tensor], Iterator[Trial]], images: Tensor
) -> list[Trial]:
    """Returns the trials of the last round, after two that leave out most rates and starting points."""
    left = [{"lr": rate, **beginning} for beginning in BEGINNINGS for rate in RATES]
    for keep, steps, share in ((_SECOND, 25, 1 / 3), (_LAST, 50, 2 / 3)):
        part = _some(images, max(1, round(len(images) * share)))
        tried = [list(run(settings, 2, steps, part))[-1] for settings in left]
        tried = sorted((t for t in tried if t.error < torch.inf), key=lambda trial: trial.error)
        left = [trial.settings for trial in tried[:keep]]
    trials = [
        trial for settings in left for steps in STEPS for trial in run(settings, max(RESTARTS), steps, images)
    ]
    finite = [trial for trial in trials if trial.error < torch.inf]
    if not finite:
        raise ValueError(f"generator gives no finite error at any rate from {RATES[0]:g} to {RATES[-1]:g}")
    best = min(finite, key=lambda trial: trial.error)
    return [*finite, *(trial for trial in run(best.settings, *PAPER, images) if trial.error < torch.inf)]


def chosen(trials: list[Trial], variance: float) -> Trial:
    """Returns the cheapest of the trials that are nearly as good as the best one, of equally cheap ones the best."""
    enough = max(TOLERANCE * min(trial.error for trial in trials), NEGLIGIBLE * variance)
    return min((t for t in trials if t.error <= enough), key=lambda trial: (trial.row_steps, trial.error))


def table(trials: list[Trial], choice: Trial) -> str:
    """Returns the least error at each number of row-steps, and the choice, as lines of text."""
    lines = ["row-steps   R    L   rate  starting points                     error"]
    best: dict[int, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.error):
        best.setdefault(trial.row_steps, trial)
    best[choice.row_steps] = choice
    for _, trial in sorted(best.items()):
        lr, beginning = trial.settings["lr"], {k: v for k, v in trial.settings.items() if k != "lr"}
        words = ", ".join(f"{name}={value}" for name, value in beginning.items()) or "as in the paper"
        line = f"{trial.row_steps:9d}  {trial.restarts:2d}  {trial.steps:3d}  {lr:5g}  {words:32s}  {trial.error:8.3g}"
        lines.append(f"{line}{'  <- chosen' if trial is choice else ''}")
    return "\n".join(lines)


def _some(images: Tensor, count: int) -> Tensor:
    """Returns so many of the images, spread evenly over all of them."""
    if count >= len(images):
        return images
    return images[torch.linspace(0, len(images) - 1, count, device="cpu").long().to(images.device)]
