"""PGD that knows the detector: it fools the classifier behind a projection and keeps the reconstruction error small."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defgan_fast import arguments
from defgan_fast.attacks._budget import Budget, check
from defgan_fast.attacks._meter import Meter, Progress
from defgan_fast.attacks._objective import Answer, Objective, check_logits
from defgan_fast.attacks.pgd import climb_automatically


def evade(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float = 0.3,
    *,
    threshold: float,
    defence: nn.Module | None = None,
    classifier: nn.Module | None = None,
    exchange: float = 10.0,
    norm: str = "linf",
    steps: int = 100,
    early_stop: bool = True,
    targeted: bool = False,
    eot: int = 1,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> Tensor:
    """Auto-PGD on two conditions at once: the class is wrong, and the reconstruction error stays below the threshold.

    It climbs the lesser of the margin and of ``exchange * (1 - error / threshold)``, so that every step serves the
    condition that is further from being met, as the selective attack of "Evading adversarial example detection
    defenses with orthogonal projected gradient descent" (Bryniarski et al., ICLR 2022) does. The error is the mean
    squared difference of image and defended image. Its gradient takes the defended image for fixed: at the minimum
    of a projection that is exact, since the latent's own share is zero there (the envelope theorem), while the
    identity of a straight-through gradient would make the error seem constant.

    Args:
        model: ``nn.Sequential(defence, classifier)``, images to logits [N, classes], unless both are given.
        images: [N, C, H, W] floating point, in ``value_range``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: largest change in the norm, at least 0.
        threshold: of the detector, above 0: an image with a larger mean squared error is found out.
        defence: images to defended images; None: the head of ``model``.
        classifier: defended images to logits; None: what follows the head of ``model``.
        exchange: how many logits of margin an error of zero is worth, above 0.
        norm: "linf" or "l2".
        steps: at least 1.
        early_stop: an image for which both conditions hold is dropped from the work; False looks for more.
        targeted: descend to the class of ``labels`` instead of leaving it.
        eot: copies of every image in each query, whose scores are averaged; above 1 for randomised defences.
        seed: not used, nothing is drawn; it is here because every attack takes one.
        value_range: (low, high) of the pixels.
        progress: called with (done, total) after every step.

    Returns:
        [N, C, H, W], detached: a point for which both conditions hold in every copy before one for which they do
        not, then the one of largest score.

    Raises:
        ValueError: an argument does not fit, or ``model`` is no ``nn.Sequential`` and its parts are not given.
        RuntimeError: the defended classifier passes no gradient to its images.

    Example:
        >>> detector = Detector(projector).fit(clean_images, fpr=0.05)
        >>> adversarial = evade(defended, images, labels, 0.3, threshold=float(detector.threshold))
    """
    check(images, labels, epsilon, value_range, norm)
    arguments.count("steps", steps)
    arguments.number("threshold", threshold, above=0)
    arguments.number("exchange", exchange, above=0)
    sequential = isinstance(model, nn.Sequential) and len(model) > 1
    if (defence is None or classifier is None) and not sequential:
        raise ValueError(
            f"model must be nn.Sequential(defence, classifier) where they are not given, got {type(model).__name__}"
        )
    if defence is None:
        defence = model[0]  # type: ignore[index]
    if classifier is None:
        classifier = model[1:]  # type: ignore[index]
    assert defence is not None
    assert classifier is not None
    objective = _Evading(defence, classifier, threshold, exchange, targeted, eot)
    meter = Meter(progress, len(images) * (steps + 1))
    budget = Budget(norm, epsilon, value_range)
    return climb_automatically(objective, budget, images.detach(), labels, steps, early_stop, meter)


class _Evading(Objective):
    """The lesser of two conditions; a copy counts as wrong where both hold."""

    def __init__(
        self,
        defence: nn.Module,
        classifier: nn.Module,
        threshold: float,
        exchange: float,
        targeted: bool,
        eot: int,
    ) -> None:
        super().__init__(nn.Sequential(defence, classifier), "margin", targeted, eot)
        self.defence, self.classifier = defence, classifier
        self.threshold, self.exchange = threshold, exchange

    def _answer(self, points: Tensor, labels: Tensor, loss: str) -> Answer:
        if self.eot > 1:
            points = points.unsqueeze(1).expand(-1, self.eot, -1, -1, -1).flatten(0, 1)
            labels = labels.repeat_interleave(self.eot)
        defended = self.defence(points)
        logits = self.classifier(defended)
        check_logits(logits, labels)
        won = self._scores(logits, labels, "margin")
        errors = (points - defended.detach()).square().flatten(1).mean(1)
        slack = self.exchange * (1 - errors / self.threshold)
        scores = torch.minimum(won, slack.to(won))
        with torch.no_grad():
            equal = logits.argmax(1) == labels
            fooled = equal if self.targeted else ~equal
            wrong = (fooled & (errors <= self.threshold)).float()
        if self.eot > 1:
            scores, wrong = scores.view(-1, self.eot).mean(1), wrong.view(-1, self.eot).mean(1)
        return Answer(scores, wrong)
