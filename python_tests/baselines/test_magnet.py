"""MagNet as a baseline: its reformer's draws, its detector's rate, and the gradients that an attacker goes through."""

import pytest
import torch
from torch import nn

from defgan_fast import attacks, evaluation, models
from defgan_fast.baselines import MagnetDetector, Reformer
from defgan_fast.evaluation.detection import detect


def test_reformer_draws_a_member_for_each_image():
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, images):
            return 0 * images + self.value

    members = [Constant(0.25), Constant(0.75)]
    images = torch.rand(60, 1, 4, 4, requires_grad=True)
    reformer = Reformer(members, seed=3)
    reformed = reformer(images)
    first = reformed[:, 0, 0, 0]
    assert set(first.tolist()) == {0.25, 0.75}
    assert 15 < (first == 0.25).sum() < 45
    assert torch.equal(reformed, reformer(images))
    assert torch.equal(reformed[:10], reformer(images[:10]))
    fresh = Reformer(members, seed=None)
    assert not torch.equal(fresh(images), fresh(images))
    assert not reformer.train().training
    # Gradients pass through each image's own member, as an adaptive attack needs.
    members = [models.Autoencoder(3, 2, (1, 8, 8)), models.Autoencoder(3, 2, (1, 8, 8))]
    images = torch.rand(6, 1, 8, 8, requires_grad=True)
    Reformer(members)(images).sum().backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    with pytest.raises(ValueError, match=r"members must hold at least one autoencoder, got none"):
        Reformer([])


class Smooth(nn.Module):
    """An autoencoder that takes away what is finer than a few pixels."""

    def __init__(self, size):
        super().__init__()
        self.pool = nn.AvgPool2d(size, 1, size // 2, count_include_pad=False)

    def forward(self, images):
        return self.pool(images)


def blobs(count):
    rng = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 1, 3, 3, generator=rng)
    return nn.functional.interpolate(coarse, (9, 9), mode="bilinear")


def test_the_detectors_rate_is_shared_out():
    clean = blobs(200)
    detector = MagnetDetector([Smooth(3), Smooth(5)]).fit(clean, fpr=0.1)
    assert ((detector.errors(clean) > detector.thresholds).double().mean(0) == 0.05).all()
    assert 0.05 <= detector.predict(clean).double().mean() <= 0.1
    for norm, power in (("l1", 1), ("l2", 2)):
        errors = MagnetDetector([Smooth(3)], norm).errors(clean)[:, 0]
        expected = (Smooth(3)(clean) - clean).abs().pow(power).mean((1, 2, 3))
        assert torch.allclose(errors, expected)


def test_noise_is_found_by_one_threshold():
    clean = blobs(100)
    detector = MagnetDetector([Smooth(3)], "l2").fit(clean[:50], fpr=0.1)
    noisy = (clean[50:] + 0.3 * torch.randn(clean[50:].shape).sign()).clamp(0, 1)
    found = detect(detector, clean[50:], {"noise": noisy})
    assert found.rows[1]["detected"] == 1
    assert found.rows[1]["auc"] == 1
    restored = MagnetDetector([Smooth(3)], "l2")
    restored.load_state_dict(detector.state_dict())
    assert torch.equal(restored.score(noisy), detector.score(noisy))


def test_an_attacker_goes_through_both():
    images = blobs(6).requires_grad_()
    detector = MagnetDetector([Smooth(3)]).fit(images.detach())
    detector.score(images).sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    torch.manual_seed(2)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(81, 3)).eval()
    with torch.no_grad():
        classifier[1].weight *= 5
        labels = classifier(Smooth(3)(images)).argmax(1)
    # With its own gradient the attack is that on both together.
    own = attacks.pgd(nn.Sequential(Reformer([Smooth(3)]), classifier), images, labels, 0.3, 40)
    unrolled = evaluation.evaluate(
        classifier,
        images.detach(),
        labels,
        defence=Reformer([Smooth(3)]),
        threat=evaluation.Threat("linf", 0.3, "unrolled"),
        attacks=("pgd",),
    )
    assert torch.equal(unrolled.attacked[1].adversarial, own)
    assert unrolled.minimum < 1


def test_refusals():
    with pytest.raises(ValueError, match="members must hold at least one autoencoder, got none"):
        MagnetDetector([])
    with pytest.raises(ValueError, match="norm must be one of l1, l2, got 'linf'"):
        MagnetDetector([Smooth(3)], "linf")
    with pytest.raises(RuntimeError, match="the detector has no thresholds yet"):
        MagnetDetector([Smooth(3)]).predict(blobs(1))
    with pytest.raises(ValueError, match="clean_images must hold at least one image, got 0"):
        MagnetDetector([Smooth(3)]).fit(blobs(1)[:0])
