"""The latents among whose images `starts="nearest"` looks for an image's starting points.

Candidate i is a function of (seed, i), the latent's size and its scale alone, so a longer list begins with a shorter
one, and the draw of candidates has a key of its own: candidates are never the restarts' random starting points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import starts

MAX_BYTES = 200 * 2**20
"""Decoded candidates, at 16 bits a pixel, take at most this much memory."""

# Restart r draws from the Philox key (seed, r); no restart has this index.
_STREAM = 2**64 - 1
_ROWS_AT_A_TIME = 1024


def candidates_that_fit(image_shape: Sequence[int]) -> int:
    """Returns how many candidates may be used with images of this shape [C, H, W] (`MAX_BYTES`)."""
    return MAX_BYTES // (2 * math.prod(image_shape))


def candidate_latents(
    seed: int, count: int, latent_size: int, std: float = 1.0, radius: float | None = None
) -> Tensor:
    """Draws the latents of all candidates, each from N(0, std^2 I).

    Philox counts and a Box-Muller transform in float64, as for the random starting points.

    Args:
        seed: any int; used modulo 2^64.
        count: N, at least 0.
        latent_size: k.
        std: the standard deviation of every coordinate.
        radius: where given, every latent is scaled to this norm, so that it is uniform on that sphere.

    Returns:
        [N, k] float32.
    """
    source = starts.philox(seed, _STREAM)
    latents = np.empty((count, latent_size), dtype=np.float32)
    for first in range(0, count, _ROWS_AT_A_TIME):
        rows = min(_ROWS_AT_A_TIME, count - first)
        normal = starts.normals(source, rows, latent_size)
        if radius is None:
            latents[first : first + rows] = normal * std
        else:
            latents[first : first + rows] = normal * (radius / np.linalg.norm(normal, axis=1, keepdims=True))
    return torch.from_numpy(latents)


@torch.library.custom_op("defgan_fast::candidate_latents", mutates_args=())
def _candidate_latents(
    seed: int, count: int, latent_size: int, std: float, radius: float | None = None
) -> Tensor:
    return candidate_latents(seed, count, latent_size, std, radius)


@_candidate_latents.register_fake
def _(seed: int, count: int, latent_size: int, std: float, radius: float | None = None) -> Tensor:
    return torch.empty(count, latent_size, dtype=torch.float32, device="cpu")
