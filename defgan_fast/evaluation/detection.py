"""What a detector of attacks is worth: ROC curves, and one threshold for every attack.

The threshold comes from clean images alone, at a false-positive rate: one chosen for each attack would use knowledge
that a defender does not have. The images that it is fitted on are not those on which its rate is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from defgan_fast.evaluation.metrics import BATCH, auc, interval


class Scores(Protocol):
    """A fitted detector, such as :class:`defgan_fast.Detector` and :class:`defgan_fast.baselines.MagnetDetector`."""

    def score(self, images: Tensor) -> Tensor:
        """Returns how suspicious each image [N, C, H, W] is, [N]."""
        ...

    def predict(self, images: Tensor) -> Tensor:
        """Returns which images [N, C, H, W] are attacks, [N] bool."""
        ...


class Roc(NamedTuple):
    """A receiver operating characteristic, from the strictest threshold to the mildest, T of them."""

    false_positive: Tensor  # [T] float64
    true_positive: Tensor  # [T] float64
    thresholds: Tensor  # [T] float64, infinity first


class Detection(NamedTuple):
    """What a detector does with clean and attacked images.

    Attributes:
        rows: dicts, the first for "clean" images: attack, images, detected (share called an attack, which for clean
            images is the false-positive rate), low and high (95%), auc (None for clean images).
        scores: of the images of each row, [N] on the CPU, by its name.
    """

    rows: tuple[dict[str, Any], ...]
    scores: dict[str, Tensor]

    def roc(self, attack: str) -> Roc:
        """Returns the curve of one attack's images against the clean ones."""
        return roc(self.scores["clean"], self.scores[attack])

    def markdown(self) -> str:
        """Returns the rows as a table."""
        lines = ["| images | count | called attacks | 95% | AUC |", "|---|---|---|---|---|"]
        for row in self.rows:
            area = "" if row["auc"] is None else f"{row['auc']:.4f}"
            between = f"{row['low']:.3f} to {row['high']:.3f}"
            lines.append(
                f"| {row['attack']} | {row['images']} | {row['detected']:.3f} | {between} | {area} |"
            )
        return "\n".join(lines) + "\n"


def roc(clean: Tensor, attacked: Tensor) -> Roc:
    """Returns the ROC curve of scores as a detector.

    Args:
        clean: [N] scores of clean images.
        attacked: [M] scores of attacked ones, which are to be larger.
    """
    # scikit-learn takes a second to import.
    from sklearn.metrics import roc_curve

    truth = [0] * len(clean) + [1] * len(attacked)
    found = roc_curve(truth, torch.cat((clean, attacked)).double().cpu().numpy(), drop_intermediate=False)
    return Roc(*(torch.from_numpy(values.astype(float)) for values in found))


def detect(detector: Scores, clean: Tensor, attacked: Mapping[str, Tensor]) -> Detection:
    """Asks a fitted detector about clean and attacked images.

    Args:
        detector: fitted on other clean images than these.
        clean: [N, C, H, W], N at least 1.
        attacked: attacked images [M, C, H, W] by the name of the attack, M at least 1.

    Raises:
        ValueError: there are no images of a kind.
        RuntimeError: the detector is not fitted.
    """
    groups = {"clean": clean, **attacked}
    if "clean" in attacked:
        raise ValueError("attacked must have other names than 'clean', got it")
    rows, scores = [], {}
    for name, images in groups.items():
        if not len(images):
            raise ValueError(f"{name} must hold at least one image, got 0")
        parts = [(detector.score(part).cpu(), detector.predict(part).cpu()) for part in images.split(BATCH)]
        scores[name], called = (torch.cat(values) for values in zip(*parts, strict=True))
        hits = int(called.sum())
        low, high = interval(hits, len(called))
        area = None if name == "clean" else auc(scores["clean"], scores[name])
        row = {
            "attack": name,
            "images": len(called),
            "detected": hits / len(called),
            "low": low,
            "high": high,
        }
        rows.append({**row, "auc": area})
    return Detection(tuple(rows), scores)
