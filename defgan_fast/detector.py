"""Attack detection by reconstruction error (paper, section 4.1.3 and equation 9).

Clean images lie near the generator's range, adversarial ones do not, so an image whose projection is far from it
is called an attack. There is one threshold, fixed by the false-positive rate on clean images alone: choosing it
per attack would use knowledge that a defender does not have.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from .projector import Projector

NO_THRESHOLD = "the detector has no threshold yet: call fit(clean_images) first"


class Detector(nn.Module):
    """Calls an image an attack where its reconstruction error exceeds a threshold fitted on clean images.

    Args:
        projector: the projector whose errors are the score.

    Attributes:
        threshold: [] float32, part of the state, in any conversion of the module's dtype; NaN until `fit`.

    Example:
        >>> detector = Detector(projector).fit(clean_images, fpr=0.05)
        >>> detector.predict(images)
    """

    threshold: Tensor

    def __init__(self, projector: Projector) -> None:
        super().__init__()
        if not isinstance(projector, Projector):
            raise TypeError(f"projector must be a Projector, got {type(projector).__name__}")
        self.projector = projector
        self.register_buffer("threshold", torch.tensor(math.nan))

    def _apply(self, fn: Any, recurse: bool = True) -> Detector:
        threshold = self.threshold
        super()._apply(fn, recurse)
        if self.threshold.dtype != threshold.dtype:  # converting the networks must not round it
            self.threshold = threshold.to(self.threshold.device)
        return self

    def fit(self, clean_images: Tensor, fpr: float = 0.05) -> Detector:
        """Sets the threshold to the least score that at most a fraction `fpr` of the clean images exceed.

        Args:
            clean_images: [B, C, H, W], B at least 1.
            fpr: false-positive rate, in (0, 1).

        Returns:
            The detector itself.
        """
        fpr = arguments.number("fpr", fpr, above=0, below=1)
        scores = self.score(clean_images)
        if scores.numel() == 0:
            raise ValueError("clean_images must hold at least one image, got 0")
        unusable = int((~torch.isfinite(scores)).sum())
        if unusable:
            raise ValueError(
                f"clean_images must have finite reconstruction errors, got {unusable} of {scores.numel()} that have not"
            )
        allowed = math.floor(fpr * scores.numel())
        ordered = scores.sort().values
        self.threshold.copy_(ordered[scores.numel() - 1 - allowed])
        return self

    @torch.no_grad()
    def score(self, images: Tensor) -> Tensor:
        """Returns each image's reconstruction error, [B, C, H, W] -> [B] float32: higher means more suspicious."""
        return self.projector.project(images).errors.float()

    def predict(self, images: Tensor) -> Tensor:
        """Returns which images are attacks, [B, C, H, W] -> [B] bool; raises RuntimeError before `fit`."""
        if torch.compiler.is_compiling():
            torch._assert_async(
                ~torch.isnan(self.threshold), NO_THRESHOLD
            )  # a graph cannot branch on a value
        elif torch.isnan(self.threshold):
            raise RuntimeError(NO_THRESHOLD)
        # Written so that a row that overflowed to NaN counts as an attack.
        return ~(self.score(images) <= self.threshold)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the same as `predict`."""
        return self.predict(images)
