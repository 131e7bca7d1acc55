"""Attacks through a defence: the projector's own gradients, and defences that draw at random."""

import pytest
import torch
from torch import nn
from victims import RowByRow

from defgan_fast import Projector, attacks, data, weights
from defgan_fast.attacks._objective import Objective

EPSILON = 0.2


@pytest.fixture(scope="module")
def parts():
    test = data.load("digits", split="test")
    return (
        weights.load_generator("digits"),
        weights.load_classifier("digits").eval(),
        test.images[:3],
        test.labels[:3],
    )


def defended(parts, **settings):
    return nn.Sequential(Projector(parts[0], steps=10, restarts=2, **settings), parts[1]).eval()


def test_an_image_has_the_same_bits_whatever_the_batch(parts):
    generator, classifier, images, labels = parts
    model = nn.Sequential(Projector(generator, steps=10, restarts=2), RowByRow(classifier))
    together = attacks.pgd(model, images, labels, EPSILON, 3, early_stop=False)
    for i in range(len(images)):
        alone = attacks.pgd(model, images[i : i + 1], labels[i : i + 1], EPSILON, 3, early_stop=False)
        assert torch.equal(together[i : i + 1], alone)


def test_straight_through_is_the_classifiers_gradient_at_the_reconstruction(parts):
    _, classifier, images, labels = parts
    model = defended(parts)
    with torch.no_grad():
        reconstructions = model[0](images)
    through = Objective(model, "cross_entropy").differentiate(images, labels).gradients
    there = Objective(classifier, "cross_entropy").differentiate(reconstructions, labels).gradients
    assert torch.allclose(through, there)


def test_the_gradient_is_the_projectors(parts):
    _, _, images, labels = parts
    straight, unrolled = (
        attacks.fgsm(defended(parts, gradient=gradient), images, labels, EPSILON)
        for gradient in ("straight_through", "unrolled")
    )
    assert not torch.equal(straight, unrolled)
    with pytest.raises(RuntimeError):
        attacks.fgsm(defended(parts, gradient="none"), images, labels, EPSILON)


def test_a_librarys_attack_through_the_defence_ends_where_ours_does(parts):
    foolbox = pytest.importorskip("foolbox")
    _, _, images, labels = parts
    model = defended(parts)
    theirs = foolbox.attacks.LinfFastGradientAttack().run(
        foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilon=EPSILON
    )
    assert torch.allclose(theirs, attacks.fgsm(model, images, labels, EPSILON), atol=1e-6)


def test_copies_get_starting_points_of_their_own(parts):
    _, _, images, labels = parts
    model = defended(parts, seed=None)
    adversarial = attacks.pgd(model, images, labels, EPSILON, 2, eot=3, early_stop=False)
    assert (adversarial - images).abs().max() <= EPSILON + 1e-6
    projected = model[0](images[:1].expand(3, -1, -1, -1))
    assert not torch.equal(projected[0], projected[1])


def test_the_latent_attack_takes_generator_and_classifier_from_the_model(parts):
    _, _, images, labels = parts
    model = defended(parts)
    latents = model[0].project(images).latents
    adversarial = attacks.latent_cw(
        model, images, labels, None, latents=latents, iterations=40, search_steps=1, initial_c=100.0
    )
    broken = model(adversarial).argmax(1) != labels
    assert broken.any()
    assert torch.equal(adversarial[~broken], images[~broken])


class Coin(nn.Module):
    """Logits (slope * x, 0.1) of 1x1 images, whose slope is -1 or 3, by a coin of its own for each row."""

    def __init__(self):
        super().__init__()
        self.coins = torch.Generator().manual_seed(0)

    def forward(self, images):
        slope = 4.0 * torch.randint(2, (len(images),), generator=self.coins) - 1
        score = slope * images.flatten(1)[:, 0]
        return torch.stack((score, torch.full_like(score, 0.1)), 1)


def test_expectation_over_a_random_model():
    """The margin of class 0 is 0.1 - slope * x: on average its gradient is -1, and half of the copies are wrong."""
    images, labels = torch.full((2, 1, 1, 1), 0.5), torch.zeros(2, dtype=torch.int64)
    answer = Objective(Coin(), "margin", eot=4000).differentiate(images, labels)
    assert torch.allclose(answer.gradients, torch.tensor(-1.0), atol=0.1)
    assert torch.allclose(answer.wrong, torch.tensor(0.5), atol=0.03)
    assert not answer.broken.any(), "an image is broken when every copy is wrong"
    # One copy is a coin toss; with expectation the attack lowers x until both coins are wrong.
    adversarial = attacks.pgd(Coin(), images, labels, 0.5, 20, eot=50, loss="margin")
    assert (adversarial < 0.1 / 3).all()
