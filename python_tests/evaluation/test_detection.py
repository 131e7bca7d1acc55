"""Detection: the ROC curve against its definition, and one threshold for all attacks."""

import pytest
import torch
from evaluated import digits

from defgan_fast import Detector, Projector, attacks
from defgan_fast.evaluation.detection import detect, roc
from defgan_fast.evaluation.metrics import auc


def test_the_curve_is_what_the_definition_says():
    rng = torch.Generator().manual_seed(0)
    clean, attacked = torch.randn(50, generator=rng), torch.randn(30, generator=rng) + 1
    curve = roc(clean, attacked)
    for false, true, threshold in zip(*curve, strict=True):
        assert false == pytest.approx((clean >= threshold).double().mean().item())
        assert true == pytest.approx((attacked >= threshold).double().mean().item())
    area = torch.trapezoid(curve.true_positive, curve.false_positive).item()
    pairs = (attacked[:, None] > clean).double().mean().item()  # the chance that an attack scores higher
    assert area == pytest.approx(pairs)
    assert auc(clean, attacked) == pytest.approx(pairs)


def test_one_threshold_for_every_attack():
    parts = digits(6)
    projector = Projector(parts.generator, steps=15, restarts=2)
    detector = Detector(projector).fit(parts.others, fpr=0.1)
    attacked = {
        "fgsm": attacks.fgsm(parts.classifier, parts.images, parts.labels, 0.3),
        "noise": attacks.noise(parts.classifier, parts.images, parts.labels, 0.3, tries=1),
    }
    found = detect(detector, parts.images, attacked)
    assert [row["attack"] for row in found.rows] == ["clean", "fgsm", "noise"]
    for row in found.rows:
        called = detector.predict({"clean": parts.images, **attacked}[row["attack"]])
        assert row["detected"] == called.double().mean().item()
        assert row["low"] <= row["detected"] <= row["high"]
    assert found.rows[0]["auc"] is None
    assert found.rows[1]["auc"] == auc(detector.score(parts.images), detector.score(attacked["fgsm"])) > 0.7
    assert found.roc("fgsm").true_positive[-1] == 1
    assert "| fgsm | 6 |" in found.markdown()
    with pytest.raises(ValueError, match="fgsm must hold at least one image, got 0"):
        detect(detector, parts.images, {"fgsm": parts.images[:0]})
    with pytest.raises(ValueError, match="attacked must have other names than 'clean'"):
        detect(detector, parts.images, {"clean": parts.images})
