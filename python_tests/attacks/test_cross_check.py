"""The attacks against the same attacks of foolbox and adv-lib, on classifiers without a defence.

The libraries are other people's code from the same papers. Where a library is missing its tests are skipped. On
the digits a fully connected classifier trained here, and the shipped one; on MNIST, where its files are, the
shipped one.
"""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from defgan_fast import attacks, data, models, weights

IMAGES = 200
# A pixel's sign may turn where its gradient is within rounding of zero: foolbox clips x - x0 where ours clips x, and
# the last bits of the points, hence of the gradients, differ. More than this share of pixels is another algorithm.
TURNED_PIXELS = 0.005


@pytest.fixture(scope="module")
def adv_lib():
    """adv-lib's attacks. Some of its modules draw with visdom and torchvision, which these attacks do not call."""
    pytest.importorskip("adv_lib")
    absent = [name for name in ("torchvision", "visdom") if not _importable(name)]
    with pytest.MonkeyPatch.context() as patch:
        for name in absent:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        if "torchvision" in absent:
            models_stub = types.ModuleType("torchvision.models")
            patch.setitem(sys.modules, "torchvision.models", models_stub)
            patch.setattr(sys.modules["torchvision"], "models", models_stub, raising=False)
        if "visdom" in absent:
            patch.setattr(sys.modules["visdom"], "Visdom", object, raising=False)
        from adv_lib.attacks.auto_pgd import apgd
        from adv_lib.attacks.carlini_wagner.l2 import carlini_wagner_l2
    return types.SimpleNamespace(apgd=apgd, carlini_wagner_l2=carlini_wagner_l2)


def _importable(name):
    try:
        __import__(name)
    except Exception:  # a torchvision built for another torch fails with an error of its own
        return False
    return True


class Case:
    """A classifier and images of which it sees all correctly, as attacks on others mean nothing."""

    def __init__(self, classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.classifier = classifier.eval()
        right = self.classifier(images).argmax(1) == labels
        self.images, self.labels = images[right][:IMAGES], labels[right][:IMAGES]

    def has_gradient(self) -> torch.Tensor:
        """Images whose gradient foolbox normalises: it divides by 1e-12 where the norm is less, ours by the norm."""
        variable = self.images.clone().requires_grad_()
        loss = F.cross_entropy(self.classifier(variable), self.labels, reduction="sum")
        return torch.autograd.grad(loss, variable)[0].flatten(1).norm(dim=1) > 2e-12

    def success(self, points: torch.Tensor) -> float:
        return (self.classifier(points).argmax(1) != self.labels).double().mean().item()


@pytest.fixture(scope="module")
def fully_connected() -> Case:
    train = data.load("digits", split="train")
    torch.manual_seed(0)
    classifier = models.Classifier("E")
    optimizer = torch.optim.Adam(classifier.parameters(), 1e-3)
    for _ in range(8):
        for chosen in torch.randperm(len(train.images)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(classifier(train.images[chosen]), train.labels[chosen]).backward()
            optimizer.step()
    test = data.load("digits", split="test")
    return Case(classifier, test.images, test.labels)


@pytest.fixture(scope="module")
def convolutional() -> Case:
    test = data.load("digits", split="test")
    return Case(weights.load_classifier("digits"), test.images[:240], test.labels[:240])


@pytest.fixture(scope="module")
def mnist() -> Case:
    if not os.environ.get("DEFGAN_DATA"):
        pytest.skip("DEFGAN_DATA names no folder with MNIST")
    test = data.load("mnist", split="test")
    return Case(weights.load_classifier("mnist"), test.images[:220], test.labels[:220])


@pytest.fixture(
    params=["fully_connected", "convolutional", pytest.param("mnist", marks=pytest.mark.slow)], scope="module"
)
def case(request) -> Case:
    return request.getfixturevalue(request.param)


def attacked_by_foolbox(name: str, case: Case, epsilon: float, **settings) -> torch.Tensor:
    foolbox = pytest.importorskip("foolbox")
    model = foolbox.PyTorchModel(case.classifier, bounds=(0, 1), device="cpu")
    attack = getattr(foolbox.attacks, name)(**settings)
    return attack.run(model, case.images, case.labels, epsilon=epsilon)


def turned(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Share of pixels that differ by more than rounding."""
    return ((ours - theirs).abs() > 1e-5).double().mean().item()


class Last(nn.Module):
    """Remembers the points that a model was last asked about: where an attack's path ended."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.points = images.detach().clone()
        return self.model(images)


def test_fgsm(case):
    theirs = attacked_by_foolbox("LinfFastGradientAttack", case, 0.1)
    ours = attacks.fgsm(case.classifier, case.images, case.labels, 0.1)
    assert turned(ours, theirs) == 0
    assert turned(attacks.fgsm(case.classifier, case.images, case.labels, 0.1, targeted=True), theirs) > 0.3


def test_fgsm_l2(case):
    theirs = attacked_by_foolbox("L2FastGradientAttack", case, 1.5)
    ours = attacks.fgsm(case.classifier, case.images, case.labels, 1.5, norm="l2")
    comparable = case.has_gradient()
    assert turned(ours[comparable], theirs[comparable]) == 0


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 1.5)])
def test_pgd(case, norm, epsilon):
    """Without a random start the paths end in the same points; ours returns the best point of its path instead."""
    name = "LinfProjectedGradientDescentAttack" if norm == "linf" else "L2ProjectedGradientDescentAttack"
    theirs = attacked_by_foolbox(
        name, case, epsilon, rel_stepsize=None, abs_stepsize=epsilon / 4, steps=10, random_start=False
    )
    model = Last(case.classifier)
    ours = attacks.pgd(model, case.images, case.labels, epsilon, 10, epsilon / 4, norm=norm, early_stop=False)
    comparable = case.has_gradient() if norm == "l2" else torch.ones(len(ours), dtype=torch.bool)
    assert comparable.double().mean() > 0.8
    assert turned(model.points[comparable], theirs[comparable]) <= TURNED_PIXELS
    assert case.success(ours) >= case.success(theirs)
    assert case.success(theirs) > 0.05, "an attack that breaks nothing compares nothing"


def half_fall(case: Case, norm: str) -> float:
    """The radius at which an attack breaks about half of the images, where two attacks differ most."""
    low, high = (0.0, 0.5) if norm == "linf" else (0.0, 5.0)
    for _ in range(7):
        middle = (low + high) / 2
        points = attacks.pgd(case.classifier, case.images, case.labels, middle, 10, norm=norm, loss="margin")
        low, high = (low, middle) if case.success(points) > 0.5 else (middle, high)
    return high


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_auto_pgd(fully_connected, adv_lib, norm):
    compare_auto_pgd(fully_connected, adv_lib, norm)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["convolutional", "mnist"])
def test_auto_pgd_on_convolutions(request, adv_lib, name, norm):
    compare_auto_pgd(request.getfixturevalue(name), adv_lib, norm)


def compare_auto_pgd(case, adv_lib, norm):
    """Three random starts on each side: single starts of either differ among themselves by one image in a hundred."""
    epsilon = half_fall(case, norm)
    torch.manual_seed(0)  # of adv-lib's random starts
    theirs = adv_lib.apgd(
        case.classifier,
        case.images,
        case.labels,
        epsilon,
        float("inf") if norm == "linf" else 2,
        n_iter=50,
        n_restarts=3,
        loss_function="ce",
    )
    settings = {"norm": norm, "step_rule": "auto", "random_start": True, "restarts": 3}
    ours = attacks.pgd(case.classifier, case.images, case.labels, epsilon, 50, **settings)
    print(f"{norm} {epsilon:.4f}: success {case.success(ours):.3f}, adv-lib {case.success(theirs):.3f}")
    assert 0.3 < case.success(theirs) < 0.75
    assert case.success(ours) == pytest.approx(case.success(theirs), abs=0.0101)


def test_carlini_wagner(fully_connected, adv_lib):
    """The same searches and iterations on both sides: as many successes, and as near."""
    compare_carlini_wagner(fully_connected, adv_lib)


@pytest.mark.slow
def test_carlini_wagner_on_mnist(mnist, adv_lib):
    compare_carlini_wagner(mnist, adv_lib)


def compare_carlini_wagner(case, adv_lib):
    theirs = adv_lib.carlini_wagner_l2(
        case.classifier,
        case.images,
        case.labels,
        learning_rate=0.05,
        initial_const=0.1,
        binary_search_steps=5,
        max_iterations=100,
    )
    ours = attacks.cw(
        case.classifier,
        case.images,
        case.labels,
        learning_rate=0.05,
        initial_c=0.1,
        search_steps=5,
        iterations=100,
    )
    assert case.success(ours) >= case.success(theirs) > 0.9
    both = (case.classifier(ours).argmax(1) != case.labels) & (
        case.classifier(theirs).argmax(1) != case.labels
    )
    far = [(points - case.images)[both].flatten(1).norm(dim=1).mean().item() for points in (ours, theirs)]
    print(f"mean l2 distance: {far[0]:.4f}, adv-lib {far[1]:.4f}")
    assert far[0] <= 1.02 * far[1]


def test_hop_skip_jump(fully_connected):
    """A decision-based attack is random through and through: its median distance, within a fifth.

    foolbox is given one image at a time, since it divides an image's estimated gradient by the whole batch's norm.
    """
    foolbox = pytest.importorskip("foolbox")
    case = fully_connected
    images, labels = case.images[:20], case.labels[:20]
    model = foolbox.PyTorchModel(case.classifier, bounds=(0, 1), device="cpu")
    torch.manual_seed(0)
    attack = foolbox.attacks.HopSkipJumpAttack(steps=8)
    theirs = torch.cat([attack.run(model, images[i : i + 1], labels[i : i + 1]) for i in range(len(images))])
    ours = attacks.hop_skip_jump(case.classifier, images, labels, norm="l2", steps=8)
    assert (case.classifier(ours).argmax(1) != labels).all()
    far = [(points - images).flatten(1).norm(dim=1).median().item() for points in (ours, theirs)]
    print(f"median l2 distance: {far[0]:.3f}, foolbox {far[1]:.3f}")
    assert far[0] <= 1.2 * far[1]
