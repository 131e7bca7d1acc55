"""What an attack asks a model: how far each image is from being broken, and which change breaks it fastest.

An attack maximises the score of an :class:`Objective`. Scores of different images never mix, so that an image's
result does not depend on its neighbours; copies of an image for a randomised defence travel in one batch.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defgan_fast import arguments

LOSSES = ("cross_entropy", "margin")


class Answer(NamedTuple):
    """What a model says of N points.

    Attributes:
        scores: what the attack maximises, mean over the copies, [N] in the logits' dtype.
        wrong: share of the copies whose class is wrong (targeted: is the target), [N] float32.
        gradients: of each score with respect to its point, [N, C, H, W], where it was asked for.
    """

    scores: Tensor
    wrong: Tensor
    gradients: Tensor | None = None

    @property
    def broken(self) -> Tensor:
        """Which points every copy gets wrong, [N] bool: what counts as broken."""
        return self.wrong == 1


class Objective:
    """The score of points under a model.

    Args:
        model: images to logits [N, classes].
        loss: "cross_entropy" of the label, or "margin": the largest other logit minus the label's (targeted: the
            target's logit minus the largest other one), positive exactly where the point is broken. The margin's
            gradient does not fade where the classifier is sure of itself.
        targeted: labels are classes to reach instead of classes to leave.
        eot: copies of every point in each query, of which a randomised defence draws each one's randomness
            afresh: scores, gradients and errors are means over them (expectation over transformation, Athalye,
            Engstrom, Ilyas, Kwok, ICML 2018).
    """

    def __init__(self, model: nn.Module, loss: str, targeted: bool = False, eot: int = 1) -> None:
        arguments.choice("loss", loss, LOSSES)
        arguments.count("eot", eot)
        self.model, self.loss, self.targeted, self.eot = model, loss, targeted, eot
        self._warned = False

    def ask(self, points: Tensor, labels: Tensor) -> Answer:
        """Returns the scores of points [N, C, H, W] with labels [N], without gradients."""
        with torch.no_grad():
            return self._answer(points.detach(), labels, self.loss)

    def differentiate(self, points: Tensor, labels: Tensor, first: bool = False) -> Answer:
        """Returns scores and gradients of points [N, C, H, W] with labels [N].

        A cross-entropy that has underflowed has a gradient of zeros; such an image gets the margin's, to whose
        direction the exact gradient tends. Gradients that are not finite are set to zero, with one warning.
        Parameters collect no gradients, and a caller's ``no_grad`` or ``inference_mode`` does not matter.

        Args:
            first: whether this is the attack's first look: then the whole batch must not be without gradient.

        Raises:
            RuntimeError: the model's output does not depend on the images differentiably, or (at the first look)
                the gradients of all images are zero: an attack with such gradients would report any defence as
                perfect.
        """
        answer = self._differentiate(points, labels, self.loss)
        assert answer.gradients is not None
        gradients = answer.gradients
        flat = gradients.flatten(1)
        lost = ~flat.isfinite().all(1)
        if lost.any():
            self._warn(int(lost.sum()), len(points))
            gradients = torch.where(lost.view(-1, 1, 1, 1), 0.0, gradients)
        dead = ~(flat != 0).any(1)
        if self.loss == "cross_entropy" and dead.any():
            instead = self._differentiate(points[dead], labels[dead], "margin").gradients
            assert instead is not None
            gradients = gradients.clone()
            gradients[dead] = torch.where(instead.isfinite(), instead, 0.0)
        if first and len(points) and not bool(gradients.any()):
            raise RuntimeError(
                f"model must pass gradients to its images, got gradients that are zero for all {len(points)}"
            )
        return answer._replace(gradients=gradients)

    def _differentiate(self, points: Tensor, labels: Tensor, loss: str) -> Answer:
        with torch.inference_mode(False), torch.enable_grad():
            variable = points.detach().clone().requires_grad_()
            # A clone, since autograd cannot save tensors that a caller made in inference mode.
            answer = self._answer(variable, labels.clone(), loss)
            if not answer.scores.requires_grad:
                raise RuntimeError("model must pass gradients to its images, got a detached output")
            (gradients,) = torch.autograd.grad(answer.scores.sum(), variable, allow_unused=True)
        if gradients is None:
            raise RuntimeError(
                "model must pass gradients to its images, got an output that does not depend on them"
            )
        return Answer(answer.scores.detach(), answer.wrong, gradients)

    def _answer(self, points: Tensor, labels: Tensor, loss: str) -> Answer:
        """Scores and errors of the points, means over the copies."""
        if self.eot > 1:
            points = points.unsqueeze(1).expand(-1, self.eot, -1, -1, -1).flatten(0, 1)
            labels = labels.repeat_interleave(self.eot)
        logits = self.model(points)
        check_logits(logits, labels)
        scores = self._scores(logits, labels, loss)
        with torch.no_grad():
            equal = logits.argmax(1) == labels
            wrong = (equal if self.targeted else ~equal).float()
        if self.eot > 1:
            scores, wrong = scores.view(-1, self.eot).mean(1), wrong.view(-1, self.eot).mean(1)
        return Answer(scores, wrong)

    def _scores(self, logits: Tensor, labels: Tensor, loss: str) -> Tensor:
        entropy = loss == "cross_entropy"
        scores = F.cross_entropy(logits, labels, reduction="none") if entropy else margins(logits, labels)
        return -scores if self.targeted else scores

    def _warn(self, lost: int, count: int) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"model's gradients are not finite for {lost} of {count} images, which do not move there",
                RuntimeWarning,
                stacklevel=4,
            )


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the largest other logit minus the label's, logits [N, classes] and labels [N] -> [N]."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return others.amax(1) - own[:, 0]


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raises where a model's answer to N images is not [N, classes] without NaN, or lacks a label's class."""
    if logits.dim() != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        raise ValueError(f"model must return logits [{len(labels)}, classes], got {tuple(logits.shape)}")
    if len(labels) == 0:
        return
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"labels must lie in 0..{logits.shape[1] - 1}, the model's classes, "
            f"got {int(labels.min())}..{int(labels.max())}"
        )
    if bool(logits.detach().isnan().any()):
        raise RuntimeError("model must return logits that are numbers, got NaN")
