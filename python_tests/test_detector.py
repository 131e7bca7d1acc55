"""The detector: one threshold from clean images alone, whose false-positive rate on them never exceeds what was
asked, and scores that tell the generator's images from everything else.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from generators import make_case
from sklearn.metrics import roc_auc_score
from torch import Tensor

from defgan_fast import Detector, Projector
from defgan_fast.kernels import ops

BACKENDS = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")
    ),
    "reference",
]


def make_projector(backend: str = "auto", **arguments) -> Projector:
    case = make_case("paper")
    return Projector(
        case.generator, **{"steps": 10, "restarts": 3, "lr": case.lr, "backend": backend, **arguments}
    )


def clean(count: int, seed: int = 1) -> Tensor:
    """Images of the generator itself."""
    z = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)) * 0.5
    with torch.no_grad():
        return make_case("paper").generator(z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_is_the_reconstruction_error(backend: str) -> None:
    projector = make_projector(backend)
    x = clean(4)
    scores = Detector(projector).score(x)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, projector.project(x).errors)
    assert Detector(projector).score(x.bfloat16()).dtype == torch.float32
    assert Detector(make_projector()).score(x.double()).dtype == torch.float32
    assert not Detector(projector).score(x.requires_grad_()).requires_grad


def test_scores_grow_with_the_distance_from_the_range() -> None:
    detector = Detector(make_projector())
    x, noise = clean(3), torch.rand(3, 1, 28, 28)
    scores = torch.stack([detector.score(torch.lerp(x, noise, amount)) for amount in (0.0, 0.25, 0.5, 1.0)])
    assert (scores[1:] > scores[:-1]).all()


@pytest.mark.parametrize("fpr", [0.001, 0.01, 0.05, 0.1, 0.29, 0.5, 0.7, 0.99])
def test_false_positives_stay_below_the_rate_asked_for(fpr: float) -> None:
    """And are as many as that allows: the threshold is the least one with that property."""
    detector, x = Detector(make_projector(steps=1)), clean(100)
    assert detector.fit(x, fpr=fpr) is detector
    scores, flagged = detector.score(x), detector.predict(x)
    assert flagged.shape == (100,)
    assert flagged.dtype == torch.bool
    assert torch.equal(flagged, scores > detector.threshold)
    assert flagged.sum() <= fpr * 100 + 1e-9
    assert flagged.sum() >= math.floor(fpr * 100 - 1e-6), "the threshold is higher than it need be"
    assert detector.threshold in scores


@pytest.mark.parametrize("count", [1, 2, 3, 19, 20, 21])
def test_small_clean_sets(count: int) -> None:
    detector, x = Detector(make_projector(steps=1)), clean(count)
    for fpr in (0.05, 0.5):
        detector.fit(x, fpr)
        assert detector.predict(x).float().mean() <= fpr


def test_equal_scores_are_no_attack() -> None:
    """Ties at the threshold count as clean: fpr is an upper bound."""
    x = clean(1).expand(10, -1, -1, -1)
    detector = Detector(make_projector(steps=1)).fit(x, 0.3)
    assert not detector.predict(x).any()


def test_default_rate_is_5_percent() -> None:
    x = clean(60)
    one, other = Detector(make_projector(steps=1)).fit(x), Detector(make_projector(steps=1)).fit(x, fpr=0.05)
    assert torch.equal(one.threshold, other.threshold)
    assert not torch.equal(one.threshold, Detector(make_projector(steps=1)).fit(x, fpr=0.1).threshold)


def test_noise_is_told_from_the_generators_images() -> None:
    detector = Detector(make_projector()).fit(clean(60), fpr=0.05)
    fresh, noise = clean(30, seed=2), torch.rand(30, 1, 28, 28)
    scores = torch.cat([detector.score(fresh), detector.score(noise)])
    assert roc_auc_score([0] * 30 + [1] * 30, scores) > 0.9
    assert detector.predict(noise).float().mean() > 0.9
    assert detector.predict(fresh).float().mean() < 0.4
    assert torch.equal(detector(noise), detector.predict(noise))


def test_a_row_that_overflows_is_an_attack() -> None:
    detector = Detector(make_projector(steps=1, validate=False)).fit(clean(10))
    x = clean(3)
    x[1] = math.nan
    expected = detector.predict(clean(3))
    expected[1] = True
    assert torch.equal(detector.predict(x), expected)


def test_predict_before_fit() -> None:
    with pytest.raises(RuntimeError, match=r"fit\(clean_images\)") as caught:
        Detector(make_projector()).predict(clean(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fpr", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_rate_outside_its_range(fpr: float) -> None:
    with pytest.raises(ValueError, match=r"fpr must lie in \(0, 1\), got") as caught:
        Detector(make_projector(steps=1)).fit(clean(3), fpr=fpr)
    assert "\n" not in str(caught.value)


def test_rate_that_is_no_number() -> None:
    with pytest.raises(TypeError, match="fpr must be a number, got str") as caught:
        Detector(make_projector(steps=1)).fit(clean(3), fpr="5%")
    assert "\n" not in str(caught.value)


def test_empty_clean_set() -> None:
    detector = Detector(make_projector(steps=1))
    with pytest.raises(ValueError, match="clean_images must hold at least one image") as caught:
        detector.fit(clean(3)[:0])
    assert "\n" not in str(caught.value)
    detector.fit(clean(3))
    assert detector.predict(clean(3)[:0]).shape == (0,)


def test_clean_images_that_overflow_are_an_error() -> None:
    """A threshold of NaN would call everything an attack, or pass for a detector that was never fitted."""
    x = clean(4)
    x[:] = math.nan
    with pytest.raises(ValueError, match=r"clean_images.*finite") as caught:
        Detector(make_projector(steps=1, validate=False)).fit(x, fpr=0.3)
    assert "\n" not in str(caught.value)


def test_projector_must_be_one() -> None:
    with pytest.raises(TypeError, match="projector must be a Projector, got Linear") as caught:
        Detector(torch.nn.Linear(2, 2))
    assert "\n" not in str(caught.value)


def test_images_are_checked_as_the_projector_does() -> None:
    with pytest.raises(TypeError, match=r"images must have dtype .*, got uint8"):
        Detector(make_projector(steps=1)).fit((clean(2) * 255).byte())


def test_threshold_travels_with_the_state() -> None:
    detector = Detector(make_projector(steps=2)).fit(clean(20))
    x = torch.cat([clean(3, seed=3), torch.rand(3, 1, 28, 28)])
    expected = detector.predict(x)
    assert expected.any()
    assert not expected.all()
    projector_keys = [f"projector.{key}" for key in detector.projector.state_dict()]
    assert sorted(detector.state_dict()) == sorted(["threshold", *projector_keys])
    fresh = Detector(make_projector(steps=2))
    fresh.load_state_dict(detector.state_dict())
    assert torch.equal(fresh.predict(x), expected)
    for twin in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        assert torch.equal(twin.threshold, detector.threshold)
        assert torch.equal(twin.predict(x), expected)
    # Fitting again replaces it, also for whoever loaded it.
    fresh.fit(torch.rand(10, 1, 28, 28))
    assert fresh.threshold > detector.threshold
    unfitted = Detector(make_projector(steps=2))
    unfitted.load_state_dict(Detector(make_projector(steps=2)).state_dict())
    with pytest.raises(RuntimeError, match="fit"):
        unfitted.predict(x)


def test_modes_of_the_caller() -> None:
    x = clean(10)
    expected = Detector(make_projector(steps=2)).fit(x).threshold
    for mode in (torch.no_grad, torch.inference_mode):
        detector = Detector(make_projector(steps=2))
        with mode():
            detector.fit(x)
            detector.predict(x)
        assert torch.equal(detector.threshold, expected)
        detector.predict(x)
    detector.train()
    assert not detector.projector.generator.training


def test_converting_the_networks_leaves_the_threshold() -> None:
    detector, x = Detector(make_projector(steps=1)), clean(20)
    threshold = detector.fit(x).threshold.clone()
    assert threshold != threshold.bfloat16()
    for convert in (Detector.half, Detector.bfloat16, Detector.double, lambda d: d.to(torch.float16)):
        converted = convert(copy.deepcopy(detector))
        assert converted.threshold.dtype == torch.float32
        assert torch.equal(converted.threshold, threshold)
        assert torch.equal(converted.state_dict()["threshold"], threshold)
    assert copy.deepcopy(detector).to("meta").threshold.is_meta


@pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")
@pytest.mark.parametrize("record", ["compile", "export"])
def test_a_graph_of_the_detector(record: str) -> None:
    detector, x = Detector(make_projector(steps=2)), clean(20)
    torch._dynamo.reset()

    def recorded():
        if record == "compile":
            return torch.compile(detector, backend="aot_eager", fullgraph=True)
        return torch.export.export(detector, (x,)).module()

    with pytest.raises(RuntimeError, match="no threshold yet"):
        recorded()(x)
    detector.fit(x, fpr=0.5)
    torch._dynamo.reset()
    expected = detector(x)
    assert expected.any()
    assert not expected.all()
    assert torch.equal(recorded()(x), expected)
