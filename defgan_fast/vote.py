"""A vote: the classifier reads all reconstructions of an image, and its probabilities are averaged."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import arguments
from .projector import Projector


class Vote(nn.Module):
    """Classifies images by the mean of a classifier's probabilities over the R reconstructions of each.

    It is a classifier from images to logits, which are the logarithm of the mean probability: their softmax is the mean
    itself, and cross-entropy on them the negative logarithm of the mean probability of the label. The gradient goes
    through all reconstructions, so an attack on the vote is one on all of them.

    Args:
        projector: any; its restarts are the voters, the ones that `keep` dropped among them.
        classifier: images [N, C, H, W] to logits [N, classes].
        batch: reconstructions that the classifier reads at once, at most.

    Raises:
        TypeError: projector is no `Projector`, or classifier no `nn.Module`.
        ValueError: batch is below 1.

    Example:
        >>> vote = Vote(Projector(generator, restarts=8, steps=25, starts="nearest"), classifier)
        >>> labels = vote(images).argmax(1)
    """

    def __init__(self, projector: Projector, classifier: nn.Module, batch: int = 1000) -> None:
        super().__init__()
        if not isinstance(projector, Projector):
            raise TypeError(f"projector must be a Projector, got {type(projector).__name__}")
        if not isinstance(classifier, nn.Module):
            raise TypeError(f"classifier must be a torch.nn.Module, got {type(classifier).__name__}")
        self.projector = projector
        self.classifier = classifier
        self.batch = arguments.count("batch", batch)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of images, [B, C, H, W] -> [B, classes]; raises as `Projector.project` does."""
        reconstructions = self.projector.project(images, every=True).every_image
        assert reconstructions is not None
        count, voters = reconstructions.shape[:2]
        logits = torch.cat(
            [self.classifier(part) for part in reconstructions.flatten(0, 1).split(self.batch)]
        )
        if logits.dim() != 2:
            raise ValueError(f"classifier must return logits [N, classes], got {list(logits.shape)}")
        ballots = F.log_softmax(logits, 1).unflatten(0, (count, voters))
        return torch.logsumexp(ballots, 1) - math.log(voters)

    def extra_repr(self) -> str:
        return f"batch={self.batch}"
