"""A projector is a module like any other: state, copies, files, `.to()`, a place in front of a classifier."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from generators import PaperGenerator
from projectors import BACKENDS, K, make_generator, make_projector, same
from torch import Tensor, nn


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_is_the_generators_and_nothing_else(images: Tensor, backend: str) -> None:
    generator = make_generator()
    projector = make_projector(generator, backend=backend)
    assert list(projector.state_dict()) == [f"generator.{key}" for key in generator.state_dict()]
    assert [name for name, _ in projector.named_buffers()] == []
    expected = projector.project(images)
    assert list(projector.state_dict()) == [f"generator.{key}" for key in generator.state_dict()]
    other = make_projector(PaperGenerator(K, 4), backend=backend)
    assert not same(other.project(images), expected)
    other.load_state_dict(projector.state_dict())
    assert same(other.project(images), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_files(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend, seed=8, steps=4, max_rows=7)
    expected = projector.project(images)
    file = io.BytesIO()
    torch.save(projector, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(projector),
        copy.copy(projector),
        pickle.loads(pickle.dumps(projector)),
        torch.load(file, weights_only=False),
    ):
        assert same(twin.project(images), expected)
        assert twin.seed == 8
        assert twin.backend_for(images) == projector.backend_for(images)
    twin = copy.deepcopy(projector)
    twin.generator.linear.weight.data.zero_()
    assert not same(twin.project(images), expected)
    assert same(projector.project(images), expected), "a deep copy must share nothing"


@pytest.mark.parametrize("backend", BACKENDS)
def test_to_float64_and_back(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend)
    expected = projector.project(images)
    assert projector.to(torch.float64) is projector
    assert projector(images.double()).dtype == torch.float64
    projector.to(torch.float32)
    assert same(projector.project(images), expected)
    projector.double().float()
    assert same(projector.project(images), expected)
    projector.bfloat16()
    assert torch.isfinite(projector.project(images).errors).all()
    # Weights have been rounded, starting points must not have been.
    rounded = make_generator().bfloat16().float()
    assert same(projector.float().project(images), make_projector(rounded, backend=backend).project(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_front_of_a_classifier(images: Tensor, backend: str) -> None:
    """End to end: the classifier is trained through it, and the images get a gradient."""
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    projector = make_projector(backend=backend)
    defended = nn.Sequential(projector, classifier)
    x = images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(defended(x), torch.tensor([1, 2, 3, 4]))
    loss.backward()
    # The straight-through gradient is the classifier's own, at the reconstruction.
    clean = projector(images).requires_grad_()
    (expected,) = torch.autograd.grad(
        nn.functional.cross_entropy(classifier(clean), torch.tensor([1, 2, 3, 4])), clean
    )
    assert torch.equal(x.grad, expected)
    assert classifier[1].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in projector.parameters())
    assert list(defended.state_dict()) == [f"0.{key}" for key in projector.state_dict()] + [
        "1.1.weight",
        "1.1.bias",
    ]
