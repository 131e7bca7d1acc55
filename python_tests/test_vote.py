"""A vote against a loop over the reconstructions; reconstructions of all restarts against projections of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from projectors import BACKENDS, K, kernels, make_generator, make_images, make_projector, one_line
from torch import Tensor, nn
from torch.nn import functional as F

from defgan_fast import Projector, Vote

LABELS = torch.tensor([1, 2, 3, 4])


def make_classifier() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.BatchNorm1d(20), nn.Linear(20, 10)).eval()


def projections(projector: Projector, images: Tensor, z0: Tensor) -> list[Tensor]:
    """Returns the reconstruction of every restart [B, C, H, W], each by a projection of its own."""
    return [projector.project(images, z0=z0[:, r : r + 1]).images for r in range(z0.shape[1])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled"])
def test_every_image_against_projections_of_their_own(backend: str, gradient: str) -> None:
    projector = make_projector(backend=backend, gradient=gradient)
    images = make_images(make_generator()).requires_grad_()
    z0 = torch.randn(4, 3, K)
    found = projector.project(images, z0=z0, every=True)
    assert found.every_image.shape == (4, 3, 1, 28, 28)
    torch.testing.assert_close(found.images, found.every_image[torch.arange(4), found.restarts])
    weights = torch.randn(4, 3, 1, 28, 28)
    (gradients,) = torch.autograd.grad((found.every_image * weights).sum(), images, retain_graph=True)
    alone = torch.stack(projections(projector, images, z0), 1)
    torch.testing.assert_close(found.every_image, alone, rtol=1e-3, atol=1e-4)
    (expected,) = torch.autograd.grad((alone * weights).sum(), images)
    torch.testing.assert_close(gradients, expected, rtol=1e-2, atol=1e-3)
    (of_best,) = torch.autograd.grad(found.images.sum(), images)
    assert of_best.abs().max() > 0
    if gradient == "straight_through":
        torch.testing.assert_close(gradients, weights.sum(1))
    assert projector.project(images, z0=z0).every_image is None


def test_every_image_of_dropped_rows_follows_their_own_steps() -> None:
    settings = {"steps": 6, "gradient": "unrolled", "lr_decay": 1.0}
    projector = make_projector(keep=((2, 1),), **settings)
    images = make_images(make_generator(), 1).requires_grad_()
    z0 = torch.randn(1, 3, K)
    found = projector.project(images, z0=z0, every=True)
    taken = [2, 2, 2]
    taken[int(found.restarts)] = 6
    assert found.errors < found.all_errors.sort().values[0, 1], "the best row must be the one that went on"
    for restart, steps in enumerate(taken):
        own = make_projector(**{**settings, "steps": steps})
        expected = own.project(images, z0=z0[:, restart : restart + 1]).images
        torch.testing.assert_close(found.every_image[:, restart], expected, rtol=1e-3, atol=1e-4)
        (one,) = torch.autograd.grad(expected.square().sum(), images)
        (other,) = torch.autograd.grad(
            found.every_image[:, restart].square().sum(), images, retain_graph=True
        )
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_of_any_reconstruction(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend, gradient="none")
    found = projector.project(images.requires_grad_(), every=True)
    with pytest.raises(RuntimeError, match="none"):
        found.every_image.sum().backward()


@pytest.fixture
def images() -> Tensor:
    return make_images(make_generator())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 5, 1000])
def test_a_vote_is_the_mean_of_the_probabilities(images: Tensor, backend: str, batch: int) -> None:
    projector, classifier = make_projector(backend=backend, restarts=4), make_classifier()
    vote = Vote(projector, classifier, batch)
    every = projector.project(images, every=True).every_image
    expected = sum(classifier(every[:, r]).softmax(1) for r in range(4)) / 4
    torch.testing.assert_close(vote(images).exp(), expected)
    torch.testing.assert_close(vote(images).softmax(1), expected)
    loss = F.cross_entropy(vote(images), LABELS)
    torch.testing.assert_close(loss, -expected[torch.arange(4), LABELS].log().mean())


def test_the_gradient_goes_through_all_reconstructions(images: Tensor) -> None:
    projector, classifier = make_projector(restarts=4), make_classifier()
    x = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(F.cross_entropy(Vote(projector, classifier)(x), LABELS), x)
    every = projector.project(images, every=True).every_image.requires_grad_()
    mean = torch.stack([classifier(every[:, r]).softmax(1) for r in range(4)]).mean(0)
    (expected,) = torch.autograd.grad(F.nll_loss(mean.log(), LABELS), every)
    assert (expected.flatten(2).abs().amax(2) > 0).all(), "each reconstruction has its part"
    torch.testing.assert_close(found, expected.sum(1))


def test_modes_state_and_copies(images: Tensor) -> None:
    vote = Vote(make_projector(), make_classifier()).train()
    assert vote.classifier.training
    assert not any(module.training for module in vote.projector.generator.modules())
    vote.eval()
    assert torch.equal(copy.deepcopy(vote)(images), vote(images))
    assert {key.split(".")[0] for key in vote.state_dict()} == {"projector", "classifier"}
    assert vote(images[:0]).shape == (0, 10)
    assert vote(images.bfloat16().float()).shape == (4, 10)


@kernels
def test_a_vote_is_compiled_as_one_graph(images: Tensor) -> None:
    torch._dynamo.reset()
    vote = Vote(make_projector(starts="nearest", candidates=50, radius="auto"), make_classifier(), 5)
    compiled = torch.compile(vote, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), vote(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Identity(), nn.Identity()), "projector must be a Projector, got Identity"),
        ((make_projector(), "classifier"), r"classifier must be a torch\.nn\.Module, got str"),
        ((make_projector(), nn.Identity(), 0), "batch must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}") as caught:
        Vote(*arguments)
    one_line(caught)
    with pytest.raises(
        ValueError, match=r"classifier must return logits \[N, classes\], got \[12, 1, 28, 28\]"
    ):
        Vote(make_projector(), nn.Identity())(make_images(make_generator()))
