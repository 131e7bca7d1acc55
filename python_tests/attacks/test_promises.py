"""What every attack promises: its budget, results free of the batch, honest success, no side effects."""

import pytest
import torch
from torch import nn
from victims import CASES, RowByRow, images_and_labels, small_classifier

from defgan_fast import attacks
from defgan_fast.attacks._budget import Budget

ALL = pytest.mark.parametrize("name", CASES)
GRADIENTS = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.gradients])


def run(name, model, images, labels, **changes):
    case = CASES[name]
    return case.attack(model, images, labels, case.epsilon, **{**case.settings, **changes})


def distances(case, points, images):
    change = (points.double() - images.double()).flatten(1)
    return change.abs().amax(1) if case.norm == "linf" else change.norm(dim=1)


@ALL
def test_the_budget_is_kept_and_some_images_break(name):
    model = small_classifier()
    images, labels = images_and_labels(model, 30)
    adversarial = run(name, model, images, labels)
    assert not adversarial.requires_grad
    assert adversarial.dtype == images.dtype
    assert distances(CASES[name], adversarial, images).max() <= CASES[name].epsilon + 1e-5
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    broken = (model(adversarial).argmax(1) != labels).double().mean()
    assert 0 < broken < 1, "the case tests nothing where all images or none break"


@ALL
def test_sixteen_bits(name):
    """The budget is kept up to the rounding of bfloat16: below 1, a pixel is at most 1/512 off."""
    model, case = small_classifier().bfloat16(), CASES[name]
    images, _ = images_and_labels(small_classifier(), 10)
    images = images.bfloat16()
    labels = model(images).argmax(1)
    adversarial = run(name, model, images, labels)
    assert adversarial.dtype == torch.bfloat16
    off = (1 if case.norm == "linf" else 8) / 256 + case.epsilon / 128
    assert distances(case, adversarial, images).max() <= case.epsilon + off
    assert not torch.equal(adversarial, images)


@ALL
def test_other_ranges(name):
    """Images in [-1, 1] give what the same images in [0, 1] give, under twice the epsilon."""
    model = small_classifier()
    images, labels = images_and_labels(model, 6)

    class Halved(nn.Module):
        def forward(self, wide):
            return model((wide + 1) / 2)

    case = CASES[name]
    settings = {k: 2 * v if k == "alpha" else v for k, v in case.settings.items()}
    wide = 2 * images - 1
    adversarial = case.attack(
        Halved(), wide, labels, 2 * case.epsilon, value_range=(-1.0, 1.0), seed=0, **settings
    )
    assert adversarial.min() >= -1
    assert adversarial.max() <= 1
    assert distances(case, adversarial, wide).max() <= 2 * case.epsilon + 1e-5
    if not case.random:  # streams depend on the pixels, which differ
        assert torch.allclose((adversarial + 1) / 2, run(name, model, images, labels), atol=1e-4)


@ALL
def test_an_image_has_the_same_bits_whatever_the_batch(name):
    model = small_classifier()
    images, labels = images_and_labels(model)
    model = RowByRow(model)
    together, asked = run(name, model, images, labels), model.seen
    model.seen = 0
    for i in range(len(images)):
        assert torch.equal(together[i : i + 1], run(name, model, images[i : i + 1], labels[i : i + 1])), i
    assert model.seen == asked, "an image costs the same queries in any batch: no rule looks at all images"
    backwards = run(name, model, images.flip(0), labels.flip(0))
    assert torch.equal(together, backwards.flip(0))


@ALL
def test_no_global_random_state(name):
    model = small_classifier()
    images, labels = images_and_labels(model, 3)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = run(name, model, images, labels)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, run(name, model, images, labels))
    other = run(name, model, images, labels, seed=1)
    assert torch.equal(first, other) != CASES[name].random


@ALL
def test_an_empty_batch(name):
    model = small_classifier()
    images, labels = images_and_labels(model, 2)
    assert run(name, model, images[:0], labels[:0]).shape == (0, 1, 8, 8)


@ALL
def test_surroundings_and_parameters(name):
    model = small_classifier()
    images, labels = images_and_labels(model, 3)
    plain, originals = run(name, model, images, labels), images.clone()
    with torch.no_grad():
        assert torch.equal(plain, run(name, model, images, labels))
    with torch.inference_mode():
        assert torch.equal(plain, run(name, model, images, labels))
    assert torch.equal(images, originals)
    assert all(parameter.grad is None for parameter in model.parameters())


@ALL
def test_targeted_attacks_reach_the_target(name):
    model = small_classifier()
    images, _ = images_and_labels(model, 30)
    with torch.no_grad():
        targets = model(images).topk(2).indices[:, 1]
    case = CASES[name]
    adversarial = case.attack(model, images, targets, 2 * case.epsilon, targeted=True, **case.settings)
    assert distances(case, adversarial, images).max() <= 2 * case.epsilon + 1e-5
    reached = (model(adversarial).argmax(1) == targets).double().mean()
    away = case.attack(model, images, targets, 2 * case.epsilon, targeted=False, **case.settings)
    assert reached > (model(away).argmax(1) == targets).double().mean()
    assert reached > 0.3 if case.gradients else reached > 0


@ALL
def test_progress_reaches_its_end(name):
    model = small_classifier()
    images, labels = images_and_labels(model, 5)
    seen = []
    run(name, model, images, labels, progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert len(set(totals)) == 1
    assert list(done) == sorted(done)
    assert done[-1] == totals[0]


@ALL
def test_expectation_over_copies(name):
    """Copies of an image reach the model in one batch, and a model that is not random answers as for one."""
    model = small_classifier()
    images, labels = images_and_labels(model, 3)
    sizes = []

    class Counting(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return model(x)

    once = run(name, model, images, labels)
    thrice = run(name, Counting(), images, labels, eot=3)
    assert max(sizes) >= 9
    assert all(size % 3 == 0 for size in sizes)
    assert torch.allclose(once, thrice, atol=1e-3)


@GRADIENTS
def test_models_without_gradients_are_errors(name):
    model = small_classifier()
    images, labels = images_and_labels(model, 3)

    class Detached(nn.Module):
        def forward(self, x):
            return model(x.detach())

    class Rounded(nn.Module):
        def forward(self, x):
            return model(x.round())

    for broken, message in ((Detached(), "does not depend on them"), (Rounded(), "zero for all 3")):
        with pytest.raises(RuntimeError, match=f"model must pass gradients to its images, got .*{message}"):
            run(name, broken, images, labels)


@GRADIENTS
def test_an_image_that_is_sure_beyond_float32_is_attacked_all_the_same(name):
    """Cross-entropy underflows where a logit leads by more than about 100; its limit is the margin's gradient."""
    model = small_classifier()
    images, labels = images_and_labels(model, 6)

    class Sharp(nn.Module):
        def forward(self, x):
            return 1e6 * model(x)

    sharp, plain = run(name, Sharp(), images, labels), run(name, model, images, labels)
    broken = (model(sharp).argmax(1) != labels).sum()
    assert broken >= (model(plain).argmax(1) != labels).sum() - 1
    assert not torch.equal(sharp, images)


@ALL
def test_answers_that_are_no_logits(name):
    model = small_classifier()
    images, labels = images_and_labels(model, 3)
    with pytest.raises(ValueError, match=r"model must return logits \[3, classes\]"):
        run(name, nn.Flatten(2), images, labels)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.3"):
        run(name, model, images, labels + 4)
    with pytest.raises(ValueError, match=r"images must lie in value_range \[0, 1\]"):
        run(name, model, images + 1, labels)

    class Broken(nn.Module):
        def forward(self, x):
            return model(x) * torch.nan

    with pytest.raises(RuntimeError, match="must return logits that are numbers"):
        run(name, Broken(), images, labels)


# --- dropping, and faults that the tests above must see ------------------------------------------------------


@pytest.mark.parametrize("name", ["pgd", "apgd", "pgd random", "noise", "square", "hop_skip_jump", "cw"])
def test_finished_images_are_dropped_and_the_others_do_not_notice(name):
    model = small_classifier()
    images, labels = images_and_labels(model, 20)
    stopping, running = RowByRow(model), RowByRow(model)
    stopped = run(name, stopping, images, labels)
    full = run(name, running, images, labels, early_stop=False)
    assert stopping.seen < running.seen
    broken = model(stopped).argmax(1) != labels
    assert torch.equal(broken, model(full).argmax(1) != labels)
    assert torch.equal(stopped[~broken], full[~broken])


def test_carlini_wagner_gives_up_image_by_image():
    """The check whether the loss still falls looks at one image, so that queries add up to those of single ones."""
    model = small_classifier()
    images, labels = images_and_labels(model)
    settings = {"iterations": 60, "learning_rate": 0.1, "initial_c": 0.1}
    together, alone, patient = RowByRow(model), RowByRow(model), RowByRow(model)
    attacks.cw(together, images, labels, **settings)
    queries = []
    for i in range(len(images)):
        before = alone.seen
        attacks.cw(alone, images[i : i + 1], labels[i : i + 1], **settings)
        queries.append(alone.seen - before)
    attacks.cw(patient, images, labels, abort_early=False, **settings)
    assert len(set(queries)) > 1, "the case tests nothing where all images give up at once"
    assert together.seen == sum(queries) < patient.seen


@GRADIENTS
def test_a_sign_turned_breaks_nothing(name):
    """Planted fault: a defence that turns the gradient's sign makes every gradient attack fail."""

    class Turned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    model = small_classifier()
    images, labels = images_and_labels(model, 30)

    class Defended(nn.Module):
        def forward(self, x):
            return model(Turned.apply(x))

    adversarial = run(name, Defended(), images, labels)
    broken = (model(adversarial).argmax(1) != labels).double().mean()
    honest = (model(run(name, model, images, labels)).argmax(1) != labels).double().mean()
    assert broken < honest


@pytest.mark.parametrize("name", ["pgd", "pgd l2", "apgd", "noise", "square"])
def test_a_point_outside_the_budget_never_counts(name, monkeypatch):
    """Planted fault: an attack whose projection does nothing keeps no point that left the ball."""
    model = small_classifier()
    images, labels = images_and_labels(model, 10)
    monkeypatch.setattr(Budget, "project", lambda self, points, images: points)
    changes = {"step_size": CASES[name].epsilon} if name.startswith("pgd") else {}
    adversarial = run(name, model, images, labels, **changes)
    assert distances(CASES[name], adversarial, images).max() <= CASES[name].epsilon + 1e-5
    assert adversarial.min() >= -1e-6
    assert adversarial.max() <= 1 + 1e-6


def test_gradients_that_are_not_finite_warn_and_leave_the_image():
    model = small_classifier()
    images, labels = images_and_labels(model, 3)

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradient = gradient.clone()
            gradient[0, 0, 0, 0] = torch.nan
            return gradient

    class Defended(nn.Module):
        def forward(self, x):
            return model(Poisoned.apply(x))

    with pytest.warns(RuntimeWarning, match="not finite for 1 of 3 images"):
        adversarial = run("fgsm", Defended(), images, labels)
    assert torch.equal(adversarial[0], images[0])
    assert not torch.equal(adversarial[1], images[1])


def test_budget_tolerance_is_the_rounding_and_no_more():
    images = torch.full((1, 1, 4, 4), 0.7)
    for norm, radius in (("linf", 0.25), ("l2", 1.0)):
        budget = Budget(norm, radius, (0.0, 1.0))
        step = torch.full_like(images, -radius / (1 if norm == "linf" else 4))
        assert budget.holds(images + step, images)
        assert not budget.holds(images + 1.0001 * step, images)
    assert not Budget("linf", 1.0, (0.0, 1.0)).holds(images + 0.4, images)
    assert not Budget("linf", 1.0, (0.0, 1.0)).holds(images * torch.nan, images)
    zero = Budget("l2", 0.0, (0.0, 1.0))
    assert torch.equal(zero.project(images + 0.1, images), images)
    assert torch.equal(zero.project(images, images), images)
