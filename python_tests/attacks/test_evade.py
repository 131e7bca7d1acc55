"""The attack that knows the detector: it fools the classifier and stays below the threshold, or neither counts."""

import pytest
import torch
from torch import nn
from victims import images_and_labels, small_classifier

from defgan_fast.attacks import evade, pgd

EPSILON = 0.2


class Halved(nn.Module):
    """A defence that draws images to grey, with the identity as its gradient; its error grows with the contrast."""

    def forward(self, images):
        return images + (0.5 * images + 0.25 - images).detach()


@pytest.fixture(scope="module")
def parts():
    model = nn.Sequential(Halved(), small_classifier()).eval()
    images, _ = images_and_labels(model[1])
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def errors(model, images):
    with torch.no_grad():
        return (images - model[0](images)).square().flatten(1).mean(1)


def test_both_conditions_hold(parts):
    model, images, labels = parts
    threshold = float(errors(model, images).median())
    found = evade(model, images, labels, EPSILON, threshold=threshold, steps=30)
    fooled = model(found).argmax(1) != labels
    assert ((found - images).abs() <= EPSILON + 1e-6).all()
    # Half of the images themselves are above the threshold: the attack has to lower their errors, too.
    assert (fooled & (errors(model, found) <= threshold)).double().mean() > 0.8


def test_plain_pgd_is_found_out_where_this_is_not(parts):
    model, images, labels = parts
    threshold = float(errors(model, images).quantile(0.2))
    plain = pgd(model, images, labels, EPSILON, 30, step_rule="auto", loss="margin")
    aware = evade(model, images, labels, EPSILON, threshold=threshold, steps=30)

    def unseen(x):
        return int(((model(x).argmax(1) != labels) & (errors(model, x) <= threshold)).sum())

    assert unseen(aware) > unseen(plain)


def test_without_steps_enough_nothing_is_claimed(parts):
    """Under a threshold that nothing inside the budget can reach, the error is lowered and the class left alone."""
    model, images, labels = parts
    threshold = 1e-6
    found = evade(model, images, labels, EPSILON, threshold=threshold, steps=10)
    assert (errors(model, found) < errors(model, images)).all()


def test_targets_copies_parts_and_nothing(parts):
    model, images, labels = parts
    threshold = float(errors(model, images).max())
    aim = (labels + 1) % 4
    plain = evade(model, images, aim, EPSILON, threshold=threshold, steps=20, targeted=True)
    parts_given = {"defence": model[0], "classifier": model[1]}
    same = evade(
        model[1], images, aim, EPSILON, threshold=threshold, steps=20, targeted=True, eot=2, **parts_given
    )
    assert (model(plain).argmax(1) == aim).any()
    assert torch.allclose(plain, same, atol=1e-5)
    assert evade(model, images[:0], labels[:0], threshold=1.0).shape == (0, 1, 8, 8)
    with pytest.raises(ValueError, match="threshold must be above 0, got 0"):
        evade(model, images, labels, threshold=0)
    with pytest.raises(ValueError, match=r"model must be nn.Sequential\(defence, classifier\).*got Conv2d"):
        evade(model[1][0], images, labels, threshold=1.0)
