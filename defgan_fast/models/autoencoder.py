"""MagNet's autoencoder and its reformer (Meng and Chen, 2017): the baseline that the paper compares with.

The encoder is table 7 of the Defense-GAN paper, the decoder its mirror image. The reformer replaces an image
by its reconstruction, with an autoencoder drawn at random from a collection for each image, so that an
attacker does not know which one he attacks.
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


class Reformer(nn.Module):
    """MagNet's defence: each image through one autoencoder of a collection, drawn at random.

    Args:
        members: at least one autoencoder, all for images of the same shape; put in eval mode.
        seed: of the draws. An int: member i of the batch meets the same autoencoder at every call, so that
            results can be repeated. None: a fresh draw at each call.

    Raises:
        ValueError: there is no member.

    Example:
        >>> defended = nn.Sequential(Reformer([first, second]), classifier)
    """

    def __init__(self, members: Sequence[nn.Module], seed: int | None = 0) -> None:
        super().__init__()
        if not members:
            raise ValueError("members must hold at least one autoencoder, got none")
        self.members = nn.ModuleList(members)
        self.seed = seed
        self.eval()

    def train(self, mode: bool = True) -> Reformer:
        """Stays in eval mode, as a defence must when an attack library switches modes."""
        return super().train(False)

    def choose(self, count: int) -> torch.Tensor:
        """[count] int64, the member for each image."""
        source = torch.Generator()
        if self.seed is None:
            source.seed()
        else:
            source.manual_seed(self.seed)
        return torch.randint(len(self.members), (count,), generator=source)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C, H, W]; differentiable, with each image's own member."""
        chosen = self.choose(len(images)).to(images.device)
        result = torch.empty_like(images)
        for index, member in enumerate(self.members):
            rows = (chosen == index).nonzero().squeeze(1)
            if len(rows):
                result = result.index_copy(0, rows, member(images[rows]))
        return result
