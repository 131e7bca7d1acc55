"""Evaluations: what the rows say, that an image is by itself, and that nothing that is done is done again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from evaluated import RowByRow, digits
from torch import nn

from defgan_fast import Projector, attacks
from defgan_fast.evaluation import Attack, Threat, accuracy_curve, evaluate, report
from defgan_fast.evaluation.metrics import interval
from defgan_fast.evaluation.targets import StraightThrough, attackable, bare, variant

COUNT = 8


@pytest.fixture(scope="module")
def parts():
    return digits(COUNT)


@pytest.fixture(scope="module")
def projector(parts):
    return Projector(parts.generator, steps=6, restarts=2)


def test_rows_and_headline(parts):
    classifier, images, labels = parts.classifier, parts.images, parts.labels
    threat = Threat("linf", 0.15)
    result = evaluate(classifier, images, labels, threat=threat, attacks=("fgsm", "pgd"), probe=0)
    assert [row["attack"] for row in result.rows] == ["clean", "fgsm", "pgd"]
    adversarial = attacks.fgsm(classifier, images, labels, 0.15)
    right = int((classifier(adversarial).argmax(1) == labels).sum())
    fgsm = result.rows[1]
    assert fgsm["accuracy"] == right / COUNT == fgsm["undefended"]
    assert (fgsm["low"], fgsm["high"]) == interval(right, COUNT)
    assert fgsm["images"] == COUNT
    assert fgsm["threat"] == {
        "norm": "linf",
        "epsilon": 0.15,
        "gradient": "straight_through",
        "starts": "known",
    }
    broken = torch.stack([~row.right for row in result.attacked]).any(0)
    assert result.minimum == 1 - broken.double().mean().item()
    assert result.minimum_interval == interval(int((~broken).sum()), COUNT)
    assert json.loads(json.dumps(result.as_dict()))["minimum"] == result.minimum
    assert f"**{result.minimum:.3f}**" in result.markdown()


def test_the_headline_is_image_by_image(parts):
    """Two attacks that break one half each leave nothing, though each leaves a half."""
    classifier, images, labels = parts.classifier, parts.images, parts.labels

    def breaks(parity):
        def attack(model, x, y, epsilon, **_):
            moved = attacks.pgd(model, x, y, 1.0, 20)
            places = torch.tensor([int((images == one).flatten(1).all(1).nonzero()[0, 0]) for one in x])
            return torch.where((places % 2 == parity).view(-1, 1, 1, 1), moved, x)

        return attack

    halves = [Attack("even", breaks(0)), Attack("odd", breaks(1))]
    result = evaluate(classifier, images, labels, threat=Threat("linf", 1.0), attacks=halves, probe=0)
    assert [row["accuracy"] for row in result.rows] == [1.0, 0.5, 0.5]
    assert result.minimum == 0


def test_an_image_outside_the_budget_is_not_broken(parts):
    far = Attack("far", lambda model, x, y, epsilon, **_: 1 - x)
    result = evaluate(
        parts.classifier, parts.images, parts.labels, threat=Threat("linf", 0.3), attacks=[far], probe=0
    )
    assert result.rows[1]["accuracy"] == 1
    assert "budget_exceeded" in result.warnings


@pytest.mark.parametrize("starts", ["known", "fresh", "vote"])
def test_an_image_is_by_itself(parts, projector, starts):
    classifier = RowByRow(parts.classifier)
    settings = {"pgd": {"steps": 2}}
    common = {"defence": projector, "threat": Threat("linf", 0.3, starts=starts), "attacks": ("pgd", "noise")}
    common |= {"settings": settings, "eot": 2, "votes": 3, "probe": 0}
    whole = evaluate(classifier, parts.images[:4], parts.labels[:4], **common)
    cut = evaluate(classifier, parts.images[1:4], parts.labels[1:4], group=2, **common)
    for row, other in zip(whole.attacked, cut.attacked, strict=True):
        assert torch.equal(row.adversarial[1:], other.adversarial)
        assert torch.equal(row.right[1:], other.right)


def test_nothing_global_is_touched(parts, projector):
    state = torch.random.get_rng_state()
    seed, gradient = projector.seed, projector.gradient
    threat = Threat("linf", 0.2, gradient="unrolled", starts="fresh")
    settings = {"pgd": {"steps": 1}}
    evaluate(
        parts.classifier,
        parts.images[:1],
        parts.labels[:1],
        defence=projector,
        threat=threat,
        attacks=("pgd",),
        settings=settings,
        probe=1,
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert (projector.seed, projector.gradient) == (seed, gradient)


def test_a_row_goes_on_where_it_was_stopped(parts, tmp_path):
    seen = []

    def attack(model, x, y, epsilon, **_):
        seen.append(len(x))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return attacks.fgsm(model, x, y, epsilon)

    arguments = {"attacks": [Attack("own", attack)], "threat": Threat("linf", 0.1), "group": 3, "probe": 0}
    with pytest.raises(KeyboardInterrupt):
        evaluate(parts.classifier, parts.images, parts.labels, folder=tmp_path, **arguments)
    found = evaluate(parts.classifier, parts.images, parts.labels, folder=tmp_path, **arguments)
    assert seen == [3, 3, 3, 2]
    again = evaluate(parts.classifier, parts.images, parts.labels, folder=tmp_path, **arguments)
    assert len(seen) == 4
    assert again.rows == found.rows
    assert json.loads((tmp_path / "report.json").read_text()) == found.as_dict()
    # Other weights, another row.
    with torch.no_grad():
        other = digits(COUNT).classifier
        next(other.parameters()).mul_(1.5)
    evaluate(other, parts.images, parts.labels, folder=tmp_path, **arguments)
    assert len(seen) == 7


def test_a_damaged_row_is_named(parts, tmp_path):
    arguments = {"attacks": ("fgsm",), "probe": 0, "folder": tmp_path}
    evaluate(parts.classifier, parts.images, parts.labels, **arguments)
    (file,) = (tmp_path / "rows").glob("fgsm-*.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"fgsm-\w+\.npz is damaged.*delete it"):
        evaluate(parts.classifier, parts.images, parts.labels, **arguments)


PROGRAM = """
import sys
from evaluated import digits
from defgan_fast.evaluation import Threat, evaluate
parts = digits(9)
result = evaluate(parts.classifier, parts.images, parts.labels, threat=Threat("linf", 0.15), attacks=("pgd", "noise"),
    settings={"pgd": {"steps": 4}, "noise": {"tries": 2}}, group=1, probe=0, folder=sys.argv[1])
print(result.minimum, *(row["accuracy"] for row in result.rows))
"""


def test_a_killed_evaluation_goes_on_to_the_same_numbers(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [os.path.dirname(__file__), environment.get("PYTHONPATH", "")]
    )

    def start(folder):
        words = [sys.executable, "-c", PROGRAM, str(folder)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)

    process = start(tmp_path / "killed")
    while not list((tmp_path / "killed").glob("rows/pgd-*.npz")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = start(tmp_path / "killed").communicate()[0]
    assert killed == start(tmp_path / "whole").communicate()[0] != ""


def test_accuracy_against_epsilon(parts, tmp_path):
    curve = accuracy_curve(parts.classifier, parts.images, parts.labels, (0.3, 0.0, 0.1))
    assert [found.threat.epsilon for found in curve] == [0.0, 0.1, 0.3]
    left = [found.minimum for found in curve]
    assert left == sorted(left, reverse=True)
    assert left[0] == 1 > left[2]
    pytest.importorskip("matplotlib")
    report.plot(curve, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_picture(parts, projector):
    result = evaluate(parts.classifier, parts.images, parts.labels, attacks=("fgsm",), probe=2)
    picture = report.picture(result, parts.classifier, projector, columns=3)
    assert (
        picture.height > 4 * 28
    )  # clean and attacked, each with its reconstruction; the short row is left out
    assert picture.height == report.picture(result, parts.classifier, projector, columns=4).height


def test_the_variants_share_weights_and_leave_their_origin_alone(parts, projector):
    vote = nn.Sequential(projector, parts.classifier)
    other = variant(vote, gradient="unrolled", fresh=True)
    assert (other[0].gradient, other[0].seed) == ("unrolled", None)
    assert (projector.gradient, projector.seed) == ("straight_through", 0)
    assert other[0].generator is projector.generator
    assert variant(vote, gradient="straight_through") is vote
    assert bare(vote)[0] is parts.classifier
    assert bare(parts.classifier) is parts.classifier


def test_straight_through_any_defence(parts):
    """A defence without a gradient is attacked by the gradient at its output, and its values keep their bits."""

    class Rounded(nn.Module):
        def forward(self, x):
            return x.round()

    images, labels = parts.images, parts.labels
    assert torch.equal(StraightThrough(Rounded())(images.clone().requires_grad_()), images.round())
    model = attackable(parts.classifier, Rounded(), Threat())
    assert torch.equal(model(images), parts.classifier(images.round()))
    result = evaluate(parts.classifier, images, labels, defence=Rounded(), attacks=("apgd",), probe=2)
    assert result.minimum < 1
    assert result.rows[1]["undefended"] < 1


def test_unbounded_rows_do_not_count(parts):
    result = evaluate(
        parts.classifier,
        parts.images[:2],
        parts.labels[:2],
        attacks=("cw",),
        settings={"cw": {"iterations": 3}},
        probe=0,
    )
    row = result.rows[1]
    assert row["threat"] == {"norm": "l2", "epsilon": None, "gradient": "straight_through", "starts": "known"}
    assert not row["counts"]
    assert result.minimum == 1


REFUSALS = {
    "attacks must exist in the norm 'l2', got 'square'": {"threat": Threat("l2", 1), "attacks": ("square",)},
    "attacks must exist in the norm 'linf', got 'latent_lagrange'": {"attacks": ("latent_lagrange",)},
    "attacks must be one of": {"attacks": ("magic",)},
    "attacks must have different names": {"attacks": ("pgd", "pgd")},
    "settings must be one of pgd, got 'fgsm'": {"attacks": ("pgd",), "settings": {"fgsm": {}}},
    "held_out must hold the attacker's own images": {"threat": Threat(gradient="black_box")},
    "attacks must need labels alone": {"threat": Threat(gradient="black_box"), "attacks": ("latent",)},
    "defence must have a Projector inside for attack 'latent'": {"attacks": ("latent",)},
    "group must be at least 1, got 0": {"group": 0},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(parts, message):
    with pytest.raises(ValueError, match="^" + message.replace("'", ".")):
        evaluate(parts.classifier, parts.images[:2], parts.labels[:2], **{"probe": 0, **REFUSALS[message]})


def test_more_refusals(parts):
    with pytest.raises(ValueError, match="images must hold at least one image, got 0"):
        evaluate(parts.classifier, parts.images[:0], parts.labels[:0])
    for arguments in ({"norm": "l1"}, {"gradient": "none"}, {"starts": "secret"}, {"epsilon": -1}):
        with pytest.raises(ValueError, match="^" + next(iter(arguments))):
            Threat(**arguments)
    one = evaluate(parts.classifier, parts.images[:2], parts.labels[:2], attacks=(), probe=0)
    with pytest.raises(ValueError, match="beside must hold evaluations of the same images"):
        evaluate(parts.classifier, parts.images[1:3], parts.labels[1:3], beside=[one], probe=0)
    short = Attack("short", lambda model, x, y, epsilon, **_: x[:1])
    with pytest.raises(
        ValueError, match=r"attack 'short' must return images \(2, 1, 28, 28\), got \(1, 1, 28, 28\)"
    ):
        evaluate(parts.classifier, parts.images[:2], parts.labels[:2], attacks=[short], probe=0)
