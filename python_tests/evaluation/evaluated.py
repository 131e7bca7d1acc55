"""The digits' networks and a few images, and a classifier that answers image by image, for tests of evaluations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from defgan_fast import data, weights


class RowByRow(nn.Module):
    """Asks a model about one image at a time, so that an answer has the same bits whatever the batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return torch.cat([self.model(images[i : i + 1]) for i in range(len(images))])


class Digits(NamedTuple):
    generator: nn.Module
    classifier: nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    others: torch.Tensor  # images that are none of these


def digits(count: int) -> Digits:
    test = data.load("digits", split="test")
    generator, classifier = weights.load_generator("digits"), weights.load_classifier("digits")
    return Digits(
        generator, classifier.eval(), test.images[:count], test.labels[:count], test.images[200:220]
    )
