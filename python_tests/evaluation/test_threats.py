"""Every threat end to end on the digits: quickly with toy settings, and slowly with some that mean something."""

import itertools

import pytest
from evaluated import digits

from defgan_fast import Projector
from defgan_fast.evaluation import Threat, evaluate

GRADIENTS = ("transfer", "straight_through", "unrolled", "black_box")
STARTS = ("known", "fresh", "vote")
ALL = list(itertools.product(GRADIENTS, STARTS))
SUBSTITUTE = {"rounds": 2, "epochs": 1}
TOY = {"pgd": {"steps": 1}, "latent": {"iterations": 2, "search_steps": 1}, "noise": {"tries": 1}}


def run(count, steps, restarts, threat, settings, **arguments):
    parts = digits(count)
    names = [name for name in settings if not (name == "latent" and threat.gradient == "black_box")]
    return evaluate(
        parts.classifier,
        parts.images,
        parts.labels,
        defence=Projector(parts.generator, steps=steps, restarts=restarts),
        threat=threat,
        attacks=names,
        settings={name: settings[name] for name in names},
        held_out=parts.others,
        **arguments,
    )


@pytest.mark.parametrize(("gradient", "starts"), ALL)
def test_every_threat(gradient, starts):
    threat = Threat("linf", 0.2, gradient, starts)
    result = run(1, 3, 2, threat, TOY, eot=2, votes=3, probe=0, substitute=SUBSTITUTE)
    assert result.minimum is not None
    assert all(0 <= row["accuracy"] <= 1 for row in result.rows)
    (noise,) = (row for row in result.rows if row["attack"] == "noise")
    assert noise["threat"] == {"norm": "linf", "epsilon": 0.2, "gradient": "none", "starts": starts}


@pytest.mark.slow
def test_all_threats_with_settings_that_break_the_defence():
    """Through the defence more images fall than by transfer; no check fires on the honest white box."""
    settings = {"pgd": {"steps": 15}, "apgd": {"steps": 15}, "latent": {"iterations": 100, "search_steps": 1}}
    found = {}
    for gradient, starts in ALL:
        if gradient != "straight_through" and starts != "known":
            continue
        threat = Threat("linf", 0.3, gradient, starts)
        found[gradient, starts] = run(
            12, 25, 2, threat, settings, eot=3 if threat.random else 1, votes=5, probe=4
        )
    left = {key: result.minimum for key, result in found.items()}
    assert left["straight_through", "known"] < left["transfer", "known"]
    assert left["straight_through", "known"] <= 0.2
    assert found["straight_through", "known"].warnings == {}
    for norm, epsilon in (("l2", 1.98), ("l2", 4.0)):
        settings = {"apgd": {"steps": 10}, "latent_lagrange": {"iterations": 60, "noises": 4}}
        result = run(6, 25, 2, Threat(norm, epsilon), settings, probe=0)
        assert result.minimum <= result.rows[0]["accuracy"]
