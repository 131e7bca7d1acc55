"""Random numbers of an image's own, so that what happens to it does not depend on the images beside it.

Every image has a stream that is a function of the seed and of its own pixels: the same in any batch, at any
place of it, on any device. Nothing is drawn from the global random states of torch and numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from defgan_fast.attacks._budget import Budget


class Streams:
    """One stream of random numbers for each image.

    Philox counts, so that the numbers are the same in every version of numpy. A stream moves on only when its
    own image draws: images that were dropped from the work leave the others' numbers as they are.

    Args:
        images: [N, C, H, W].
        seed: any int.
        purpose: a word that tells apart attacks that would otherwise draw the same numbers.
    """

    def __init__(self, images: Tensor, seed: int, purpose: str) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be an int, got {seed!r}")
        pixels = images.detach().float().cpu().contiguous().numpy()
        self._streams = [_stream(image.tobytes(), seed, purpose) for image in pixels]

    def uniform(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns numbers in (0, 1) for the images of these rows [M], [M, *shape] float64 on the CPU."""
        count = int(np.prod(shape))
        drawn = np.empty((len(rows), count))
        for place, row in enumerate(rows.tolist()):
            bits = self._streams[row].random_raw(count)
            drawn[place] = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return torch.from_numpy(drawn).view(len(rows), *shape)

    def normal(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Returns numbers from N(0, 1) for the images of these rows [M], [M, *shape] float64 on the CPU."""
        count = int(np.prod(shape))
        pairs = (count + 1) // 2
        uniform = self.uniform(rows, (2, pairs))
        radius, angle = (-2 * uniform[:, 0].log()).sqrt(), 2 * np.pi * uniform[:, 1]
        drawn = torch.cat((radius * angle.cos(), radius * angle.sin()), 1)
        return drawn[:, :count].reshape(len(rows), *shape)


def _stream(content: bytes, seed: int, purpose: str) -> np.random.Philox:
    digest = hashlib.blake2b(f"{seed} {purpose} ".encode() + content, digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))


def random_step(images: Tensor, rows: Tensor, streams: Streams, budget: Budget, kind: str) -> Tensor:
    """Returns a random change of each image [M, C, H, W], whose streams are those of rows [M].

    ``kind`` of an l-infinity change: "sign" moves every pixel by plus or minus epsilon, "uniform" by less. An l2
    change has a uniform direction and the full norm.
    """
    shape = images.shape[1:]
    if budget.norm == "l2":
        drawn = streams.normal(rows, shape)
        lengths = drawn.flatten(1).square().sum(1).sqrt().view(-1, 1, 1, 1)
        return (budget.epsilon * drawn / lengths).to(images)
    drawn = 2 * streams.uniform(rows, shape) - 1
    return (budget.epsilon * (drawn.sign() if kind == "sign" else drawn)).to(images)
