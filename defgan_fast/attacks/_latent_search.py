"""What the attacks in latent space share: inversion, proposals, and their judgement by the defended model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defgan_fast import arguments
from defgan_fast.attacks._adam import Adam
from defgan_fast.attacks._budget import Budget
from defgan_fast.attacks._meter import Meter
from defgan_fast.attacks._objective import Objective, check_logits, margins
from defgan_fast.attacks._record import Record
from defgan_fast.attacks._streams import Streams

INVERSION_RATE = 0.1


def invert(
    generator: nn.Module,
    images: Tensor,
    starts: Tensor,
    steps: int,
    rate: float = INVERSION_RATE,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Finds latents whose images are near, by Adam on the mean squared error.

    Args:
        generator: latents [M, k] to images [M, C, H, W].
        images: [N, C, H, W].
        starts: [N, R, k], starting points.
        steps: of Adam.
        rate: of Adam.
        on_step: called with the number of each step, from 1.

    Returns:
        The latent of least error of each image, [N, k]: of all starting points and all steps.
    """
    count, restarts, size = starts.shape
    targets = images.repeat_interleave(restarts, 0)
    adam = Adam.begin(starts.reshape(-1, size))
    best = adam.values
    least = torch.full((len(targets),), torch.inf, dtype=torch.float64, device=images.device)
    for step in range(1, steps + 2):
        with torch.inference_mode(False), torch.enable_grad():
            latents = adam.values.detach().clone().requires_grad_()
            errors = (generator(latents) - targets.clone()).square().flatten(1).mean(1)
            (gradients,) = torch.autograd.grad(errors.sum(), latents)
        errors = errors.detach().double()
        best = torch.where((errors < least)[:, None], adam.values, best)
        least = torch.minimum(least, errors)  # a NaN stays, and argmin below would choose it
        least = least.nan_to_num(nan=torch.inf)
        if step <= steps:
            adam = adam.step(gradients, step, rate)
            if on_step is not None:
                on_step(step)
    chosen = least.view(count, restarts).argmin(1) if count else least.new_zeros(0, dtype=torch.int64)
    return best.view(count, restarts, size)[torch.arange(count, device=images.device), chosen]


class Seen(NamedTuple):
    """The generator's images of M latents and what the classifier makes of them."""

    points: Tensor  # [M, C, H, W]
    squares: Tensor  # [M] float64, squared l2 distance from the images
    margins: Tensor  # [M] float64, positive where the classifier is fooled; mean over the noise
    gradients: Tensor  # [M, k], of the loss


class Proposals:
    """The nearest image of each row that fools the classifier, since the model was last asked."""

    def __init__(self, images: Tensor) -> None:
        self.fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self._points = images.detach().clone()
        self._squares = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
        self._latest = self._points

    def offer(self, rows: Tensor, seen: Seen, fooled: Tensor) -> None:
        """Keeps points [M, C, H, W] of rows [M] that fool the classifier, where they are nearer."""
        better = fooled & (seen.squares < self._squares[rows])
        self.fooled[rows] |= fooled
        self._points[rows[better]] = seen.points[better].to(self._points.dtype)
        self._squares[rows[better]] = seen.squares[better]
        self._latest = seen.points

    def take(self, rows: Tensor) -> Tensor:
        """Returns a point for each row that was just offered, the latest where none fooled, and begins anew."""
        fooled = self._squares[rows].isfinite().view(-1, 1, 1, 1)
        points = torch.where(fooled, self._points[rows], self._latest.to(self._points.dtype))
        self._squares[rows] = torch.inf
        return points


class LatentSearch:
    """The parts of the defended model, and the record of what it was fooled by."""

    early_stop: bool = True

    def __init__(
        self,
        model: nn.Module,
        generator: nn.Module | None,
        classifier: nn.Module | None,
        images: Tensor,
        labels: Tensor,
        epsilon: float | None,
        norm: str,
        value_range: tuple[float, float],
        targeted: bool,
        eot: int,
    ) -> None:
        self.generator, self.classifier, self.latent_size = _parts(model, generator, classifier)
        self.images, self.labels, self.targeted = images.detach(), labels, targeted
        self.bounded = epsilon is not None
        self.budget = Budget(norm, math.inf if epsilon is None else epsilon, value_range)
        self.objective, self.record = Objective(model, "margin", targeted, eot), Record(images)

    def begin(
        self, latents: Tensor | None, streams: Streams, restarts: int, steps: int, meter: Meter
    ) -> Tensor:
        """Looks at the images themselves, and returns a latent for each, [N, k]: the given ones, or by inversion."""
        count, rows = len(self.images), torch.arange(len(self.images), device=self.images.device)
        if count:
            self.judge(rows, self.images)
        if latents is not None:
            if latents.dim() != 2 or len(latents) != count or not latents.is_floating_point():
                raise ValueError(f"latents must be floating point [{count}, k], got {tuple(latents.shape)}")
            return latents.detach().to(self.images)
        arguments.count("inversion_restarts", restarts)
        arguments.count("inversion_steps", steps, 0)
        if self.latent_size is None:
            raise ValueError(
                "latents must be given where the generator does not tell its latent_size, got None"
            )
        starts = streams.normal(rows, (restarts, self.latent_size)).to(self.images)
        return invert(self.generator, self.images, starts, steps, on_step=lambda step: meter.at(step * count))

    def going(self, rows: Tensor | None = None) -> Tensor:
        """The images that are not finished: of all, as rows, or of the given rows, [M] bool."""
        finished = self.record.broken & self.early_stop & self.bounded
        # An image that is broken as it is stays so; nothing is nearer.
        finished = finished | (self.record.broken & (self.record.scores == 0))
        return (~finished).nonzero()[:, 0] if rows is None else ~finished[rows]

    def judge(self, rows: Tensor, points: Tensor) -> None:
        """Cuts points of rows to the budget, shows them to the model and records what fools it."""
        if len(rows) == 0:
            return
        images = self.images[rows]
        low, high = self.budget.value_range
        points = self.budget.project(points.to(images), images) if self.bounded else points.clamp(low, high)
        points = points.to(images.dtype)
        answer = self.objective.ask(points, self.labels[rows])
        distances = self.budget.distances(points, images)
        allowed = answer.broken & self.budget.holds(points, images)
        self.record.offer(rows, points, answer.wrong, -distances, allowed)

    def differentiate(
        self,
        rows: Tensor,
        latents: Tensor,
        loss: Callable[[Seen], Tensor],
        first: bool,
        noise: Tensor | None = None,
    ) -> Seen:
        """What the classifier makes of the latents [M, k], and the loss's gradient; ``noise`` [M, S, C, H, W]."""
        with torch.inference_mode(False), torch.enable_grad():
            images, labels = self.images[rows].clone(), self.labels[rows].clone()
            variable = latents.detach().clone().requires_grad_()
            points = self.generator(variable)
            squares = (points - images).double().square().flatten(1).sum(1)
            if noise is None:
                read, truth = points, labels
            else:
                read = (points[:, None] + noise.clone()).flatten(0, 1)
                truth = labels.repeat_interleave(noise.shape[1])
            logits = self.classifier(read)
            check_logits(logits, truth)
            won = margins(logits, truth).double().view(len(labels), -1).mean(1)
            if self.targeted:
                won = -won
            if not won.requires_grad:
                raise RuntimeError("classifier must pass gradients to the latent, got a detached output")
            seen = Seen(points.detach(), squares, won, points)
            if first and not bool(torch.autograd.grad(won.sum(), variable, retain_graph=True)[0].any()):
                raise RuntimeError("classifier must pass gradients to the latent, got zeros for all images")
            (gradients,) = torch.autograd.grad(loss(seen).sum(), variable)
        return Seen(points.detach(), squares.detach(), won.detach(), gradients)


def _parts(
    model: nn.Module, generator: nn.Module | None, classifier: nn.Module | None
) -> tuple[nn.Module, nn.Module, int | None]:
    """Generator, classifier and latent size: as given, or those of ``nn.Sequential(projector, classifier)``."""
    size = getattr(generator, "latent_size", None)
    sequential = isinstance(model, nn.Sequential) and len(model) > 1
    if generator is None and sequential:
        generator = getattr(model[0], "generator", None)  # type: ignore[index]
        size = getattr(model[0], "latent_size", None)  # type: ignore[index]
    if classifier is None and sequential and hasattr(model[0], "generator"):  # type: ignore[index]
        classifier = model[1:]  # type: ignore[index]
    for name, part in (("generator", generator), ("classifier", classifier)):
        if part is None:
            raise ValueError(
                f"{name} must be given where model is no nn.Sequential(projector, classifier), "
                f"got {type(model).__name__}"
            )
    assert generator is not None
    assert classifier is not None
    return generator, classifier, size
