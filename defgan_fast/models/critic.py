"""The critic of the WGAN: images to one unbounded score each (paper, table 6).

The mirror image of the generator: 5x5 convolutions of stride 2, in the PyTorch form ``padding=2`` whose
transpose the generator uses. No sigmoid and no BatchNorm: the Wasserstein distance needs raw scores, and the
gradient penalty is defined for each image by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from defgan_fast.models._layers import initialise

SLOPE = 0.2


class Critic(nn.Module):
    """Conv C -> d, d -> 2d, 2d -> 4d, each 5x5 of stride 2 with LeakyReLU 0.2, then Linear -> 1.

    Args:
        width: d, at least 1 (paper: 64).
        image_shape: (C, H, W) of the images.

    Example:
        >>> Critic()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2])
    """

    def __init__(self, width: int = 64, image_shape: Sequence[int] = (1, 28, 28)) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"width": width, "image_shape": list(image_shape)}
        channels, height, width_px = image_shape
        layers: list[nn.Module] = []
        for channels_out in (width, 2 * width, 4 * width):
            layers += [
                nn.Conv2d(channels, channels_out, 5, stride=2, padding=2),
                nn.LeakyReLU(SLOPE),
            ]
            channels, height, width_px = channels_out, -(-height // 2), -(-width_px // 2)
        layers += [nn.Flatten(), nn.Linear(channels * height * width_px, 1)]
        self.layers = nn.Sequential(*layers)
        initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N]."""
        return self.layers(images).squeeze(1)
