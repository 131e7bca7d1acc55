"""The attacks against values computed by hand, and the constraints that make them fair."""

import pytest
import torch
from torch import nn

from defgan_fast.attacks import fgsm, pgd


class Linear2(nn.Module):
    """Two logits of a 1x2 image: (w . x, 0), so that the gradient's sign is that of -w for class 0."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, images):
        score = images.flatten(1) @ self.w
        return torch.stack((score, torch.zeros_like(score)), 1)


@pytest.fixture
def images():
    return torch.tensor([[[[0.5, 0.9]]], [[[0.1, 0.4]]]])


LABELS = torch.tensor([0, 1])


def test_fgsm_by_hand(images):
    model = Linear2([2.0, -1.0])
    # Class 0 loses by x0 falling and x1 rising, class 1 by the opposite; 0.9 + 0.3 is clipped.
    expected = torch.tensor([[[[0.2, 1.0]]], [[[0.4, 0.1]]]])
    assert torch.allclose(fgsm(model, images, LABELS, 0.3), expected)
    assert model.w.grad is None, "the attacked model collects no gradients"


def test_fgsm_leaves_pixels_without_gradient(images):
    adversarial = fgsm(Linear2([2.0, 0.0]), images, LABELS, 0.3)
    assert torch.equal(adversarial[..., 1], images[..., 1])


def test_fgsm_zero_epsilon_and_other_range(images):
    model = Linear2([2.0, -1.0])
    assert torch.equal(fgsm(model, images, LABELS, 0.0), images)
    wide = fgsm(model, images, LABELS, 0.8, value_range=(-1.0, 1.0))
    assert torch.allclose(wide, torch.tensor([[[[-0.3, 1.0]]], [[[0.9, -0.4]]]]))


def test_pgd_by_hand(images):
    model = Linear2([2.0, -1.0])
    # Three steps of 0.05 stay inside the ball of 0.3; ten do not.
    three = pgd(model, images, LABELS, 0.3, steps=3, step_size=0.05, early_stop=False)
    assert torch.allclose(three, torch.tensor([[[[0.35, 1.0]]], [[[0.25, 0.25]]]]))
    ten = pgd(model, images, LABELS, 0.3, steps=10, step_size=0.05, early_stop=False)
    assert torch.allclose(ten, torch.tensor([[[[0.2, 1.0]]], [[[0.4, 0.1]]]]))


def test_pgd_turns_where_the_gradient_turns():
    """One step overshoots a narrow maximum of the loss; small steps find it."""

    class Bump(nn.Module):
        def forward(self, images):
            loss = -40 * (images.flatten(1)[:, 0] - 0.42).square()
            return torch.stack((-loss, torch.zeros_like(loss)), 1)

    image, label = torch.full((1, 1, 1, 1), 0.3), torch.tensor([0])
    assert fgsm(Bump(), image, label, 0.3).item() == pytest.approx(0.6)
    found = pgd(Bump(), image, label, 0.3, steps=40, step_size=0.01, early_stop=False)
    assert found.item() == pytest.approx(0.42, abs=0.0101)


def test_auto_pgd_by_hand():
    """Steps of 2 epsilon with momentum; at the checkpoint after 0.22 of the steps half of that, from the best point."""

    class Bump(nn.Module):
        def __init__(self):
            super().__init__()
            self.points = []

        def forward(self, images):
            self.points.append(images.item())
            score = 40 * (images.flatten(1)[:, 0] - 0.42).square()  # least at 0.42, where class 0 loses most
            return torch.stack((score, torch.zeros_like(score)), 1)

    def clip(x):
        return min(max(x, 0.0), 0.6)  # the ball of 0.3 around 0.3

    def follow(x, before, step):
        towards = clip(x + (step if x < 0.42 else -step))
        return clip(x + 0.75 * (towards - x) + 0.25 * (x - before))

    model = Bump()
    pgd(model, torch.full((1, 1, 1, 1), 0.3), torch.tensor([0]), 0.3, 20, step_rule="auto", early_stop=False)
    seen = model.points
    expected = [0.3, clip(0.3 + 0.6)]
    for _ in range(3):
        expected.append(follow(expected[-1], expected[-2], 0.6))
    assert seen[:5] == pytest.approx(expected, abs=1e-5)
    best = min(expected, key=lambda x: abs(x - 0.42))
    assert best != expected[4], "the case tests nothing where the last point is the best"
    assert seen[5] == pytest.approx(follow(best, expected[3], 0.3), abs=1e-5)


@pytest.mark.parametrize("random_start", [False, True])
def test_constraints(random_start):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 5))
    images, labels = torch.rand(7, 3, 4, 4), torch.arange(7) % 5
    adversarial = pgd(model, images, labels, 0.1, steps=7, random_start=random_start, early_stop=False)
    assert (adversarial - images).abs().max() <= 0.1 + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert not adversarial.requires_grad
    loss = nn.functional.cross_entropy
    assert loss(model(adversarial), labels) > loss(model(images), labels) + 0.1


def test_random_start_depends_on_the_seed_alone():
    model, images, labels = Linear2([2.0, -1.0]), torch.full((2, 1, 1, 2), 0.5), LABELS

    def start(seed):  # a step of 0 shows where the attack began
        return pgd(model, images, labels, 0.2, 1, step_size=0.0, random_start=True, seed=seed)

    first, state = start(4), torch.random.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(first, start(4))
    assert not torch.equal(first, start(5))
    assert 0.02 < (first - images).abs().max() <= 0.2
    torch.random.set_rng_state(state)


def test_an_image_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    images, labels = torch.rand(5, 3, 2, 2, dtype=torch.float64), torch.arange(5) % 3
    together = pgd(model, images, labels, 0.1, steps=4)
    alone = torch.cat([pgd(model, images[i : i + 1], labels[i : i + 1], 0.1, steps=4) for i in range(5)])
    assert torch.allclose(together, alone)


def test_attack_under_no_grad_and_progress(images):
    seen = []
    with torch.no_grad():
        pgd(
            Linear2([2.0, -1.0]),
            images,
            LABELS,
            steps=3,
            early_stop=False,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert seen == [(2, 8), (4, 8), (6, 8), (8, 8)]  # two images, three steps and a look at the last point


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_refusals(attack, images):
    model = Linear2([2.0, -1.0])
    with pytest.raises(ValueError, match=r"epsilon must be at least 0, got -0.1"):
        attack(model, images, LABELS, -0.1)
    with pytest.raises(ValueError, match=r"images must be floating point \[N, C, H, W\], got torch.uint8"):
        attack(model, images.byte(), LABELS)
    with pytest.raises(ValueError, match=r"labels must be int64 \[2\], got torch.int64 \(1,\)"):
        attack(model, images, LABELS[:1])
    with pytest.raises(ValueError, match=r"value_range must be"):
        attack(model, images, LABELS, value_range=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"steps must be at least 1, got 0"):
        pgd(model, images, LABELS, steps=0)


def test_a_detached_model_is_an_error_and_not_a_perfect_defence(images):
    class Detached(Linear2):
        def forward(self, images):
            return super().forward(images.detach())

    class Constant(nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 2)

    for model in (Detached([2.0, -1.0]), Constant()):
        with pytest.raises(RuntimeError, match="model must pass gradients to its images"):
            fgsm(model, images, LABELS)
