"""Attacks in the generator's latent space: the adversarial image is one that the generator can draw.

Projecting an image that lies on the generator's range leaves it as it is, so a defence by projection has nothing to
take away. Both attacks search for a latent whose image is close to the one under attack and is read as another
class. What they propose is cut to the budget around that image, shown to the whole defended model, and believed
only if the model is fooled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defgan_fast.attacks._adam import Adam
from defgan_fast.attacks._budget import Budget, Meter, Progress, check, check_count, check_positive
from defgan_fast.attacks._objective import Objective, check_logits, margins
from defgan_fast.attacks._record import Record
from defgan_fast.attacks._streams import Streams
from defgan_fast.attacks.carlini_wagner import Constants

INVERSION_RATE = 0.1
# Each search shows the defended model so many proposals an image, since each costs a projection.
JUDGEMENTS = 10
# Jalal et al. divide the rate by ten after this share of the steps.
LATE, LATE_FACTOR = 0.8, 0.1


def latent_cw(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float | None = 4.0,
    *,
    generator: nn.Module | None = None,
    classifier: nn.Module | None = None,
    latents: Tensor | None = None,
    norm: str = "l2",
    iterations: int = 30_000,
    learning_rate: float = 0.1,
    initial_c: float = 1.0,
    search_steps: int = 5,
    confidence: float = 0.0,
    inversion_restarts: int = 30,
    inversion_steps: int = 3_000,
    early_stop: bool = True,
    targeted: bool = False,
    eot: int = 1,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> Tensor:
    """The attack on Defense-GAN of "Obfuscated gradients give a false sense of security" (Athalye et al., ICML 2018).

    Inverts the generator at the image (Adam at 0.1 from starting points N(0, I)), then minimises the squared l2
    distance of G(z) from the image plus c * max(confidence - margin, 0) over z, with c found by bisection. The
    authors published one image and no code; the settings are the paper's.

    Args:
        model: the defended model, images to logits [N, classes], which decides what is broken.
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: largest distance in the norm at which an image counts as broken; None: any.
        generator: latents [N, k] to images; None: that of the projector at the head of ``model``.
        classifier: images to logits; None: what follows the projector in ``model``.
        latents: [N, k] to start from, such as ``projector.project(images).latents``; None: by inversion here.
        norm: of the budget, "linf" or "l2"; the search itself minimises the l2 distance.
        iterations: of Adam in each search.
        learning_rate: of Adam on the latent.
        initial_c: the first weight of the margin.
        search_steps: how often c is adapted.
        confidence: margin that the search asks of the classifier.
        inversion_restarts: starting points of the inversion, of which the best is used.
        inversion_steps: of the inversion.
        early_stop: an image that is broken within ``epsilon`` is dropped from the work; False (or no epsilon)
            looks for a nearer one.
        targeted: search for the class of ``labels`` instead of leaving it.
        eot: copies of every proposal shown to the model, all of which must be wrong; above 1 for randomised
            defences.
        seed: with an image's pixels it decides the inversion's starting points.
        value_range: (low, high) of the pixels and of the generator.
        progress: called with (done, total) after every step.

    Returns:
        [N, C, H, W], detached: the nearest broken point; the image itself where none is within ``epsilon``.

    Raises:
        ValueError: an argument does not fit, or ``model`` is no ``nn.Sequential(projector, ...)`` and generator and
            classifier are not given.
        RuntimeError: the classifier passes no gradient to the latent.

    Example:
        >>> defended = torch.nn.Sequential(projector, classifier).eval()
        >>> adversarial = latent_cw(defended, images, labels, 4.0, iterations=1000, search_steps=2)
    """
    check(images, labels, epsilon, value_range, norm)
    for name, count in (("iterations", iterations), ("search_steps", search_steps)):
        check_count(name, count)
    for name, value in (("learning_rate", learning_rate), ("initial_c", initial_c)):
        check_positive(name, value)
    check_positive("confidence", confidence, zero=True)
    search = _Search(model, generator, classifier, images, labels, epsilon, norm, value_range, targeted, eot)
    search.early_stop = early_stop
    total = (inversion_steps if latents is None else 0) + iterations * search_steps
    meter = Meter(progress, len(images) * total)
    streams = Streams(images, seed, "latent_cw")
    found_latents = search.begin(latents, streams, inversion_restarts, inversion_steps, meter)
    before = meter.done
    c = Constants(len(images), initial_c, images.device)
    for number in range(search_steps):
        rows = search.going()
        adam = Adam.begin(found_latents[rows])
        proposals = _Proposals(images)
        for iteration in range(1, iterations + 1):
            if len(rows) == 0:
                break
            weights = c.values[rows]

            def loss(seen: _Seen, weights: Tensor = weights) -> Tensor:
                return seen.squares + weights * (confidence - seen.margins).clamp(min=0)

            seen = search.differentiate(rows, adam.values, loss, first=number == 0 and iteration == 1)
            proposals.offer(rows, seen, seen.margins >= confidence)
            adam = adam.step(seen.gradients, iteration, learning_rate)
            if iteration % max(iterations // JUDGEMENTS, 1) == 0 or iteration == iterations:
                search.judge(rows, proposals.take(rows))
                going = search.going(rows)
                rows, adam = rows[going], adam.keep(going)
            meter.at(before + len(images) * (number * iterations + iteration))
        c.adapt(proposals.fooled)
    meter.finish()
    return search.record.points


def latent_lagrange(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float = 4.0,
    *,
    generator: nn.Module | None = None,
    classifier: nn.Module | None = None,
    latents: Tensor | None = None,
    iterations: int = 10_000,
    learning_rate: float = 0.05,
    multiplier: float = 1_000.0,
    multiplier_rate: float = 10_000.0,
    noises: int = 100,
    noise_norm: float = 0.5,
    confidence: float = 1.0,
    inversion_restarts: int = 20,
    inversion_steps: int = 50_000,
    early_stop: bool = True,
    targeted: bool = False,
    eot: int = 1,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> Tensor:
    """The overpowered attack of "The robust manifold defense" (Jalal et al., 2017), as used to break Defense-GAN.

    Maximises over z the classifier's margin at G(z), averaged over noise of a fixed norm (a projection does not
    return exactly to G(z)), under the constraint that G(z) lies within ``epsilon`` of the image in l2. A Lagrange
    multiplier holds the constraint: each step raises it by ``multiplier_rate`` times the excess of the mean squared
    distance over its bound, never below 0; where the mean squared distance is below half its bound the constraint
    does not pull. Unlike the published code, distances are those of the returned point from the image, the nearest
    and not the last point counts, and images do not wait for each other.

    Args:
        model: the defended model, images to logits [N, classes], which decides what is broken.
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: l2 radius, above 0.
        generator: latents [N, k] to images; None: that of the projector at the head of ``model``.
        classifier: images to logits; None: what follows the projector in ``model``.
        latents: [N, k] to start from, such as ``projector.project(images).latents``; None: by inversion here.
        iterations: of Adam; the rate falls to a tenth after 0.8 of them.
        learning_rate: of Adam on the latent.
        multiplier: of the constraint on the mean squared distance, at the start.
        multiplier_rate: of its ascent.
        noises: noise vectors drawn at every step.
        noise_norm: their l2 norm.
        confidence: mean margin from which a proposal is shown to the model.
        inversion_restarts: starting points of the inversion, of which the best is used.
        inversion_steps: of the inversion.
        early_stop: an image that is broken is dropped from the work; False looks for a nearer one.
        targeted: search for the class of ``labels`` instead of leaving it.
        eot: copies of every proposal shown to the model, all of which must be wrong; above 1 for randomised
            defences.
        seed: with an image's pixels it decides starting points and noise.
        value_range: (low, high) of the pixels and of the generator.
        progress: called with (done, total) after every step.

    Returns:
        [N, C, H, W], detached: the nearest broken point; the image itself where none is within ``epsilon``.

    Raises:
        ValueError: an argument does not fit, or ``model`` is no ``nn.Sequential(projector, ...)`` and generator and
            classifier are not given.
        RuntimeError: the classifier passes no gradient to the latent.

    Example:
        >>> latents = projector.project(images).latents
        >>> adversarial = latent_lagrange(defended, images, labels, latents=latents, iterations=1000, noises=10)
    """
    check(images, labels, epsilon, value_range, "l2")
    check_count("iterations", iterations)
    check_count("noises", noises)
    for name, value in (("epsilon", epsilon), ("learning_rate", learning_rate)):
        check_positive(name, value)
    for name, value in (("multiplier", multiplier), ("multiplier_rate", multiplier_rate)):
        check_positive(name, value, zero=True)
    check_positive("noise_norm", noise_norm, zero=True)
    search = _Search(model, generator, classifier, images, labels, epsilon, "l2", value_range, targeted, eot)
    search.early_stop = early_stop
    meter = Meter(progress, len(images) * ((inversion_steps if latents is None else 0) + iterations))
    streams = Streams(images, seed, "latent_lagrange")
    adam = Adam.begin(search.begin(latents, streams, inversion_restarts, inversion_steps, meter))
    before, rows = meter.done, torch.arange(len(images), device=images.device)
    going = search.going(rows)
    rows, adam = rows[going], adam.keep(going)
    multipliers = torch.full((len(rows),), float(multiplier), dtype=torch.float64, device=images.device)
    proposals, pixels = _Proposals(images), images[0].numel() if len(images) else 1
    bound = epsilon**2 / pixels
    for iteration in range(1, iterations + 1):
        if len(rows) == 0:
            break
        noise = _noise(streams, rows, (noises, *images.shape[1:]), noise_norm).to(images)

        def loss(seen: _Seen, multipliers: Tensor = multipliers) -> Tensor:
            excess = torch.where(seen.squares / pixels > bound / 2, seen.squares / pixels, 0.0)
            return multipliers * excess - seen.margins

        seen = search.differentiate(rows, adam.values, loss, first=iteration == 1, noise=noise)
        proposals.offer(rows, seen, seen.margins >= confidence)
        rate = learning_rate * (LATE_FACTOR if iteration > LATE * iterations else 1.0)
        adam = adam.step(seen.gradients, iteration, rate)
        multipliers = (multipliers + multiplier_rate * (seen.squares / pixels - bound)).clamp(min=0)
        if iteration % max(iterations // JUDGEMENTS, 1) == 0 or iteration == iterations:
            search.judge(rows, proposals.take(rows))
            going = search.going(rows)
            rows, adam, multipliers = rows[going], adam.keep(going), multipliers[going]
        meter.at(before + len(images) * iteration)
    meter.finish()
    return search.record.points


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


# --- what both searches share -------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """The generator's images of M latents and what the classifier makes of them."""

    points: Tensor  # [M, C, H, W]
    squares: Tensor  # [M] float64, squared l2 distance from the images
    margins: Tensor  # [M] float64, positive where the classifier is fooled; mean over the noise
    gradients: Tensor  # [M, k], of the loss


class _Proposals:
    """The nearest image of each row that fools the classifier, since the model was last asked."""

    def __init__(self, images: Tensor) -> None:
        self.fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self._points = images.detach().clone()
        self._squares = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
        self._latest = self._points

    def offer(self, rows: Tensor, seen: _Seen, fooled: Tensor) -> None:
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


class _Search:
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
        check_count("inversion_restarts", restarts)
        check_count("inversion_steps", steps, 0)
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
        loss: Callable[[_Seen], Tensor],
        first: bool,
        noise: Tensor | None = None,
    ) -> _Seen:
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
            seen = _Seen(points.detach(), squares, won, points)
            if first and not bool(torch.autograd.grad(won.sum(), variable, retain_graph=True)[0].any()):
                raise RuntimeError("classifier must pass gradients to the latent, got zeros for all images")
            (gradients,) = torch.autograd.grad(loss(seen).sum(), variable)
        return _Seen(points.detach(), squares.detach(), won.detach(), gradients)


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


def _noise(streams: Streams, rows: Tensor, shape: tuple[int, ...], norm: float) -> Tensor:
    """Random vectors of one l2 norm, [M, S, C, H, W] float64."""
    drawn = streams.normal(rows, shape)
    lengths = drawn.flatten(2).square().sum(2).sqrt()
    return norm * drawn / lengths.view(*lengths.shape, 1, 1, 1)
