"""FGSM against the bare classifier, and what the defence makes of it: the paper's attack (section 5.1).

The attacker knows the classifier and not the defence, so that his images transfer to the defended classifier or
do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from defgan_fast.attacks import fgsm
from defgan_fast.data import Dataset
from defgan_fast.evaluation.metrics import BATCH, accuracy
from defgan_fast.evaluation.projection import Reconstructions

EPSILON = 0.3


class Defended(NamedTuple):
    """How a classifier does on images as they come and on their reconstructions."""

    reconstructions: Reconstructions
    seconds: float  # that all projections took
    accuracy: float
    accuracy_defended: float


def attacked(classifier: nn.Module, dataset: Dataset, epsilon: float = EPSILON) -> Dataset:
    """Returns the data set with FGSM examples of the classifier, which is put in eval mode, for images.

    They are made in batches of a fixed size, because a classifier's last bits depend on its batch.
    """
    classifier.eval()
    parts = [
        fgsm(classifier, images, labels, epsilon, dataset.value_range)
        for images, labels in zip(dataset.images.split(BATCH), dataset.labels.split(BATCH), strict=True)
    ]
    return Dataset(torch.cat(parts), dataset.labels, dataset.value_range)


def defend(
    classifier: nn.Module, dataset: Dataset, project: Callable[[torch.Tensor], Reconstructions]
) -> Defended:
    """Projects the images of a data set and classifies them before and after.

    Args:
        classifier: images -> logits; it is put in eval mode.
        dataset: images and labels on the classifier's device.
        project: images [N, C, H, W] -> reconstructions on the same device, such as
            ``functools.partial(projection.project, projector)``.
    """
    began = time.perf_counter()
    reconstructions = project(dataset.images)
    seconds = time.perf_counter() - began
    return Defended(
        reconstructions,
        seconds,
        accuracy(classifier, dataset.images, dataset.labels),
        accuracy(classifier, reconstructions.images, dataset.labels),
    )
