"""Classifiers A to F (paper, table 5), with the paddings and the initialisation of the released code.

The paper gives layers but no paddings. In the released code the first convolution is TensorFlow's SAME and
the others are VALID. E is D and F is B, both without dropout. All return logits: the softmax of the table
belongs to the loss.

The released code departs from the table in three places. It passes the table's dropout probabilities where
TensorFlow 1 expects the probability to *keep*, so that A drops three quarters of its features and B four fifths
of the pixels; C's second convolution has 5x5 taps, not 3x3; D has no second dropout. ``variant="released"``
builds these networks; B's accuracy in the paper is closer to theirs, A's is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from defgan_fast.models._layers import SameConv2d, initialise_to_unit_norm

ARCHITECTURES = ("A", "B", "C", "D", "E", "F")
# Share of values dropped at the two places of each network.
DROPOUTS = {
    "paper": {"A": (0.25, 0.5), "B": (0.2, 0.5), "C": (0.25, 0.5), "D": (0.5, 0.5)},
    "released": {"A": (0.75, 0.5), "B": (0.8, 0.5), "C": (0.75, 0.5), "D": (0.5, 0.0)},
}
VARIANTS = tuple(DROPOUTS)


def _valid(size: int, kernel: int, stride: int) -> int:
    return (size - kernel) // stride + 1


def _half(size: int) -> int:
    return -(-size // 2)


def _dropout(p: float) -> list[nn.Module]:
    return [nn.Dropout(p)] if p else []


def _two_convolutions(
    shape: Sequence[int],
    classes: int,
    first: tuple[int, int],
    second: tuple[int, int],
    dropouts: tuple[float, float],
) -> list[nn.Module]:
    """A and C: (channels, kernel) of a SAME convolution of stride 1 and a VALID one of stride 2."""
    channels, height, width = shape
    features = second[0] * _valid(height, second[1], 2) * _valid(width, second[1], 2)
    return [
        SameConv2d(channels, first[0], first[1]),
        nn.ReLU(),
        nn.Conv2d(first[0], second[0], second[1], stride=2),
        nn.ReLU(),
        *_dropout(dropouts[0]),
        nn.Flatten(),
        nn.Linear(features, 128),
        nn.ReLU(),
        *_dropout(dropouts[1]),
        nn.Linear(128, classes),
    ]


def _three_convolutions(shape: Sequence[int], classes: int, dropouts: tuple[float, float]) -> list[nn.Module]:
    """B and F."""
    channels, height, width = shape
    maps = [_valid(_valid(_half(size), 6, 2), 5, 1) for size in (height, width)]
    return [
        *_dropout(dropouts[0]),
        SameConv2d(channels, 64, 8, stride=2),
        nn.ReLU(),
        nn.Conv2d(64, 128, 6, stride=2),
        nn.ReLU(),
        nn.Conv2d(128, 128, 5),
        nn.ReLU(),
        *_dropout(dropouts[1]),
        nn.Flatten(),
        nn.Linear(128 * maps[0] * maps[1], classes),
    ]


def _fully_connected(shape: Sequence[int], classes: int, dropouts: tuple[float, float]) -> list[nn.Module]:
    """D and E."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = shape[0] * shape[1] * shape[2]
    for p in dropouts:
        layers += [nn.Linear(features, 200), nn.ReLU(), *_dropout(p)]
        features = 200
    return [*layers, nn.Linear(features, classes)]


class Classifier(nn.Module):
    """One of the paper's classifiers.

    Args:
        arch: "A" to "F".
        image_shape: (C, H, W); A and C need at least 5x5 and 3x3 pixels, B and F at least 27x27.
        classes: number of logits.
        variant: "paper" for table 5 as it is printed, or "released" for the networks of the released code,
            of which A to D differ; there C needs 5x5 pixels.

    Raises:
        ValueError: unknown ``arch`` or ``variant``, or images too small for the convolutions.

    Example:
        >>> Classifier("F")(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        arch: str,
        image_shape: Sequence[int] = (1, 28, 28),
        classes: int = 10,
        variant: str = "paper",
    ) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        self.config: dict[str, Any] = {
            "arch": arch,
            "image_shape": list(image_shape),
            "classes": classes,
            "variant": variant,
        }
        taps = 5 if variant == "released" else 3  # of C's second convolution
        smallest = {"A": 5, "B": 27, "C": taps, "D": 1, "E": 1, "F": 27}[arch]
        if min(image_shape[1:]) < smallest:
            raise ValueError(
                f"image_shape must have at least {smallest}x{smallest} pixels for classifier {arch}, "
                f"got {image_shape[1]}x{image_shape[2]}"
            )
        dropouts = DROPOUTS[variant].get(arch, (0.0, 0.0))
        if arch in "AC":
            first, second = ((64, 5), (64, 5)) if arch == "A" else ((128, 3), (64, taps))
            layers = _two_convolutions(image_shape, classes, first, second, dropouts)
        elif arch in "BF":
            layers = _three_convolutions(image_shape, classes, dropouts)
        else:
            layers = _fully_connected(image_shape, classes, dropouts)
        self.layers = nn.Sequential(*layers)
        initialise_to_unit_norm(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, classes] logits."""
        return self.layers(images)
