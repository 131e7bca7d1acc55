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
    settings = {"apgd": {"steps": 12}, "latent": {"iterations": 30, "search_steps": 1}}
    found = {}
    for gradient, starts in ALL:
        if gradient != "straight_through" and starts != "known":
            continue
        threat = Threat("linf", 0.3, gradient, starts)
        found[gradient, starts] = run(
            8, 20, 2, threat, settings, eot=2 if threat.random else 1, votes=3, probe=3
        )
    left = {key: result.minimum for key, result in found.items()}
    assert left["straight_through", "known"] <= left["transfer", "known"], left
    assert left["straight_through", "known"] < found["straight_through", "known"].rows[0]["accuracy"], left
    assert found["straight_through", "known"].warnings == {}
    for norm, epsilon in (("l2", 1.98), ("l2", 4.0)):
        settings = {"apgd": {"steps": 6}, "latent_lagrange": {"iterations": 30, "noises": 3}}
        result = run(4, 20, 2, Threat(norm, epsilon), settings, probe=0)
        assert result.minimum <= result.rows[0]["accuracy"]
