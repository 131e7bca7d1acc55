"""The projection in plain PyTorch: the specification that every kernel is tested against.

L steps of gradient descent with heavy-ball momentum on the latent, from R starting points an image
(paper, section 3.1 and Appendix; the released code minimises the mean over pixels and channels of
`(G(z) - x)^2`, where equation 8 has the sum, which only rescales the learning rate):

    v <- momentum * v + d loss / dz,    z <- z - lr * v

then one more evaluation of the loss, which selects the restart. Latents may be held on a sphere (`on_sphere`), and
after some steps only the best restarts of each image may go on (`project_keeping`). Any floating dtype: the latent and
its velocity are float64 where the generator is, else float32. Slow, readable, and differentiable by recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Decoder = Callable[[Tensor], Tensor]
"""Maps latents [N, k] to images [N, C, H, W]."""


WORKING_BYTES = 200_000_000
"""What a projection's working memory may take where nobody names `max_rows`."""


Keep = tuple[tuple[int, int], ...]
"""Pairs (step, rows): after that many steps only that many rows of each image, those of least error, go on. Steps
rise and lie in [0, L), rows are at least 1 and do not rise."""


class Descent(NamedTuple):
    """The settings of a descent.

    Attributes:
        lr_schedule: the learning rate of each step, length L.
        momentum: of the heavy ball.
        radius: the norm to which latents are scaled (`on_sphere`); 0: they are free.
        keep: which rows go on after some steps; empty: all rows take all steps.
    """

    lr_schedule: list[float]
    momentum: float
    radius: float = 0.0
    keep: Keep = ()


def learning_rates(steps: int, lr: float, lr_decay: float, decay_at: float) -> list[float]:
    """Returns the staircase of the released code: `lr`, from step ceil(decay_at * steps) on `lr * lr_decay`."""
    start = math.ceil(round(decay_at * steps, 9))
    return [lr if step < start else lr * lr_decay for step in range(steps)]


def reconstruction_errors(decoder: Decoder, latents: Tensor, images: Tensor) -> Tensor:
    """Returns the mean squared error of each row: latents [N, k], images [N, C, H, W] -> [N]."""
    return (decoder(latents) - images).square().flatten(1).mean(1)


def latent_gradient(decoder: Decoder, latents: Tensor, images: Tensor, create_graph: bool = False) -> Tensor:
    """Returns the gradient of each row's error with respect to its own latent, [N, k].

    `latents` must require a gradient.
    """
    total = reconstruction_errors(decoder, latents, images).sum()
    (gradient,) = torch.autograd.grad(total, latents, create_graph=create_graph)
    return gradient


def on_sphere(latents: Tensor, radius: float) -> Tensor:
    """Scales latents [N, k] to the norm `radius`, each by itself.

    The norm is taken in float64. A latent of norm zero has no direction and stays zero; one that is not finite does
    not become finite. A radius of 0 leaves all latents as they are.
    """
    if radius == 0:
        return latents
    wide = latents.double()
    norm = wide.norm(dim=1, keepdim=True)
    return (wide * (radius / norm.where(norm != 0, radius))).to(latents.dtype)


def descend(
    decoder: Decoder,
    images: Tensor,
    z0: Tensor,
    lr_schedule: Sequence[float],
    momentum: float,
    radius: float = 0.0,
    velocity: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Returns the whole trajectory of every row.

    Args:
        decoder: the generator.
        images: targets, one for each row, [N, C, H, W].
        z0: starting points, [N, k].
        lr_schedule: the learning rate of each step, length L.
        momentum: of the heavy ball.
        radius: z0 and the latent after every step are scaled to this norm; the velocity stays as it is. 0: none is.
        velocity: that with which a descent goes on from z0, [N, k]; None: it begins there, with a velocity of zero.

    Returns:
        L + 1 pairs (latents, velocity), each [N, k].
    """
    z = z0.detach().clone()
    if velocity is None:
        z, velocity = on_sphere(z, radius), torch.zeros_like(z)
    trajectory = [(z, velocity)]
    for rate in lr_schedule:
        gradient = latent_gradient(decoder, z.detach().requires_grad_(), images)
        velocity = momentum * velocity + gradient
        z = on_sphere(z - rate * velocity, radius)
        trajectory.append((z, velocity))
    return trajectory


def rows_that_fit(image_shape: Sequence[int]) -> int:
    """Returns the rows whose steps keep within `WORKING_BYTES`, for images [C, H, W].

    Autograd keeps every activation, of which 256 floats a pixel are a generous bound. So many rows also take a fraction
    of a second a step, between which Python runs the handlers of signals.
    """
    return max(1, WORKING_BYTES // (256 * 4 * max(1, math.prod(image_shape))))


def project(
    decoder: Decoder,
    images: Tensor,
    z0: Tensor,
    lr_schedule: Sequence[float],
    momentum: float,
    max_rows: int | None = None,
    radius: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Projects every image from every starting point; all rows take all steps.

    Args:
        decoder: the generator.
        images: [B, C, H, W].
        z0: [R, k] (shared by all images) or [B, R, k].
        lr_schedule: the learning rate of each step, length L; L may be 0.
        momentum: of the heavy ball.
        max_rows: rows (image x restart) in flight; None: all.
        radius: the norm to which latents are scaled at the start and after every step; 0: they are free.

    Returns:
        latents [B, R, k] and their mean squared errors [B, R].
    """
    latents, errors, _ = project_keeping(decoder, images, z0, lr_schedule, momentum, (), max_rows, radius)
    return latents, errors


def project_keeping(
    decoder: Decoder,
    images: Tensor,
    z0: Tensor,
    lr_schedule: Sequence[float],
    momentum: float,
    keep: Sequence[tuple[int, int]],
    max_rows: int | None = None,
    radius: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects every image from every starting point, and drops rows on the way.

    After `step` steps, for each pair of `keep`, the `rows` rows of least error of each image go on with their
    velocities: NaN comes last, the lowest index first among equals. Where there are no more than `rows`, all go on.

    Args:
        keep: pairs (step, rows), as `Keep` says; the other arguments are those of `project`.

    Returns:
        latents [B, R, k], their mean squared errors [B, R], and how many steps each row took, [B, R] int64. A dropped
        row has the latent and the error with which it stopped.
    """
    # Inference tensors cannot take part in a graph, and the descent needs one whatever the caller's mode.
    with torch.inference_mode(False), torch.enable_grad():
        images, z0 = images.detach().clone(), z0.detach().clone()
        count = images.shape[0]
        start = z0.expand(count, *z0.shape) if z0.dim() == 2 else z0
        restarts, k = start.shape[1:]
        latents, velocity = start.reshape(-1, k).clone(), torch.zeros_like(start).reshape(-1, k)
        errors = latents.new_empty(count * restarts)
        steps = torch.zeros(count * restarts, dtype=torch.int64, device=latents.device)
        rows = torch.arange(count * restarts, device=latents.device)  # that are still descending
        taken = None  # steps, so far
        for end, kept in (*keep, (len(lr_schedule), 0)):
            for some in rows.split(max(1, len(rows) if max_rows is None else max_rows)):
                targets = images[some // restarts]
                carried = None if taken is None else velocity[some]
                rates = lr_schedule[taken or 0 : end]
                latents[some], velocity[some] = descend(
                    decoder, targets, latents[some], rates, momentum, radius, carried
                )[-1]
                with torch.no_grad():
                    errors[some] = reconstruction_errors(decoder, latents[some], targets).to(errors.dtype)
            steps[rows] = taken = end
            if kept:
                rows = rows[_least(errors[rows].view(count, len(rows) // max(count, 1)), kept).flatten()]
        return latents.view(count, restarts, k), errors.view(count, restarts), steps.view(count, restarts)


def _least(errors: Tensor, kept: int) -> Tensor:
    """Returns the indices into errors [B, R], flattened, of each image's `kept` least ones, [B, min(kept, R)]."""
    order = errors.argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values  # NaN is the greatest
    return order + errors.shape[1] * torch.arange(len(errors), device=errors.device)[:, None]


def unrolled_gradient(
    decoder: Decoder,
    images: Tensor,
    z0: Tensor,
    lr_schedule: Sequence[float],
    momentum: float,
    gradient: Tensor,
    radius: float = 0.0,
    steps: Tensor | None = None,
) -> Tensor:
    """Returns the reconstruction's gradient with respect to the image, through all steps of one restart.

    Latents of the trajectory are kept (they are small), activations are recomputed step by step, so memory
    does not grow with L but for 2 k floats a row and step. A large batch is cut: a step of each piece keeps what it
    computes of a gradient to differentiate it again, so a quarter of `rows_that_fit` is as much work as a step of
    `project`.

    Args:
        decoder: the generator.
        images: [B, C, H, W].
        z0: the starting point of each image's chosen restart, [B, k].
        lr_schedule: the learning rate of each step, length L.
        momentum: of the heavy ball.
        gradient: of some scalar with respect to the reconstruction, [B, C, H, W].
        radius: the norm to which latents are scaled; 0: they are free.
        steps: how many steps the chosen restart took, [B]; None: all of them.

    Returns:
        Its gradient with respect to the images, [B, C, H, W].
    """
    rows = max(1, rows_that_fit(images.shape[1:]) // 4)
    if len(images) > rows:
        cuts = [slice(first, first + rows) for first in range(0, len(images), rows)]
        pieces = [
            unrolled_gradient(
                decoder,
                images[cut],
                z0[cut],
                lr_schedule,
                momentum,
                gradient[cut],
                radius,
                None if steps is None else steps[cut],
            )
            for cut in cuts
        ]
        return torch.cat(pieces)
    with torch.inference_mode(False), torch.enable_grad():
        images, z0, gradient = images.detach().clone(), z0.detach().clone(), gradient.detach().clone()
        if not len(images):
            return torch.zeros_like(images)
        trajectory = descend(decoder, images, z0, lr_schedule, momentum, radius)
        last = trajectory[-1][0]
        if steps is not None:
            latents = torch.stack([z for z, _ in trajectory], 1)
            last = latents[torch.arange(len(latents), device=steps.device), steps]
        last = last.detach().requires_grad_()
        (to_latent,) = torch.autograd.grad(decoder(last), last, gradient)
        to_velocity = torch.zeros_like(to_latent)
        to_images = torch.zeros_like(images)
        for step in reversed(range(len(lr_schedule))):
            z, velocity, x = (t.detach().requires_grad_() for t in (*trajectory[step], images))
            next_velocity = momentum * velocity + latent_gradient(decoder, z, x, create_graph=True)
            next_z = on_sphere(z - lr_schedule[step] * next_velocity, radius)
            before = torch.autograd.grad((next_z, next_velocity), (z, velocity, x), (to_latent, to_velocity))
            if steps is not None:  # a row that had stopped by then was not changed by this step
                stopped = (to_latent, to_velocity, torch.zeros_like(images))
                before = tuple(
                    torch.where((steps > step).view(-1, *(1,) * (moved.dim() - 1)), moved, left)
                    for moved, left in zip(before, stopped, strict=True)
                )
            to_latent, to_velocity, to_image = before
            to_images = to_images + to_image
        return to_images


def unrolled_tangent(
    decoder: Decoder,
    images: Tensor,
    z0: Tensor,
    lr_schedule: Sequence[float],
    momentum: float,
    tangent: Tensor,
    radius: float = 0.0,
    steps: Tensor | None = None,
) -> Tensor:
    """Returns the reconstruction's directional derivative, through all steps of one restart.

    Args:
        decoder: the generator.
        images: [B, C, H, W].
        z0: the starting point of each image's chosen restart, [B, k].
        lr_schedule: the learning rate of each step, length L.
        momentum: of the heavy ball.
        tangent: the direction in which the images change, [B, C, H, W].
        radius: the norm to which latents are scaled; 0: they are free.
        steps: how many steps the chosen restart took, [B]; None: all of them.

    Returns:
        The direction in which the reconstruction changes, [B, C, H, W].
    """
    with torch.inference_mode(False), torch.enable_grad():
        images, z0, tangent = images.detach().clone(), z0.detach().clone(), tangent.detach().clone()
        if not len(images):
            return torch.zeros_like(images)
        trajectory = descend(decoder, images, z0, lr_schedule, momentum, radius)
        z_tangent = velocity_tangent = torch.zeros_like(z0)
        for step, rate in enumerate(lr_schedule):
            z, velocity = trajectory[step]
            point = z.detach().requires_grad_(), images.detach().requires_grad_()
            total = reconstruction_errors(decoder, *point).sum()
            slopes = torch.autograd.grad(total, point, create_graph=True)
            # Second derivatives are symmetric: how the latent's gradient changes along the tangents is the latent's
            # gradient of how the error changes along them.
            along = (slopes[0] * z_tangent).sum() + (slopes[1] * tangent).sum()
            (gradient_tangent,) = torch.autograd.grad(along, point[0])
            velocity_tangent = momentum * velocity_tangent + gradient_tangent
            free = z - rate * (momentum * velocity + slopes[0].detach())
            moved = _pushforward(lambda z: on_sphere(z, radius), free, z_tangent - rate * velocity_tangent)
            z_tangent = moved if steps is None else torch.where((steps > step)[:, None], moved, z_tangent)
        last = trajectory[-1][0]
        if steps is not None:
            last = torch.stack([z for z, _ in trajectory], 1)[
                torch.arange(len(z0), device=steps.device), steps
            ]
        return _pushforward(decoder, last, z_tangent)


def _pushforward(function: Decoder, at: Tensor, tangent: Tensor) -> Tensor:
    found: Tensor = torch.autograd.functional.jvp(function, at.detach(), tangent)[1]
    return found.detach()


def best_restarts(errors: Tensor) -> Tensor:
    """Returns the index of each image's least error, [B, R] -> [B]; NaN never wins, the lowest index wins ties."""
    return torch.where(torch.isnan(errors), math.inf, errors).argmin(1)


def takes_part(draws: Tensor, candidates: int) -> Tensor:
    """Says which candidates an image's draw lets take part: a half of them, one of each pair (2j, 2j + 1).

    Bit j % 64 of word j // 64 chooses the second of the pair where it is set. The words of a draw d are those that
    SplitMix64 gives after the state mix(d) (Steele, Lea, Flood, OOPSLA 2014), so a random d gives a random half.

    Args:
        draws: one number an image, [B] int64.
        candidates: N.

    Returns:
        [B, N] bool.
    """

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    index = np.arange(candidates)
    start = mix(draws.cpu().numpy().astype(np.uint64))[:, None]
    step = (index // 128 + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    second = (mix(start + step) >> (index // 2 % 64).astype(np.uint64)) & np.uint64(1)
    return torch.from_numpy(second == (index % 2).astype(np.uint64)).to(draws.device)


def nearest(images: Tensor, candidate_images: Tensor, restarts: int, draws: Tensor | None = None) -> Tensor:
    """Finds the R candidates of least mean squared error for each image, in float64.

    Args:
        images: [B, C, H, W].
        candidate_images: the decoded candidates, [N, C, H, W].
        restarts: R, at most N.
        draws: one number an image, [B] int64: candidates that it does not let take part (`takes_part`) come after
            those that it does. None: all take part.

    Returns:
        Indices [B, R] int64 in order of distance, the lowest index first among equals. Candidates whose images are
        not finite come last. For an image that is not finite, 0 to R - 1.
    """
    targets, known = images.detach().double().flatten(1), candidate_images.detach().double().flatten(1)
    usable = known.isfinite().all(1)
    found = torch.empty(len(targets), restarts, dtype=torch.int64, device=images.device)
    allowed = None if draws is None else takes_part(draws, len(known))
    for row, target in enumerate(targets):
        order = torch.arange(len(known), device=images.device)
        if target.isfinite().all():
            # Stable sorts by the least important key first.
            order = (known - target).square().mean(1).where(usable, math.inf).argsort(stable=True)
            if allowed is not None:
                order = order[(~allowed[row, order]).to(torch.uint8).argsort(stable=True)]
            order = order[(~usable[order]).to(torch.uint8).argsort(stable=True)]
        found[row] = order[:restarts]
    return found
