"""Generators: latents [N, k] to images [N, C, H, W] (paper, table 6, as the released code resolves it).

A fully connected layer makes a small map, and transposed 5x5 convolutions of stride 2 double it until it has
the image's size. ``padding=2`` with ``output_padding`` 0 or 1 is the PyTorch-natural form: for 28x28 images
4 -> 7 -> 14 -> 28, where TensorFlow would compute 8x8 and crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from defgan_fast.models._layers import initialise

KERNEL = 5


def _doubling(channels_in: int, channels_out: int, size_out: Sequence[int]) -> nn.ConvTranspose2d:
    """5x5, stride 2, from ceil(size / 2) to ``size_out``: the output padding supplies the even sizes."""
    return nn.ConvTranspose2d(
        channels_in,
        channels_out,
        KERNEL,
        stride=2,
        padding=2,
        output_padding=(1 - size_out[0] % 2, 1 - size_out[1] % 2),
    )


def _halvings(size: Sequence[int], times: int) -> list[tuple[int, int]]:
    """Map sizes from the smallest to ``size``, each the half (rounded up) of the next."""
    sizes = [(size[0], size[1])]
    for _ in range(times):
        height, width = sizes[0]
        sizes.insert(0, (-(-height // 2), -(-width // 2)))
    return sizes


class Generator(nn.Module):
    """Generator of the MNIST and Fashion-MNIST experiments; images in [0, 1] by a sigmoid.

    Linear k -> 4d x 4 x 4, ReLU; ConvT 4d -> 2d (7x7), ReLU; ConvT 2d -> d (14x14), ReLU; ConvT d -> C
    (28x28), sigmoid, for d = ``width``.

    Args:
        latent_size: k, at least 1 (paper: 128; the digits use 64).
        width: d, at least 1 (paper: 64; the digits use 32).
        image_shape: (C, H, W) of the images.

    Example:
        >>> Generator()(torch.zeros(2, 128)).shape
        torch.Size([2, 1, 28, 28])
    """

    value_range = (0.0, 1.0)

    def __init__(
        self, latent_size: int = 128, width: int = 64, image_shape: Sequence[int] = (1, 28, 28)
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "latent_size": latent_size,
            "width": width,
            "image_shape": list(image_shape),
        }
        self.latent_size = latent_size
        channels, height, width_px = image_shape
        sizes = _halvings((height, width_px), 3)
        first = 4 * width
        self.layers = nn.Sequential(
            nn.Linear(latent_size, first * sizes[0][0] * sizes[0][1]),
            nn.ReLU(),
            nn.Unflatten(1, (first, *sizes[0])),
            _doubling(first, 2 * width, sizes[1]),
            nn.ReLU(),
            _doubling(2 * width, width, sizes[2]),
            nn.ReLU(),
            _doubling(width, channels, sizes[3]),
            nn.Sigmoid(),
        )
        initialise(self)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[N, k] -> [N, C, H, W] in (0, 1)."""
        return self.layers(latents)


class CelebaGenerator(nn.Module):
    """Generator of 64x64 faces (paper, appendix F); images in [-1, 1] by a tanh.

    Linear k -> 4d x 4 x 4; ConvT 4d -> 2d (8x8); ConvT 2d -> d (16x16); each followed by BatchNorm where
    ``batch_norm`` asks for it, and ReLU. Then ConvT d -> d (32x32), which has no activation in the released
    code, and ConvT d -> C (64x64), tanh.

    Args:
        latent_size: k, at least 1.
        width: d, at least 1.
        image_shape: (C, H, W) of the images.
        batch_norm: normalise the first three layers over the batch.

    Example:
        >>> CelebaGenerator(batch_norm=True)(torch.zeros(2, 128)).shape
        torch.Size([2, 3, 64, 64])
    """

    value_range = (-1.0, 1.0)

    def __init__(
        self,
        latent_size: int = 128,
        width: int = 64,
        image_shape: Sequence[int] = (3, 64, 64),
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "latent_size": latent_size,
            "width": width,
            "image_shape": list(image_shape),
            "batch_norm": batch_norm,
        }
        self.latent_size = latent_size
        channels, height, width_px = image_shape
        sizes = _halvings((height, width_px), 4)
        first = 4 * width
        features = first * sizes[0][0] * sizes[0][1]
        layers: list[nn.Module] = [nn.Linear(latent_size, features)]
        if batch_norm:
            layers.append(nn.BatchNorm1d(features))
        layers += [nn.ReLU(), nn.Unflatten(1, (first, *sizes[0]))]
        for channels_in, channels_out, size in ((first, 2 * width, sizes[1]), (2 * width, width, sizes[2])):
            layers.append(_doubling(channels_in, channels_out, size))
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels_out))
            layers.append(nn.ReLU())
        layers += [_doubling(width, width, sizes[3]), _doubling(width, channels, sizes[4]), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        initialise(self)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[N, k] -> [N, C, H, W] in (-1, 1)."""
        return self.layers(latents)
