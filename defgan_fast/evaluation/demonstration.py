"""The demonstration: a classifier is attacked, defended by projection, and the defence itself is attacked.

It measures accuracy clean and under FGSM, each with and without Defense-GAN, then under PGD through the
straight-through gradient of the whole defence, and how well the reconstruction error tells attacked from clean
images. The numbers depend on nothing but the weights and the settings.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from defgan_fast import progress
from defgan_fast.attacks import pgd
from defgan_fast.data import Dataset
from defgan_fast.evaluation import projection, transfer
from defgan_fast.evaluation.metrics import accuracy, auc
from defgan_fast.projector import Projector

ADAPTIVE_STEPS = 10


class Demonstration(NamedTuple):
    """The figures, and the images of the picture."""

    figures: dict[str, Any]
    attacked: torch.Tensor  # [N, C, H, W]
    reconstructions: torch.Tensor  # [N, C, H, W], of the attacked images


def demonstrate(
    projector: Projector, classifier: nn.Module, dataset: Dataset, images_adaptive: int
) -> Demonstration:
    """Measures a defence, with a progress bar.

    Args:
        projector: the defence, with the straight-through gradient.
        classifier: images -> logits, on the projector's device, as the data set is.
        dataset: N images and labels.
        images_adaptive: how many of them the attack through the defence gets.
    """
    adaptive = dataset.first(images_adaptive)
    attacked = transfer.attacked(classifier, dataset)
    # PGD looks at its last point, too.
    total = 2 * len(dataset) + len(adaptive) * (ADAPTIVE_STEPS + 2)
    with progress.bar(total, "projections", "image") as bar:
        project = partial(projection.project, projector, on_group=bar.update)
        clean_defended = transfer.defend(classifier, dataset, project)
        attacked_defended = transfer.defend(classifier, attacked, project)
        broken = _attack(projector, classifier, adaptive, bar)
        broken_defended = project(broken)
    seconds = (clean_defended.seconds + attacked_defended.seconds) / (2 * len(dataset))
    figures = {
        "images": len(dataset),
        "images_adaptive": len(adaptive),
        "steps": projector.steps,
        "restarts": projector.restarts,
        "backend": projector.backend_for(dataset.images),
        "precision": projector.precision_for(dataset.images),
        "accuracy_clean": clean_defended.accuracy,
        "accuracy_clean_defended": clean_defended.accuracy_defended,
        "accuracy_attacked": attacked_defended.accuracy,
        "accuracy_attacked_defended": attacked_defended.accuracy_defended,
        "accuracy_adaptive_defended": accuracy(classifier, broken_defended.images, adaptive.labels),
        "auc_detection": auc(clean_defended.reconstructions.errors, attacked_defended.reconstructions.errors),
        "seconds_per_image": round(seconds, 4),
    }
    return Demonstration(figures, attacked.images, attacked_defended.reconstructions.images)


def _attack(projector: Projector, classifier: nn.Module, dataset: Dataset, bar: tqdm) -> torch.Tensor:
    """Returns PGD examples [N, C, H, W] of projector and classifier, in groups that every machine makes alike."""
    defended = nn.Sequential(projector, classifier).eval()
    size = projection.fixed_group(projector)
    parts = []
    for images, labels in zip(dataset.images.split(size), dataset.labels.split(size), strict=True):

        def moved(done: int, total: int, before: int = bar.n) -> None:
            bar.update(before + done - bar.n)

        parts.append(
            pgd(
                defended,
                images,
                labels,
                transfer.EPSILON,
                ADAPTIVE_STEPS,
                value_range=dataset.value_range,
                progress=moved,
            )
        )
    return torch.cat(parts)
