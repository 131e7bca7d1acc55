"""Where descents begin: the starting points of every restart."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def philox(seed: int, stream: int) -> np.random.Philox:
    """Returns the counting generator of this seed, modulo 2^64, and stream, below 2^64."""
    return np.random.Philox(key=np.array([seed % 2**64, stream], dtype=np.uint64))


def normals(source: np.random.Philox, rows: int, columns: int) -> np.ndarray:
    """Returns the next rows of N(0, I), [rows, columns] float64; each consumes as many numbers as any other."""
    pairs = (columns + 1) // 2
    bits = source.random_raw(2 * pairs * rows).reshape(rows, 2, pairs)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1)
    length, angle = np.sqrt(-2.0 * np.log(uniform[:, 0])), 2.0 * np.pi * uniform[:, 1]
    return np.concatenate([length * np.cos(angle), length * np.sin(angle)], 1)[:, :columns]


def starting_points(seed: int, restarts: int, latent_size: int, std: float | None = None) -> Tensor:
    """Returns the first latents of every restart, [R, k] float32 from N(0, std^2 I); None: N(0, I / k).

    Row r is a function of (seed, r), k and std alone: numbers come from Philox and a Box-Muller transform in float64,
    so that they are the same on every machine and in every version of torch and numpy, and restart r is the same
    whatever R is.
    """
    points = np.empty((restarts, latent_size))
    for restart in range(restarts):
        points[restart] = normals(philox(seed, restart), 1, latent_size)[0]
    return torch.from_numpy(points / math.sqrt(latent_size) if std is None else points * std).float()


@torch.library.custom_op("defgan_fast::starting_points", mutates_args=())
def _starting_points(seed: int, restarts: int, latent_size: int, std: float | None = None) -> Tensor:
    return starting_points(seed, restarts, latent_size, std)


@_starting_points.register_fake
def _(seed: int, restarts: int, latent_size: int, std: float | None = None) -> Tensor:
    return torch.empty(restarts, latent_size, dtype=torch.float32, device="cpu")


def signed(seed: int) -> int:
    """Returns the seed's last 64 bits as an operator's integer has them; draws depend on no others."""
    return (seed + 2**63) % 2**64 - 2**63


def seeded(seed: int, restarts: int, latent_size: int, std: float | None = None) -> Tensor:
    """Returns `starting_points` by way of an operator, which torch.compile and torch.export take as it is."""
    points: Tensor = torch.ops.defgan_fast.starting_points(signed(seed), restarts, latent_size, std)
    return points


def fresh(
    images: int, restarts: int, latent_size: int, device: torch.device, std: float | None = None
) -> Tensor:
    """Returns new points of N(0, std^2 I) from torch's global random state for every image, [B, R, k] float32."""
    points = torch.randn((images, restarts, latent_size), dtype=torch.float32, device=device)
    return points / math.sqrt(latent_size) if std is None else points * std
