"""Attacks in the generator's latent space: the adversarial image is one that the generator can draw.

Projecting an image that lies on the generator's range leaves it as it is, so a defence by projection has nothing to
take away. Both attacks search for a latent whose image is close to the one under attack and is read as another
class. What they propose is cut to the budget around that image, shown to the whole defended model, and believed
only if the model is fooled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defgan_fast import arguments
from defgan_fast.attacks._adam import Adam
from defgan_fast.attacks._budget import check
from defgan_fast.attacks._latent_search import LatentSearch, Proposals, Seen
from defgan_fast.attacks._meter import Meter, Progress
from defgan_fast.attacks._streams import Streams
from defgan_fast.attacks.carlini_wagner import Constants

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
        arguments.count(name, count)
    for name, value in (("learning_rate", learning_rate), ("initial_c", initial_c)):
        arguments.number(name, value, above=0)
    arguments.number("confidence", confidence, least=0)
    search = LatentSearch(
        model, generator, classifier, images, labels, epsilon, norm, value_range, targeted, eot
    )
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
        proposals = Proposals(images)
        for iteration in range(1, iterations + 1):
            if len(rows) == 0:
                break
            weights = c.values[rows]

            def loss(seen: Seen, weights: Tensor = weights) -> Tensor:
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
    arguments.count("iterations", iterations)
    arguments.count("noises", noises)
    for name, value in (("epsilon", epsilon), ("learning_rate", learning_rate)):
        arguments.number(name, value, above=0)
    for name, value in (("multiplier", multiplier), ("multiplier_rate", multiplier_rate)):
        arguments.number(name, value, least=0)
    arguments.number("noise_norm", noise_norm, least=0)
    search = LatentSearch(
        model, generator, classifier, images, labels, epsilon, "l2", value_range, targeted, eot
    )
    search.early_stop = early_stop
    meter = Meter(progress, len(images) * ((inversion_steps if latents is None else 0) + iterations))
    streams = Streams(images, seed, "latent_lagrange")
    adam = Adam.begin(search.begin(latents, streams, inversion_restarts, inversion_steps, meter))
    before, rows = meter.done, torch.arange(len(images), device=images.device)
    going = search.going(rows)
    rows, adam = rows[going], adam.keep(going)
    multipliers = torch.full((len(rows),), float(multiplier), dtype=torch.float64, device=images.device)
    proposals, pixels = Proposals(images), images[0].numel() if len(images) else 1
    bound = epsilon**2 / pixels
    for iteration in range(1, iterations + 1):
        if len(rows) == 0:
            break
        noise = _noise(streams, rows, (noises, *images.shape[1:]), noise_norm).to(images)

        def loss(seen: Seen, multipliers: Tensor = multipliers) -> Tensor:
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


def _noise(streams: Streams, rows: Tensor, shape: tuple[int, ...], norm: float) -> Tensor:
    """Random vectors of one l2 norm, [M, S, C, H, W] float64."""
    drawn = streams.normal(rows, shape)
    lengths = drawn.flatten(2).square().sum(2).sqrt()
    return norm * drawn / lengths.view(*lengths.shape, 1, 1, 1)
