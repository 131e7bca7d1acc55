"""Where the descents of one call begin: latents that a seed draws.

`starts="random"` takes the drawn latents as starting points. `starts="nearest"` takes those whose images are nearest to
the image that is projected; the drawn latents are its candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import candidates, starts

STARTS = ("random", "nearest")


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
