"""The black-box attack: what it may see, what it trains on, and that its images carry over to the target."""

import pytest
import torch
from torch import nn
from victims import images_and_labels, small_classifier

from defgan_fast import data, weights
from defgan_fast.attacks import black_box, train_substitute


class Oracle(nn.Module):
    """Gives labels only, counts the questions, and refuses to be differentiated."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.asked: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled(), "a black box passes no gradients"
        self.asked.append(images.clone())
        return nn.functional.one_hot(self.model(images).argmax(1), 4).float()


def network() -> nn.Module:
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    torch.random.set_rng_state(state)
    return made


def test_questions_and_augmentation():
    """Each round doubles the images; a new one lies ``step`` from its parent in every pixel that may move."""
    oracle = Oracle(small_classifier())
    held_out, _ = images_and_labels(oracle.model, 10)
    trained = train_substitute(oracle, held_out, substitute=network(), rounds=3, step=0.1, epochs=1)
    assert not trained.training
    asked = [len(x) for x in oracle.asked]
    assert asked == [10, 10, 20]
    change = (oracle.asked[1] - held_out).abs()
    inside = (held_out > 0.1) & (held_out < 0.9)
    assert torch.allclose(change[inside], torch.tensor(0.1), atol=1e-6)
    assert oracle.asked[2].min() >= 0
    assert oracle.asked[2].max() <= 1


def test_an_image_moves_towards_its_own_label():
    """Papernot et al., equation 3: x + step * sign of the Jacobian's row of the label that the target gave."""
    oracle = Oracle(small_classifier())
    held_out, labels = images_and_labels(oracle.model, 10)
    train_substitute(oracle, held_out, substitute=network(), rounds=2, step=0.1, epochs=3)
    first = train_substitute(Oracle(oracle.model), held_out, substitute=network(), rounds=1, epochs=3)
    variable = held_out.clone().requires_grad_()
    own = first(variable).softmax(1).gather(1, labels[:, None])
    (row,) = torch.autograd.grad(own.sum(), variable)
    expected = (held_out + 0.1 * row.sign()).clamp(0, 1)
    assert (expected - oracle.asked[1]).abs().gt(1e-6).double().mean() < 0.01


def test_new_images_get_the_labels_that_they_were_asked_for():
    class Changing(nn.Module):
        """Says class 0 to the first question and class 1 to the second."""

        asked = 0

        def forward(self, images):
            self.asked += 1
            return nn.functional.one_hot(torch.full((len(images),), self.asked - 1), 4).float()

    held_out, _ = images_and_labels(small_classifier(), 6)
    trained = train_substitute(Changing(), held_out, substitute=network(), rounds=2, step=0.5, epochs=200)
    only_first = train_substitute(Changing(), held_out, substitute=network(), rounds=1, epochs=200)
    assert trained(held_out).softmax(1)[:, 1].mean() > 10 * only_first(held_out).softmax(1)[:, 1].mean()


def test_the_substitute_depends_on_images_and_seed_alone():
    target = small_classifier()
    held_out, _ = images_and_labels(target, 10)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()

    def answers(seed):
        trained = train_substitute(target, held_out, substitute=network(), rounds=2, epochs=2, seed=seed)
        return trained(held_out)

    first = answers(0)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, answers(0))
    assert not torch.equal(first, answers(1))


def test_progress_and_refusals():
    target, seen = small_classifier(), []
    held_out, _ = images_and_labels(target, 5)
    train_substitute(
        target,
        held_out,
        substitute=network(),
        rounds=2,
        epochs=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (14, 14)  # two times two batches, and ten questions
    with pytest.raises(ValueError, match="held_out must hold at least one image, got 0"):
        train_substitute(target, held_out[:0])
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        train_substitute(target, held_out, rounds=0)


def test_it_carries_over_to_the_target():
    """The digits' classifier, asked for labels of 60 of its test images, loses a tenth of others at least."""
    test = data.load("digits", split="test")
    target = weights.load_classifier("digits").eval()
    images, labels = test.images[60:160], test.labels[60:160]
    adversarial = black_box(
        target, images, labels, 0.3, held_out=test.images[:60], rounds=4, epochs=10, substitute="E"
    )
    assert (adversarial - images).abs().max() <= 0.3 + 1e-6
    with torch.no_grad():
        clean = (target(images).argmax(1) == labels).double().mean()
        attacked = (target(adversarial).argmax(1) == labels).double().mean()
    assert attacked <= clean - 0.1
