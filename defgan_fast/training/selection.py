"""The best weights so far, chosen on validation images while a training runs.

What is measured differs: reconstructions for generators, accuracy for classifiers. What is kept, what a checkpoint
holds of it, and when figures can be compared with earlier ones is the same. The reconstruction error of a generator
against the number of steps is what equation 7 of the paper says must fall; the classifier also looks at samples,
since a generator that has lost a class, or that draws between classes, shows it there.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from defgan_fast import data
from defgan_fast.evaluation.cache import weights_hash
from defgan_fast.evaluation.metrics import accuracy, score_samples
from defgan_fast.evaluation.projection import project_with_bar
from defgan_fast.projector import Projector

# The epoch whose weights are saved: by default the last, which is the recipe of the paper.
KEEP = ("last", "best")
SAMPLES = 1000


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
        """Returns the figures of the module as it is now."""

    @abstractmethod
    def rank(self, figures: dict[str, Any]) -> tuple[float, ...]:
        """Returns a key of which less is better; of equals the earlier is kept."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Returns what the figures depend on, apart from the module."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Measures; the figures go to ``rows``, the weights to ``best`` if no others were as good."""
        figures = self.measure()
        before = min(map(self.rank, self.rows), default=None)
        self.rows.append({"step": step, **figures})
        if before is None or self.rank(figures) < before:
            weights = {name: value.cpu().clone() for name, value in self.module().state_dict().items()}
            self.best = {"step": step, "weights": weights}
        return figures

    def choose(self) -> dict[str, Any] | None:
        """Loads the best weights into the module; returns their row of figures, None before the first evaluation."""
        if self.best is None:
            return None
        self.module().load_state_dict(self.best["weights"])
        return next(row for row in self.rows if row["step"] == self.best["step"])

    def state(self) -> dict[str, Any]:
        """Returns the figures, the best weights, and what the figures depend on."""
        return {"rows": self.rows, "best": self.best, "settings": self.settings()}

    def restore(self, state: dict[str, Any]) -> None:
        """Does the inverse of :meth:`state`.

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
        """Measures ``accuracy_validation``."""
        return {"accuracy_validation": accuracy(self.module(), self.images, self.labels)}

    def rank(self, figures: dict[str, Any]) -> tuple[float, ...]:
        """Ranks by accuracy."""
        return (-figures["accuracy_validation"],)

    def settings(self) -> dict[str, Any]:
        """Returns the fingerprint of the images."""
        return {"validation data": self.data_hash}


class GeneratorSelection(Selection):
    """The average of a generator with the best reconstructions.

    Better is a higher accuracy on the reconstructions, and where that is the same, or there is no classifier,
    a smaller reconstruction error.

    Args:
        generator: returns the module to be measured; it is copied.
        samples: draws that many images from it, from the same latents each time.
        dataset: validation images and their labels.
        classifier: a fixed one, or None.
        steps, restarts: L and R of the projections.
    """

    def __init__(
        self,
        generator: Callable[[], nn.Module],
        samples: Callable[[int], torch.Tensor],
        dataset: data.Dataset,
        classifier: nn.Module | None,
        steps: int = 200,
        restarts: int = 10,
    ) -> None:
        super().__init__(generator)
        self.samples, self.dataset = samples, dataset
        self.classifier = classifier.eval() if classifier is not None else None
        self.steps, self.restarts = steps, restarts

    def measure(self) -> dict[str, float]:
        """Measures ``reconstruction_error``, with a classifier ``accuracy_reconstructed`` and the samples' score."""
        generator = copy.deepcopy(self.module()).cpu().eval()
        projector = Projector(generator, steps=self.steps, restarts=self.restarts)
        reconstructions, errors = project_with_bar(projector, self.dataset.images, "quality")
        figures = {"reconstruction_error": float(errors.double().mean())}
        if self.classifier is not None:
            figures["accuracy_reconstructed"] = accuracy(
                self.classifier, reconstructions, self.dataset.labels
            )
            figures |= score_samples(self.classifier, self.samples(SAMPLES))
        return figures

    def rank(self, figures: dict[str, Any]) -> tuple[float, ...]:
        """Ranks by accuracy, then by error."""
        return -figures.get("accuracy_reconstructed", 0.0), figures["reconstruction_error"]

    def settings(self) -> dict[str, Any]:
        """Returns the number of images, L, R, and the classifier's hash."""
        return {
            "images": len(self.dataset.images),
            "steps": self.steps,
            "restarts": self.restarts,
            "classifier": weights_hash(self.classifier) if self.classifier is not None else None,
        }
