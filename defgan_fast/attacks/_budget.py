"""What an attack may do to an image: the norm, its radius and the range of the pixels, each checked in one place.

An attack calls :func:`check` on what it was given, moves inside a :class:`Budget`, and believes that an image is
broken only where :meth:`Budget.holds` says so. Distances are measured in float64 between the returned point and
the original image, never on a reconstruction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from defgan_fast import arguments

NORMS = ("linf", "l2")
# Images that were resampled leave their range by a few units in the last place.
RANGE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Budget:
    """The ball of radius ``epsilon`` around an image, cut by the range of the pixels.

    Attributes:
        norm: "linf", the largest change of a pixel, or "l2", the root of the summed squares of all changes.
        epsilon: radius of the ball; infinity leaves only the range.
        value_range: (low, high) of the pixels.
    """

    norm: str
    epsilon: float
    value_range: tuple[float, float]

    def distances(self, points: Tensor, images: Tensor) -> Tensor:
        """Returns how far each point [N, C, H, W] is from its image in the norm, [N] float64."""
        change = points.double().sub(images.double()).flatten(1)
        return change.abs().amax(1) if self.norm == "linf" else change.square().sum(1).sqrt()

    def holds(self, points: Tensor, images: Tensor) -> Tensor:
        """Returns which points [N, C, H, W] are inside the ball and the range, [N] bool; NaN is outside.

        The tolerance is the rounding of the points' own dtype: half a unit in the last place of every pixel, and of
        the radius. In float32 it is below 1e-5; 16-bit images cannot keep a budget more exactly than this.
        """
        low, high = self.value_range
        precision = torch.finfo(points.dtype).eps
        unit = precision / 2 * max(abs(low), abs(high))
        many = 1.0 if self.norm == "linf" else math.sqrt(points[0].numel() if len(points) else 1)
        flat = points.flatten(1)
        in_range = (flat.amin(1) >= low - unit) & (flat.amax(1) <= high + unit)
        return in_range & (self.distances(points, images) <= self.epsilon * (1 + precision) + unit * many)

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        """Returns the nearest allowed points, [N, C, H, W]: first into the ball, then into the range."""
        low, high = self.value_range
        if self.norm == "linf":
            floor = (images - self.epsilon).clamp(min=low)
            ceiling = (images + self.epsilon).clamp(max=high)
            return torch.minimum(torch.maximum(points, floor), ceiling)
        change = points - images
        length = norms(change)
        shrink = torch.where(length > self.epsilon, self.epsilon / length, 1.0)
        return (images + change * over_pixels(shrink, images)).clamp(low, high)

    def ascent(self, gradients: Tensor) -> Tensor:
        """Returns the step of norm 1 that gains most along the gradients, [N, C, H, W]; 0 where they are 0."""
        if self.norm == "linf":
            return gradients.sign()
        length = norms(gradients)
        return gradients * over_pixels(torch.where(length > 0, 1 / length, 0.0), gradients)


def norms(values: Tensor) -> Tensor:
    """Returns the l2 norm of each row of [N, ...], summed in float64, as [N] float64."""
    return values.double().flatten(1).square().sum(1).sqrt()


def over_pixels(factors: Tensor, images: Tensor) -> Tensor:
    """Returns one factor an image, [N] of any dtype, as [N, 1, 1, 1] in the images' dtype."""
    return factors.to(images.dtype).view(-1, *(1,) * (images.dim() - 1))


def check(
    images: Tensor,
    labels: Tensor,
    epsilon: float | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    norm: str = "linf",
) -> None:
    """Raises ValueError, naming the argument, where an attack could not mean what it computes.

    An ``epsilon`` of None says that the attack is not bounded.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point [N, C, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{len(images)}], got {labels.dtype} {tuple(labels.shape)}")
    if labels.device != images.device:
        raise ValueError(f"labels must be on the images' device {images.device}, got {labels.device}")
    if epsilon is not None and epsilon != math.inf:  # no budget at all
        arguments.number("epsilon", epsilon, least=0)
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")
    if images.numel() == 0:
        return
    slack = RANGE_TOLERANCE * (high - low)
    least, most = float(images.detach().amin()), float(images.detach().amax())
    if not (low - slack <= least and most <= high + slack):
        raise ValueError(f"images must lie in value_range [{low:g}, {high:g}], got [{least:g}, {most:g}]")
