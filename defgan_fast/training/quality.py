"""How good a generator and a classifier are together, as a defence: the figures in the cards of weight files.

Samples may look fine while projections are poor, so what counts is measured the way the defence is used: the
error of the reconstructions, and the classifier's accuracy on them, clean and under FGSM. During training the
clean part of it is measured on validation images, and decides which average of the generator is kept; the
error against the number of steps is what equation 7 of the paper says must fall. The classifier also looks
at samples: a generator that has lost a class, or that draws between classes, shows it there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defgan_fast import data, progress
from defgan_fast.attacks import fgsm
from defgan_fast.projector import Projector
from defgan_fast.training.classifier import accuracy
from defgan_fast.training.reconstructions import cached, weights_hash
from defgan_fast.training.selection import Selection

EPSILON = 0.3
# Images per call of the projector: short enough for a bar that moves and an interruption that is heard.
GROUP = 5
SAMPLES = 1000


def measure(
    generator: nn.Module,
    classifier: nn.Module,
    dataset: data.Dataset,
    steps: int = 200,
    restarts: int = 10,
    count: int | None = None,
    attacked: int | None = None,
    cache: Path | None = None,
) -> dict[str, float]:
    """Project clean and attacked images and classify both.

    Args:
        generator: latents [N, k] -> images [N, C, H, W].
        classifier: images -> logits; also the one that is attacked.
        dataset: images and labels; the attack stays in its range.
        steps, restarts: L and R.
        count: the first so many images are projected (default: all).
        attacked: the first so many of these are attacked, too (default: all).
        cache: folder for reconstructions, so that an interrupted measurement goes on, and one on more images
            later takes what is there.

    Returns:
        Number of images, mean reconstruction error of the clean ones, and the accuracies.
    """
    projector = Projector(generator, steps=steps, restarts=restarts)
    count = len(dataset.images) if count is None else min(count, len(dataset.images))
    attacked = count if attacked is None else min(attacked, count)
    images, labels = dataset.images[:count], dataset.labels[:count]
    data_hash = data.fingerprint(dataset)
    defended, errors = _kept_or_projected(projector, dataset.images, count, data_hash, cache)
    figures = {
        "images": count,
        "reconstruction_error": float(errors.double().mean()),
        "accuracy_clean": accuracy(classifier, images, labels),
        "accuracy_clean_defended": accuracy(classifier, defended, labels),
    }
    if attacked:
        images, labels = images[:attacked], labels[:attacked]
        adversarial = fgsm(classifier.eval(), images, labels, EPSILON, dataset.value_range)
        attack_hash = f"{data_hash} FGSM {EPSILON} {weights_hash(classifier)}"
        defended, _ = _kept_or_projected(projector, adversarial, attacked, attack_hash, cache)
        figures |= {
            "images_attacked": attacked,
            "accuracy_attacked": accuracy(classifier, adversarial, labels),
            "accuracy_attacked_defended": accuracy(classifier, defended, labels),
        }
    return figures


def _kept_or_projected(
    projector: Projector, images: torch.Tensor, count: int, data_hash: str, cache: Path | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions and errors of the first ``count`` images, by way of the cache where there is one."""
    if cache is not None:
        return cached(projector, images, data_hash, cache, limit=count)
    with progress.bar(count, "reconstructions", "image") as bar:
        return _project(projector, images[:count], bar.update)


def _project(
    projector: Projector, images: torch.Tensor, on_group: Callable[[int], Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions [N, C, H, W] and their errors [N], in short calls."""
    parts = []
    with torch.no_grad():
        for group in images.split(GROUP):
            result = projector.project(group)
            parts.append((result.images, result.errors))
            on_group(len(group))
    pictures, errors = zip(*parts, strict=True)
    return torch.cat(pictures), torch.cat(errors)


def reconstruction_error(
    generator: nn.Module, images: torch.Tensor, steps: int, restarts: int, title: str
) -> float:
    """Mean squared error of the reconstructions of images [N, C, H, W], with a progress bar of that title."""
    projector = Projector(generator, steps=steps, restarts=restarts)
    with progress.bar(len(images), title, "image") as bar:
        return float(_project(projector, images, bar.update)[1].double().mean())


@torch.no_grad()
def score_samples(classifier: nn.Module, samples: torch.Tensor) -> dict[str, float]:
    """What a classifier makes of generated images [N, C, H, W].

    Returns:
        ``sample_confidence``, the mean largest probability, and ``sample_balance``, the entropy of the classes
        found over that of equal shares: 1 where all classes are drawn equally often, 0 where only one is.
    """
    probabilities = torch.cat([classifier(part).softmax(1) for part in samples.split(256)])
    shares = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]) / len(samples)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    return {
        "sample_confidence": float(probabilities.amax(1).mean()),
        "sample_balance": float(entropy / math.log(probabilities.shape[1])),
    }


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
        """``reconstruction_error``; with a classifier also ``accuracy_reconstructed`` and the samples' score."""
        generator = copy.deepcopy(self.module()).cpu().eval()
        projector = Projector(generator, steps=self.steps, restarts=self.restarts)
        images, labels = self.dataset
        with progress.bar(len(images), "quality", "image") as bar:
            reconstructions, errors = _project(projector, images, bar.update)
        figures = {"reconstruction_error": float(errors.double().mean())}
        if self.classifier is not None:
            figures["accuracy_reconstructed"] = accuracy(self.classifier, reconstructions, labels)
            figures |= score_samples(self.classifier, self.samples(SAMPLES))
        return figures

    def rank(self, figures: dict[str, Any]) -> tuple[float, ...]:
        """By accuracy, then by error."""
        return -figures.get("accuracy_reconstructed", 0.0), figures["reconstruction_error"]

    def settings(self) -> dict[str, Any]:
        """Number of images, L, R, and the classifier."""
        return {
            "images": len(self.dataset.images),
            "steps": self.steps,
            "restarts": self.restarts,
            "classifier": weights_hash(self.classifier) if self.classifier is not None else None,
        }
