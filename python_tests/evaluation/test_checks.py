"""The sanity checks: each fires on a fault that is planted here, and none on an honest evaluation."""

import pytest
import torch
from evaluated import digits
from torch import nn

from defgan_fast import Projector, attacks, data
from defgan_fast.evaluation import Attack, Threat, accuracy_curve, checks, evaluate
from defgan_fast.training.classifier import ClassifierSettings, ClassifierTrainer

COUNT = 24
QUICK = {"pgd": {"steps": 10}, "apgd": {"steps": 10}, "square": {"queries": 60}}


@pytest.fixture(scope="module")
def parts():
    return digits(COUNT)


def look(classifier, parts, **arguments):
    arguments = {"threat": Threat("linf", 0.15), "probe": 6, **arguments}
    if "attacks" not in arguments:
        arguments |= {"settings": QUICK}
    return evaluate(classifier, parts.images, parts.labels, **arguments)


class Identity(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(context, x, factor):
        context.factor = factor
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return context.factor * gradient, None


class Scaled(nn.Module):
    """A classifier whose gradient is multiplied by a factor."""

    def __init__(self, classifier, factor):
        super().__init__()
        self.classifier, self.factor = classifier, factor

    def forward(self, images):
        return self.classifier(Identity.apply(images, self.factor))


class Detached(nn.Module):
    """A projector whose output is cut off from its input."""

    def __init__(self, projector):
        super().__init__()
        self.projector = projector

    def forward(self, images):
        return self.projector(images.detach()).detach()


class Noisy(nn.Module):
    """A defence that is never the same twice."""

    def forward(self, images):
        return (images + 0.1 * torch.randn_like(images)).clamp(0, 1)


def test_an_honest_evaluation_of_an_undefended_classifier_is_silent(parts):
    result = look(parts.classifier, parts)
    assert result.warnings == {}
    assert result.minimum < 0.8


@pytest.mark.slow
def test_an_honest_evaluation_of_an_adversarially_trained_classifier_is_silent(parts):
    train = data.load("digits", split="train")
    settings = ClassifierSettings(arch="E", epochs=30, adversarial=0.15)
    trainer = ClassifierTrainer(settings, train, "digits")
    for _ in range(settings.steps(len(train))):
        trainer.advance()
    robust = trainer.result.eval()
    result = look(robust, parts)
    assert result.warnings == {}
    assert result.minimum > 0.3
    assert not any(
        found.warnings for found in accuracy_curve(robust, parts.images, parts.labels, (0.05, 0.1, 0.2))
    )


def test_a_detached_projector(parts):
    defence = Detached(Projector(parts.generator, steps=2, restarts=1))
    threat = Threat("linf", 0.15, gradient="unrolled")
    result = look(parts.classifier, parts, defence=defence, threat=threat, attacks=("pgd", "noise"))
    assert "zero_gradients" in result.warnings
    # An attack that cannot be made is no accuracy, and there is no headline without it.
    assert result.rows[1]["accuracy"] is None
    assert "output does not depend" in result.rows[1]["error"]
    assert result.minimum is None
    assert "could not be made" in result.markdown()


@pytest.mark.parametrize(
    ("factor", "warning"),
    [(0.0, "zero_gradients"), (float("nan"), "nan_gradients"), (1e-8, "tiny_gradients")],
)
def test_gradients_that_are_none(parts, factor, warning):
    result = look(Scaled(parts.classifier, factor), parts, attacks=("noise",))
    assert warning in result.warnings


def test_a_gradient_of_the_wrong_sign(parts):
    result = look(
        Scaled(parts.classifier, -1.0),
        parts,
        threat=Threat("linf", 0.3),
        attacks=("fgsm", "pgd", "square"),
        settings={"pgd": {"steps": 5}, "square": {"queries": 150}},
    )
    assert "white_box_weaker_than_black_box" in result.warnings
    assert "unbounded_attack_fails" in result.warnings


def test_a_clip_outside_of_the_budget(parts):
    def twice(model, images, labels, epsilon, **_):
        return attacks.fgsm(model, images, labels, 2 * epsilon)

    result = look(parts.classifier, parts, attacks=[Attack("twice", twice)])
    assert set(result.warnings) == {"budget_exceeded"}
    assert result.minimum == 1


def test_a_seed_that_changes(parts):
    fired = look(parts.classifier, parts, defence=Noisy(), attacks=("fgsm",)).warnings
    assert set(fired) == {"randomised_without_expectation"}
    threat = Threat("linf", 0.15, starts="fresh")
    assert (
        look(parts.classifier, parts, defence=Noisy(), attacks=("fgsm",), threat=threat, eot=3).warnings == {}
    )


def test_probabilities_for_logits(parts):
    result = look(nn.Sequential(parts.classifier, nn.Softmax(1)).eval(), parts, attacks=("fgsm",))
    assert "softmax_output" in result.warnings


def test_more_steps_that_weaken(parts):
    def tires(model, images, labels, epsilon, steps, **_):
        return images if steps > 5 else attacks.pgd(model, images, labels, epsilon, steps)

    chosen = [Attack("short", tires, {"steps": 5}), Attack("long", tires, {"steps": 6})]
    result = look(parts.classifier, parts, threat=Threat("linf", 0.3), attacks=chosen)
    assert set(result.warnings) == {"more_steps_weaker"}


def test_a_larger_epsilon_that_weakens(parts):
    def shy(model, images, labels, epsilon, **_):
        return images if epsilon > 0.3 else attacks.pgd(model, images, labels, epsilon)

    curve = accuracy_curve(
        parts.classifier, parts.images, parts.labels, (0.3, 0.4), attacks=[Attack("shy", shy)]
    )
    assert curve[0].warnings == {}
    assert set(curve[1].warnings) == {"larger_epsilon_weaker"}


def test_other_evaluations_are_compared_with(parts):
    """An attack that transfers breaks what the one through the defence, whose sign is turned, leaves."""
    transfer = look(
        parts.classifier, parts, threat=Threat("linf", 0.3, gradient="transfer"), attacks=("pgd",)
    )
    wrong = Scaled(parts.classifier, -1.0)
    arguments = {"threat": Threat("linf", 0.3), "attacks": ("pgd",), "probe": 0}
    assert look(wrong, parts, **arguments).warnings == {}
    assert set(look(wrong, parts, beside=[transfer], **arguments).warnings) == {
        "white_box_weaker_than_black_box"
    }


def test_comparisons_know_chance():
    """McNemar's exact test: of n images that one attack alone breaks, all the second's, with probability 2^-n."""
    assert checks.chance(0, 0) == 1
    assert checks.chance(0, 7) == 2**-7
    assert checks.chance(1, 7) == 9 / 2**8
    some, more = torch.zeros(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    more[:6] = True
    assert not checks.significantly_weaker(some, more)
    more[:7] = True
    assert checks.significantly_weaker(some, more)
