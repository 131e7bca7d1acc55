"""The figures: what a classifier says, how often it is right and how sure that is, and how well errors detect."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import nn

from defgan_fast import arguments

BATCH = 256


@torch.no_grad()
def predict(classifier: nn.Module, images: torch.Tensor, batch: int = BATCH) -> torch.Tensor:
    """Returns the class of the largest logit, [N, C, H, W] -> [N] int64, in batches that bound the memory."""
    return torch.cat([classifier(part).argmax(1) for part in images.split(batch)])


def accuracy(classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the share of images [N, C, H, W] whose label [N] the classifier finds; it is put in eval mode."""
    return float((predict(classifier.eval(), images) == labels).double().mean())


def interval(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the interval in which a share lies of which ``hits`` of ``count`` draws were seen.

    It is the score interval of Wilson, "Probable inference, the law of succession, and statistical inference",
    J. Amer. Statist. Assoc. 22 (1927), which keeps its coverage near 0 and 1, where an accuracy under attack often
    is and the normal interval around the share fails (Brown, Cai and DasGupta, "Interval estimation for a binomial
    proportion", Statist. Sci. 16, 2001).

    Args:
        hits: in 0..count.
        count: at least 1.
        confidence: in (0, 1).

    Returns:
        (low, high), in [0, 1].
    """
    count = arguments.count("count", count)
    hits = arguments.count("hits", hits, least=0, most=count)
    confidence = arguments.number("confidence", confidence, above=0, below=1)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = hits / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    scale = 1 + z * z / count
    # At the ends the bound is exactly 0 or 1, which rounding would miss.
    low = 0.0 if hits == 0 else (centre - spread) / scale
    high = 1.0 if hits == count else (centre + spread) / scale
    return low, high


def auc(clean: torch.Tensor, attacked: torch.Tensor) -> float:
    """Returns the area under the ROC curve of reconstruction errors as a detector (paper, section 4.1.3).

    Args:
        clean: [N] errors of clean images.
        attacked: [M] errors of attacked ones, which are to be larger.
    """
    # scikit-learn takes a second to import.
    from sklearn.metrics import roc_auc_score

    truth = [0] * len(clean) + [1] * len(attacked)
    return float(roc_auc_score(truth, torch.cat((clean, attacked)).double().cpu().numpy()))


@torch.no_grad()
def score_samples(classifier: nn.Module, samples: torch.Tensor) -> dict[str, float]:
    """Tells what a classifier makes of generated images [N, C, H, W].

    Returns:
        ``sample_confidence``, the mean largest probability, and ``sample_balance``, the entropy of the classes
        found over that of equal shares: 1 where all classes are drawn equally often, 0 where only one is.
    """
    probabilities = torch.cat([classifier(part).softmax(1) for part in samples.split(BATCH)])
    shares = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]) / len(samples)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum()
    return {
        "sample_confidence": float(probabilities.amax(1).mean()),
        "sample_balance": float(entropy / math.log(probabilities.shape[1])),
    }
