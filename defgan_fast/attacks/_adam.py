"""Adam for many independent rows: the optimiser of the attacks that search behind a tanh or in a latent space."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BETAS, EPSILON = (0.9, 0.999), 1e-8


class Adam(NamedTuple):
    """Values [M, ...] and Adam's memory of them (Kingma, Ba, ICLR 2015); every row is by itself."""

    values: Tensor
    first: Tensor  # mean of gradients
    second: Tensor  # mean of squared gradients

    @staticmethod
    def begin(values: Tensor) -> Adam:
        """Returns the state before the first step."""
        return Adam(values, torch.zeros_like(values), torch.zeros_like(values))

    def step(self, gradients: Tensor, number: int, rate: float) -> Adam:
        """Returns the state after step ``number``, counted from 1, against the gradients."""
        first = BETAS[0] * self.first + (1 - BETAS[0]) * gradients
        second = BETAS[1] * self.second + (1 - BETAS[1]) * gradients.square()
        scale = second.sqrt() / math.sqrt(1 - BETAS[1] ** number) + EPSILON
        return Adam(self.values - (rate / (1 - BETAS[0] ** number)) * first / scale, first, second)

    def keep(self, going: Tensor) -> Adam:
        """Returns the state of the rows that go on, [M] bool."""
        return self if bool(going.all()) else Adam(*(values[going] for values in self))
