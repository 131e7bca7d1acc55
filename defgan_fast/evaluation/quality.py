"""How good a generator and a classifier are together, as a defence: the figures in the cards of weight files.

Samples may look fine while projections are poor, so what counts is measured the way the defence is used: the
error of the reconstructions, and the classifier's accuracy on them, clean and under FGSM.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from defgan_fast import data
from defgan_fast.evaluation import transfer
from defgan_fast.evaluation.cache import cached, weights_hash
from defgan_fast.evaluation.projection import Reconstructions, project_with_bar
from defgan_fast.projector import Projector


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
    """Projects clean and attacked images and classifies both.

    Args:
        generator: latents [N, k] -> images [N, C, H, W].
        classifier: images -> logits; also the one that is attacked.
        dataset: images and labels; the attack stays in its range.
        steps: L.
        restarts: R.
        count: the first so many images are projected (default: all).
        attacked: the first so many of these are attacked, too (default: all).
        cache: folder for reconstructions, so that an interrupted measurement goes on, and one on more images
            later takes what is there.

    Returns:
        Number of images, mean reconstruction error of the clean ones, and the accuracies.
    """
    projector = Projector(generator, steps=steps, restarts=restarts)
    count = len(dataset) if count is None else min(count, len(dataset))
    attacked = count if attacked is None else min(attacked, count)
    data_hash = data.fingerprint(dataset)

    def project_clean(images: torch.Tensor) -> Reconstructions:
        if cache is None:
            return project_with_bar(projector, images, "reconstructions")
        # The cache is that of all images, so that later calls for more of them find these.
        return cached(projector, dataset.images, data_hash, cache, limit=len(images))

    clean = transfer.defend(classifier, dataset.first(count), project_clean)
    figures = {
        "images": count,
        "reconstruction_error": float(clean.reconstructions.errors.double().mean()),
        "accuracy_clean": clean.accuracy,
        "accuracy_clean_defended": clean.accuracy_defended,
    }
    if attacked:
        attack_hash = f"{data_hash} FGSM {transfer.EPSILON} {weights_hash(classifier)}"

        def project_attacked(images: torch.Tensor) -> Reconstructions:
            if cache is None:
                return project_with_bar(projector, images, "reconstructions")
            return cached(projector, images, attack_hash, cache)

        adversarial = transfer.attacked(classifier, dataset.first(attacked))
        broken = transfer.defend(classifier, adversarial, project_attacked)
        figures |= {
            "images_attacked": attacked,
            "accuracy_attacked": broken.accuracy,
            "accuracy_attacked_defended": broken.accuracy_defended,
        }
    return figures


def reconstruction_error(
    generator: nn.Module, images: torch.Tensor, steps: int, restarts: int, title: str
) -> float:
    """Returns the mean squared error of the reconstructions of images [N, C, H, W], with a progress bar."""
    projector = Projector(generator, steps=steps, restarts=restarts)
    return float(project_with_bar(projector, images, title).errors.double().mean())
