"""The projection in plain PyTorch: the specification that every kernel is tested against.

L steps of gradient descent with heavy-ball momentum on the latent, from R starting points an image
(paper, section 3.1 and Appendix; the released code minimises the mean over pixels and channels of
`(G(z) - x)^2`, where equation 8 has the sum, which only rescales the learning rate):

    v <- momentum * v + d loss / dz,    z <- z - lr * v

then one more evaluation of the loss, which selects the restart. Any floating dtype: the latent and its
velocity are float64 where the generator is, else float32. Slow, readable, and differentiable by recomputation.
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


class Descent(NamedTuple):
    """The settings of a descent that every step needs, in the order in which `project` takes them.

    Attributes:
        lr_schedule: the learning rate of each step, length L.
        momentum: of the heavy ball.
    """

    lr_schedule: list[float]
    momentum: float


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


def descend(
    decoder: Decoder, images: Tensor, z0: Tensor, lr_schedule: Sequence[float], momentum: float
) -> list[tuple[Tensor, Tensor]]:
    """Returns the whole trajectory of every row.

    Args:
        decoder: the generator.
        images: targets, one for each row, [N, C, H, W].
        z0: starting points, [N, k].
        lr_schedule: the learning rate of each step, length L.
        momentum: of the heavy ball.

    Returns:
        L + 1 pairs (latents, velocity), each [N, k].
    """
    z, velocity = z0.detach().clone(), torch.zeros_like(z0)
    trajectory = [(z, velocity)]
    for rate in lr_schedule:
        gradient = latent_gradient(decoder, z.detach().requires_grad_(), images)
        velocity = momentum * velocity + gradient
        z = z - rate * velocity
        trajectory.append((z, velocity))
    return trajectory


def project(
    decoder: Decoder,
    images: Tensor,
    z0: Tensor,
    lr_schedule: Sequence[float],
    momentum: float,
    max_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Projects every image from every starting point.

    Args:
        decoder: the generator.
        images: [B, C, H, W].
        z0: [R, k] (shared by all images) or [B, R, k].
        lr_schedule: the learning rate of each step, length L.
        momentum: of the heavy ball.
        max_rows: rows (image x restart) in flight; None: all.

    Returns:
        latents [B, R, k] and their mean squared errors [B, R].
    """
    # Inference tensors cannot take part in a graph, and the descent needs one whatever the caller's mode.
    with torch.inference_mode(False), torch.enable_grad():
        images, z0 = images.detach().clone(), z0.detach().clone()
        count = images.shape[0]
        start = z0.expand(count, *z0.shape) if z0.dim() == 2 else z0
        restarts, k = start.shape[1:]
        total = count * restarts
        latents, errors = start.new_empty(total, k), start.new_empty(total)
        chunk = total if max_rows is None else max_rows
        for first in range(0, total, max(chunk, 1)):
            rows = torch.arange(first, min(first + chunk, total), device=images.device)
            targets = images[rows // restarts]
            z, _ = descend(decoder, targets, start.reshape(total, k)[rows], lr_schedule, momentum)[-1]
            with torch.no_grad():
                latents[rows] = z
                errors[rows] = reconstruction_errors(decoder, z, targets).to(errors.dtype)
        return latents.view(count, restarts, k), errors.view(count, restarts)


def unrolled_gradient(
    decoder: Decoder,
    images: Tensor,
    z0: Tensor,
    lr_schedule: Sequence[float],
    momentum: float,
    gradient: Tensor,
) -> Tensor:
    """Returns the reconstruction's gradient with respect to the image, through all L steps of one restart.

    Latents of the trajectory are kept (they are small), activations are recomputed step by step, so memory
    does not grow with L but for 2 k floats a row and step.

    Args:
        decoder: the generator.
        images: [B, C, H, W].
        z0: the starting point of each image's chosen restart, [B, k].
        lr_schedule: the learning rate of each step, length L.
        momentum: of the heavy ball.
        gradient: of some scalar with respect to the reconstruction, [B, C, H, W].

    Returns:
        Its gradient with respect to the images, [B, C, H, W].
    """
    with torch.inference_mode(False), torch.enable_grad():
        images, z0, gradient = images.detach().clone(), z0.detach().clone(), gradient.detach().clone()
        if not len(images):
            return torch.zeros_like(images)
        trajectory = descend(decoder, images, z0, lr_schedule, momentum)
        last = trajectory[-1][0].detach().requires_grad_()
        (to_latent,) = torch.autograd.grad(decoder(last), last, gradient)
        to_velocity = torch.zeros_like(to_latent)
        to_images = torch.zeros_like(images)
        for (z, velocity), rate in zip(reversed(trajectory[:-1]), reversed(lr_schedule), strict=True):
            z, velocity = z.detach().requires_grad_(), velocity.detach().requires_grad_()
            x = images.detach().requires_grad_()
            next_velocity = momentum * velocity + latent_gradient(decoder, z, x, create_graph=True)
            next_z = z - rate * next_velocity
            to_latent, to_velocity, step = torch.autograd.grad(
                (next_z, next_velocity), (z, velocity, x), (to_latent, to_velocity)
            )
            to_images = to_images + step
        return to_images


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
