"""MagNet's autoencoder (Meng and Chen, 2017): the encoder is table 7 of the Defense-GAN paper, the decoder its mirror
image. What is made of a collection of them as a defence is in :mod:`defgan_fast.baselines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from defgan_fast.models._layers import initialise
from defgan_fast.models.critic import SLOPE
from defgan_fast.models.generator import _doubling, _halvings


class Autoencoder(nn.Module):
    """Conv C -> d, d -> 2d, 2d -> 4d, each 5x5 of stride 2 with LeakyReLU 0.2, Linear -> k, tanh; and back.

    Args:
        code_size: k, at least 1 (paper: 128).
        width: d, at least 1 (paper: 64).
        image_shape: (C, H, W) of the images.
        signed: images in [-1, 1] by a tanh; otherwise in [0, 1] by a sigmoid.

    Example:
        >>> Autoencoder()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        code_size: int = 128,
        width: int = 64,
        image_shape: Sequence[int] = (1, 28, 28),
        signed: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "code_size": code_size,
            "width": width,
            "image_shape": list(image_shape),
            "signed": signed,
        }
        channels, height, width_px = image_shape
        sizes = _halvings((height, width_px), 3)
        maps = (channels, width, 2 * width, 4 * width)
        encoder: list[nn.Module] = []
        decoder: list[nn.Module] = []
        for level in range(3):
            encoder += [nn.Conv2d(maps[level], maps[level + 1], 5, stride=2, padding=2), nn.LeakyReLU(SLOPE)]
            decoder += [_doubling(maps[3 - level], maps[2 - level], sizes[level + 1]), nn.LeakyReLU(SLOPE)]
        decoder[-1] = nn.Tanh() if signed else nn.Sigmoid()
        features = maps[3] * sizes[0][0] * sizes[0][1]
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(features, code_size), nn.Tanh())
        self.decoder = nn.Sequential(
            nn.Linear(code_size, features),
            nn.LeakyReLU(SLOPE),
            nn.Unflatten(1, (maps[3], *sizes[0])),
            *decoder,
        )
        initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return self.decoder(self.encoder(images))
