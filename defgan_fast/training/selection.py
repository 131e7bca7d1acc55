"""The best weights so far, chosen on validation images while a training runs.

What is measured differs: reconstructions for generators (``quality.py``), accuracy for classifiers (here). What
is kept, what a checkpoint holds of it, and when figures can be compared with earlier ones is the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from defgan_fast import data
from defgan_fast.training.classifier import accuracy

# The epoch whose weights are saved: by default the last, which is the recipe of the paper.
KEEP = ("last", "best")


class Selection(ABC):
    """Measures a module in training now and then; an evaluator of ``loop.run``.

    Args:
        module: returns the module to be measured.
    """

    def __init__(self, module: Callable[[], nn.Module]) -> None:
        self.module = module
        self.rows: list[dict[str, Any]] = []  # one for each evaluation, its step first
        self.best: dict[str, Any] | None = None  # {"step", "weights"}

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Figures of the module as it is now."""

    @abstractmethod
    def rank(self, figures: dict[str, Any]) -> tuple[float, ...]:
        """Less is better; of equals the earlier is kept."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the figures depend on, apart from the module."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Measure; the figures go to ``rows``, the weights to ``best`` if no others were as good."""
        figures = self.measure()
        before = min(map(self.rank, self.rows), default=None)
        self.rows.append({"step": step, **figures})
        if before is None or self.rank(figures) < before:
            weights = {name: value.cpu().clone() for name, value in self.module().state_dict().items()}
            self.best = {"step": step, "weights": weights}
        return figures

    def choose(self) -> dict[str, Any] | None:
        """Load the best weights into the module; its row of figures, None before the first evaluation."""
        if self.best is None:
            return None
        self.module().load_state_dict(self.best["weights"])
        return next(row for row in self.rows if row["step"] == self.best["step"])

    def state(self) -> dict[str, Any]:
        """Figures, best weights, and what the figures depend on."""
        return {"rows": self.rows, "best": self.best, "settings": self.settings()}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`.

        Raises:
            ValueError: the figures before were measured in another way, and cannot be compared.
        """
        for name, value in self.settings().items():
            if state["settings"][name] != value:
                before = state["settings"][name]
                raise ValueError(f"quality was measured with {name} {before!r} before, got {value!r}")
        self.rows, self.best = state["rows"], state["best"]


class ClassifierSelection(Selection):
    """The classifier with the highest accuracy on validation images, of which the paper holds out 10,000 (section 4).

    Args:
        module: returns the classifier; it is put in eval mode while it is measured.
        dataset: validation images [N, C, H, W] and labels [N].
        device: where the classifier is.
    """

    def __init__(
        self, module: Callable[[], nn.Module], dataset: data.Dataset, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(module)
        self.images, self.labels = dataset.images.to(device), dataset.labels.to(device)
        self.data_hash = data.fingerprint(dataset)

    def measure(self) -> dict[str, float]:
        """``accuracy_validation``."""
        return {"accuracy_validation": accuracy(self.module(), self.images, self.labels)}

    def rank(self, figures: dict[str, Any]) -> tuple[float, ...]:
        """By accuracy."""
        return (-figures["accuracy_validation"],)

    def settings(self) -> dict[str, Any]:
        """The images."""
        return {"validation data": self.data_hash}
