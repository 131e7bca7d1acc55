"""An exponential moving average of a network's weights while it is trained.

Adam's iterates keep jumping about the point they have come to; their average lies nearer to it. Generators are
always saved so, classifiers on demand (``--ema``), for the paper takes their last iterate.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def copy_of(network: Network) -> Network:
    """Returns what an average begins with: a copy in eval mode, without gradients."""
    return copy.deepcopy(network).requires_grad_(False).eval()


@torch.no_grad()
def update(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Moves the average a (1 - decay)-th of its way to the network.

    Args:
        average: from :func:`copy_of`; changed in place. Buffers, such as running statistics, are copied.
        network: the weights after step ``step`` (from 0).
        decay: in [0, 1). The first steps use less, so that the untrained weights are forgotten.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for kept, current in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(current, 1 - decay)
    for copied, buffer in zip(average.buffers(), network.buffers(), strict=True):
        copied.copy_(buffer)
