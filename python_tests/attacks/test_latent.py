"""The attacks in latent space, on a defence by projection that is small enough to be exact."""

import pytest
import torch
from torch import nn
from victims import RowByRow

from defgan_fast.attacks import latent_cw, latent_lagrange
from defgan_fast.attacks._latent_search import invert

K = 4


class Plane(nn.Module):
    """A generator whose range is a plane of 4x4 images, so that projecting onto it can be done exactly."""

    latent_size = K

    def __init__(self) -> None:
        super().__init__()
        basis = torch.linalg.qr(torch.randn(16, K, generator=torch.Generator().manual_seed(0))).Q
        self.register_buffer("basis", basis)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return 0.5 + 0.25 * (z[:, None] * self.basis).sum(2).view(-1, 1, 4, 4)


class Projection(nn.Module):
    """The nearest image of the plane, with the identity as its gradient."""

    latent_size = K

    def __init__(self, generator: Plane) -> None:
        super().__init__()
        self.generator = generator

    def latents(self, images):
        return 4 * ((images - 0.5).flatten(1)[:, :, None] * self.generator.basis).sum(1)

    def forward(self, images):
        return images + (self.generator(self.latents(images)) - images).detach()


class Sign(nn.Module):
    """Two classes: whether the image's component along the plane's first direction is positive."""

    def __init__(self, generator: Plane) -> None:
        super().__init__()
        self.direction = generator.basis[:, 0]

    def forward(self, images):
        score = 20 * ((images - 0.5).flatten(1) * self.direction).sum(1)
        return torch.stack((-score, score), 1)


@pytest.fixture
def plane():
    generator = Plane()
    return nn.Sequential(Projection(generator), Sign(generator)).eval()


def images_and_labels(model, count=4):
    images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(2)) * 0.4 + 0.3
    with torch.no_grad():
        return images, model(images).argmax(1)


QUICK = {
    latent_cw: {"iterations": 60, "search_steps": 6, "inversion_restarts": 2, "inversion_steps": 80},
    latent_lagrange: {"iterations": 120, "noises": 4, "noise_norm": 0.01, "confidence": 0.05}
    | {"inversion_restarts": 2, "inversion_steps": 80, "learning_rate": 0.03},
}
BOTH = pytest.mark.parametrize("attack", [latent_cw, latent_lagrange], ids=lambda attack: attack.__name__)


def test_inversion_finds_the_projection(plane):
    images, _ = images_and_labels(plane)
    starts = torch.randn(4, 2, K, generator=torch.Generator().manual_seed(0))
    found = invert(plane[0].generator, images, starts, 400)
    assert torch.allclose(found, plane[0].latents(images), atol=0.02)
    assert invert(plane[0].generator, images[:0], starts[:0], 3).shape == (0, K)


@BOTH
def test_the_defended_model_is_fooled_inside_the_budget(attack, plane):
    images, labels = images_and_labels(plane)
    adversarial = attack(plane, images, labels, 1.0, **QUICK[attack])
    assert (plane(adversarial).argmax(1) != labels).all()
    assert (adversarial - images).flatten(1).norm(dim=1).max() <= 1.0 + 1e-5
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


def test_unbounded_search_comes_near_the_boundary(plane):
    """The nearest image of the other side: the foot on the plane, then to the class boundary inside it."""
    images, labels = images_and_labels(plane)
    adversarial = latent_cw(plane, images, labels, None, **QUICK[latent_cw])
    off_plane = (plane[0](images) - images).flatten(1).norm(dim=1)
    to_boundary = (images - 0.5).flatten(1) @ plane[1].direction
    nearest = (off_plane.square() + to_boundary.square()).sqrt()
    far = (adversarial - images).flatten(1).norm(dim=1)
    assert (plane(adversarial).argmax(1) != labels).all()
    assert (far >= nearest - 1e-4).all()
    assert (far <= 1.1 * nearest + 0.02).all()


@BOTH
def test_no_success_outside_the_budget(attack, plane):
    """Under a budget too small for any image nothing is broken, however sure the search is of itself."""
    images, labels = images_and_labels(plane)
    least = ((images - 0.5).flatten(1) @ plane[1].direction).abs().min().item()
    adversarial = attack(plane, images, labels, 0.5 * least, **QUICK[attack])
    assert torch.equal(adversarial, images)


def test_a_proposal_is_cut_to_the_budget(plane):
    """No image of the generator is near enough, but the way towards one crosses the classes inside the budget."""
    images, labels = images_and_labels(plane)
    epsilon = 0.9 * (plane[0](images) - images).flatten(1).norm(dim=1).min().item()
    adversarial = latent_cw(plane, images, labels, epsilon, **QUICK[latent_cw] | {"confidence": 2.0})
    assert (plane(adversarial).argmax(1) != labels).any()
    assert (adversarial - images).flatten(1).norm(dim=1).max() <= epsilon + 1e-5


@BOTH
def test_the_model_decides_and_not_the_classifier(attack, plane):
    """A defended model that cannot be fooled leaves nothing broken, though its classifier alone is."""
    images, labels = images_and_labels(plane)

    class Steadfast(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(labels[:1], 2).double().expand(len(x), 2)

    generator, classifier = plane[0].generator, plane[1]
    same = labels == labels[0]
    adversarial = attack(
        Steadfast(),
        images[same],
        labels[same],
        1.0,
        generator=generator,
        classifier=classifier,
        **QUICK[attack],
    )
    assert torch.equal(adversarial, images[same])


@BOTH
def test_an_image_has_the_same_bits_whatever_the_batch(attack, plane):
    images, labels = images_and_labels(plane)
    generator, classifier = plane[0].generator, RowByRow(plane[1])
    parts = {"generator": RowByRow(generator), "classifier": classifier}
    parts["generator"].latent_size = K
    settings = QUICK[attack] | {"inversion_steps": 20, "iterations": 30}
    together = attack(RowByRow(plane), images, labels, 1.0, **parts, **settings)
    for i in range(len(images)):
        alone = attack(RowByRow(plane), images[i : i + 1], labels[i : i + 1], 1.0, **parts, **settings)
        assert torch.equal(together[i : i + 1], alone)


@BOTH
def test_given_latents_targets_and_progress(attack, plane):
    images, labels = images_and_labels(plane)
    seen = []
    before = torch.random.get_rng_state()
    adversarial = attack(
        plane,
        images,
        1 - labels,
        1.0,
        latents=plane[0].latents(images),
        targeted=True,
        progress=lambda done, total: seen.append((done, total)),
        **QUICK[attack],
    )
    assert (plane(adversarial).argmax(1) == 1 - labels).all()
    assert seen[-1][0] == seen[-1][1]
    assert torch.equal(before, torch.random.get_rng_state())
    assert attack(plane, images[:0], labels[:0], 1.0, **QUICK[attack]).shape == (0, 1, 4, 4)


@BOTH
def test_refusals(attack, plane):
    images, labels = images_and_labels(plane)
    with pytest.raises(
        ValueError, match=r"generator must be given where model is no nn.Sequential.*got RowByRow"
    ):
        attack(RowByRow(plane), images, labels, 1.0)
    with pytest.raises(ValueError, match=r"latents must be floating point \[4, k\], got \(3, 4\)"):
        attack(plane, images, labels, 1.0, latents=torch.zeros(3, 4))

    class Rounded(nn.Module):
        def forward(self, x):
            return plane[1](x.round())

    with pytest.raises(RuntimeError, match="classifier must pass gradients to the latent, got zeros"):
        attack(plane, images, labels, 1.0, classifier=Rounded(), latents=plane[0].latents(images))


def test_images_that_are_broken_already_stay(plane):
    images, labels = images_and_labels(plane)
    for attack in (latent_cw, latent_lagrange):
        assert torch.equal(attack(plane, images, 1 - labels, 1.0, **QUICK[attack]), images)
