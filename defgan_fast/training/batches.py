"""An endless stream of shuffled batches whose order can be saved and resumed."""

from __future__ import annotations

from typing import Any

import torch


class Batches:
    """Indices of batches: every pass over the data in a new random order, the last part of a pass dropped.

    Args:
        count: number of images.
        batch: images per batch, at most ``count``.
        generator: source of the orders.
    """

    def __init__(self, count: int, batch: int, generator: torch.Generator) -> None:
        if not 1 <= batch <= count:
            raise ValueError(f"batch must lie between 1 and the number of images {count}, got {batch}")
        self.count, self.batch, self.generator = count, batch, generator
        self._order = torch.empty(0, dtype=torch.int64)
        self._position = 0

    def next(self) -> torch.Tensor:
        """Returns the next [batch] int64 indices."""
        if self._position + self.batch > len(self._order):
            self._order = torch.randperm(self.count, generator=self.generator)
            self._position = 0
        chosen = self._order[self._position : self._position + self.batch]
        self._position += self.batch
        return chosen

    def state(self) -> dict[str, Any]:
        """Returns order and position, not the generator's state."""
        return {"order": self._order, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Does the inverse of :meth:`state`."""
        self._order, self._position = state["order"], state["position"]
