"""Where the descents of one call begin: latents that a seed draws.

`starts="random"` takes the drawn latents as starting points. `starts="nearest"` takes those whose images are nearest to
the image that is projected; the drawn latents are its candidates.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import candidates, starts
from .plan import Plan
from .plan.latents import failure_of
from .settings import Settings


class Origin(NamedTuple):
    """All that drawn latents depend on.

    Attributes:
        starts: one of `STARTS`.
        seed: any int.
        number: R of starting points, or N of candidates.
        latent_size: k.
        std: of every coordinate; None: 1 / sqrt(k) for starting points, 1 for candidates.
        radius: the norm of candidates, 0 where it is free. Starting points are scaled by the descent.
    """

    starts: str
    seed: int
    number: int
    latent_size: int
    std: float | None
    radius: float

    def draw(self) -> Tensor:
        """Returns the latents [number, k] float32 on the CPU."""
        if self.starts == "random":
            return starts.starting_points(self.seed, self.number, self.latent_size, self.std)
        return candidates.candidate_latents(*self._of_candidates())

    def draw_in_graph(self) -> Tensor:
        """Returns the same by way of an operator, so that torch.compile and torch.export take the call as it is."""
        if self.starts == "random":
            return starts.seeded(self.seed, self.number, self.latent_size, self.std)
        seed, *others = self._of_candidates()
        found: Tensor = torch.ops.defgan_fast.candidate_latents(starts.signed(seed), *others)
        return found

    def _of_candidates(self) -> tuple[int, int, int, float, float | None]:
        return self.seed, self.number, self.latent_size, self.std or 1.0, self.radius or None


def fresh_draws(images: Tensor) -> Tensor:
    """Returns a number for each image from torch's global random state, [B] int64, which chooses its candidates."""
    shape = (images.shape[0],)
    return torch.randint(-(2**62), 2**62, shape, dtype=torch.int64, device=images.device)


def that_fit(count: int, image_shape: Sequence[int] | None, restarts: int) -> int:
    """Returns how many candidates are used: decoded, they take at most 200 MB, where their images' shape is known.

    Raises:
        ValueError: there are fewer than `restarts`.
    """
    used = count if image_shape is None else min(count, candidates.candidates_that_fit(image_shape))
    if used < restarts:
        fit = "" if used == count else f" that fit in 200 MB of decoded images (of {count})"
        raise ValueError(f"candidates must be at least restarts ({restarts}), got {used}{fit}")
    return used


class Origins(Settings):
    """A module that finds where the descents of a call begin, from its settings and what its generator tells.

    Attributes:
        latent_size: k; None where the generator does not tell.
    """

    latent_size: int | None
    _plan: Plan | None
    _warned: set[str]  # of what; DataParallel's copies share it
    # Not buffers: converting the module's dtype must not round them, and they are not state.
    _latents: Tensor | None
    _latents_of: Origin | None

    def _no_latent_size(self) -> str:
        failure = failure_of(self.generator)
        name = type(self.generator).__name__
        return f"generator {name} does not tell its latent size{f' ({failure})' if failure else ''}"

    def _draw(self) -> None:
        """Draws the latents that the projector's own seed gives, unless they are at hand."""
        origin = self._origin(self.seed)
        if origin is not None and origin != self._latents_of:
            self._latents = origin.draw()
            self._latents_of = origin
            self._place_latents()

    def _place_latents(self) -> None:
        """Moves latents to the generator's device. On "meta" they would be lost, and they follow the images later."""
        if self._latents is not None and not self._is_meta():
            self._latents = self._latents.to(self._device() or "cpu")

    def _origin(self, seed: int | None) -> Origin | None:
        """Returns what the latents of a seed depend on; None where none are drawn by a seed."""
        k, shape = self.latent_size, None if self._plan is None else self._plan.image_shape
        if self.starts == "nearest":
            count = self._fitting(shape)
            if self._own_candidates is not None or k is None:
                return None
            return Origin("nearest", seed or 0, count, k, self.start_std, self._radius(k))
        if seed is None or k is None:
            return None
        return Origin("random", seed, self.restarts, k, self.start_std, 0.0)

    def _fitting(self, image_shape: Sequence[int] | None) -> int:
        """Returns how many candidates are used for images of a shape, None where it is not known yet."""
        own, given = self._own_candidates, self.candidates
        if own is not None and self.latent_size not in (None, own.shape[1]):
            raise ValueError(f"candidates must have shape [N, {self.latent_size}], got {list(own.shape)}")
        count = len(given) if isinstance(given, Tensor) else given
        used = that_fit(count, image_shape, self.restarts)
        if used < count and "fewer" not in self._warned and not torch.compiler.is_compiling():
            self._warned.add("fewer")
            warnings.warn(
                f"candidates: {used} of {count} are used, whose decoded images take 200 MB", stacklevel=5
            )
        return used

    def _drawn(self, images: Tensor, z0: Tensor | None, seed: int | None) -> Tensor:
        """Returns the starting points of a call, [R, k] or [B, R, k], or the candidates for them, [N, k]."""
        if z0 is not None:
            return z0
        if self.starts == "nearest" and self._own_candidates is not None:
            return self._own_candidates.to(images.device)
        if self.latent_size is None:
            raise ValueError(
                f"{self._no_latent_size()}: pass z0 or latent_size, or give it such an attribute"
            )
        origin = self._origin(seed)
        if origin is None:
            return starts.fresh(
                images.shape[0], self.restarts, self.latent_size, images.device, self.start_std
            )
        if origin == self._latents_of and self._latents is not None:
            return self._latents.to(images.device)
        return origin.draw_in_graph().to(images.device)
