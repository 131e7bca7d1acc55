"""How good a generator and a classifier are together, as a defence: the figures in the cards of weight files.

Samples may look fine while projections are poor, so what counts is measured the way the defence is used: the
error of the reconstructions, and the classifier's accuracy on them, clean and under FGSM.
"""

from __future__ import annotations

import torch
from torch import nn

from defgan_fast import data, progress
from defgan_fast.attacks import fgsm
from defgan_fast.projector import Projector
from defgan_fast.training.classifier import accuracy

EPSILON = 0.3
# Images per call of the projector: short enough for a bar that moves and an interruption that is heard.
GROUP = 5


def measure(
    generator: nn.Module, classifier: nn.Module, dataset: data.Dataset, steps: int = 200, restarts: int = 10
) -> dict[str, float]:
    """Project clean and attacked images and classify both.

    Args:
        generator: latents [N, k] -> images [N, C, H, W].
        classifier: images -> logits; also the one that is attacked.
        dataset: images in [0, 1] and labels.
        steps, restarts: L and R.

    Returns:
        Number of images, mean reconstruction error of the clean ones, and the four accuracies.
    """
    projector = Projector(generator, steps=steps, restarts=restarts)
    images, labels = dataset
    attacked = fgsm(classifier.eval(), images, labels, EPSILON)
    found: list[list[torch.Tensor]] = [[], []]
    errors = []
    with progress.bar(2 * len(images), "quality", "image") as bar, torch.no_grad():
        for kind, batch in enumerate((images, attacked)):
            for group in batch.split(GROUP):
                result = projector.project(group)
                found[kind].append(result.images)
                if kind == 0:
                    errors.append(result.errors)
                bar.update(len(group))
    return {
        "images": len(images),
        "reconstruction_error": float(torch.cat(errors).double().mean()),
        "accuracy_clean": accuracy(classifier, images, labels),
        "accuracy_clean_defended": accuracy(classifier, torch.cat(found[0]), labels),
        "accuracy_attacked": accuracy(classifier, attacked, labels),
        "accuracy_attacked_defended": accuracy(classifier, torch.cat(found[1]), labels),
    }
