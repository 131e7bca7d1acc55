"""The latents among whose images `starts="nearest"` looks for an image's starting points.

Candidate i is a function of (seed, i), the latent's size and its scale alone, so a longer list begins with a shorter
one, and the draw of candidates has a key of its own: candidates are never the restarts' random starting points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import arguments, starts
from .plan import decoder_of, latent_size_of

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
    # The device is named because the caller may have set another default for the process.
    parts = [
        torch.empty(0, latent_size, dtype=torch.float32, device="cpu"),
        *_in_order(seed, count, latent_size, std, radius),
    ]
    return torch.cat(parts)


def _in_order(seed: int, count: int, latent_size: int, std: float, radius: float | None) -> Iterator[Tensor]:
    """Yields the candidates, some at a time."""
    source = starts.philox(seed, _STREAM)
    for first in range(0, count, _ROWS_AT_A_TIME):
        normal = starts.normals(source, min(_ROWS_AT_A_TIME, count - first), latent_size)
        scale = std if radius is None else radius / np.linalg.norm(normal, axis=1, keepdims=True)
        yield torch.from_numpy((normal * scale).astype(np.float32))


@torch.library.custom_op("defgan_fast::candidate_latents", mutates_args=())
def _candidate_latents(
    seed: int, count: int, latent_size: int, std: float, radius: float | None = None
) -> Tensor:
    return candidate_latents(seed, count, latent_size, std, radius)


@_candidate_latents.register_fake
def _(seed: int, count: int, latent_size: int, std: float, radius: float | None = None) -> Tensor:
    return torch.empty(count, latent_size, dtype=torch.float32, device="cpu")


@torch.no_grad()
def sure_candidates(
    generator: nn.Module,
    classifier: nn.Module,
    count: int,
    *,
    probability: float = 0.99,
    seed: int = 0,
    radius: float | str | None = "auto",
    start_std: float = 1.0,
    latent_size: int | None = None,
    most_draws: int | None = None,
) -> Tensor:
    """Draws latents whose images a classifier is sure of, for `Projector(starts="nearest", candidates=...)`.

    A generator also draws what is no image of any class. Where the classifier is not sure of a candidate's image, a
    descent that begins there may end in another class.

    Args:
        generator: latents [N, k] -> images [N, C, H, W]; put in eval mode.
        classifier: images -> logits [N, classes]; put in eval mode. On the generator's device.
        count: N, how many latents are wanted.
        probability: the least probability of the likeliest class, in (0, 1).
        seed: any int. Candidate i of that seed is kept or not by itself, so a longer list begins with a shorter one.
        radius: the norm of the latents, "auto" for sqrt(k), None: free. That of the projector.
        start_std: standard deviation of the draws where the norm is free.
        latent_size: k, for a generator that does not tell it.
        most_draws: how many are drawn at most; None: 100 x count.

    Returns:
        [count, k] float32 on the generator's device, in the order in which they were drawn.

    Raises:
        ValueError: so many were not found among the draws, or an argument is out of its range.

    Example:
        >>> sure = sure_candidates(generator, classifier, 8192)
        >>> projector = Projector(generator, starts="nearest", candidates=sure, radius="auto")
    """
    count = arguments.count("count", count)
    drawn_by = arguments.seed(seed)
    if drawn_by is None:
        raise TypeError("seed must be an int, got None")
    probability = arguments.number("probability", probability, above=0, below=1)
    start_std = arguments.number("start_std", start_std, above=0)
    most = 100 * count if most_draws is None else arguments.count("most_draws", most_draws, least=count)
    k = latent_size_of(generator) if latent_size is None else arguments.count("latent_size", latent_size)
    if k is None:
        raise ValueError(
            f"generator {type(generator).__name__} does not tell its latent size: pass latent_size"
        )
    norm = math.sqrt(k) if radius == "auto" else radius
    if norm is not None:
        norm = arguments.number("radius", norm, above=0)
    decode = decoder_of(generator.eval(), k)
    classifier.eval()
    like = next(generator.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
    kept, found, drawn = [], 0, 0
    for latents in _in_order(drawn_by, most, k, start_std, norm):
        latents = latents.to(like.device)
        likeliest = classifier(decode(latents.to(like.dtype))).float().softmax(1).amax(1)
        kept.append(latents[likeliest >= probability])
        found, drawn = found + len(kept[-1]), drawn + len(latents)
        if found >= count:
            return torch.cat(kept)[:count]
    raise ValueError(
        f"count must be at most what the classifier is sure of, got {count}: of {drawn} draws it gives {found} a "
        f"probability of {probability:g} or more"
    )
