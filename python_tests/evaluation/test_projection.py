"""Projections in groups: the same bits whatever the groups, and short calls."""

import pytest
import torch

from defgan_fast import data, models
from defgan_fast.evaluation import projection
from defgan_fast.projector import Projector


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(2)
    return models.Generator(4, 2)


@pytest.fixture(scope="module")
def images():
    return data.load("digits", split="validation").images[:20]


@pytest.fixture
def projector(generator):
    return Projector(generator, steps=3, restarts=2)


def sizes(monkeypatch, projector, images, seconds):
    """The calls' numbers of images where a call of n images takes ``seconds(n)``, and what comes of it."""
    clock, calls = [0.0], []
    project = projector.project

    def timed(batch):
        calls.append(len(batch))
        clock[0] += seconds(len(batch))
        return project(batch)

    monkeypatch.setattr(projector, "project", timed)
    monkeypatch.setattr(projection.time, "perf_counter", lambda: clock[0])
    return calls, projection.project(projector, images)


def test_slow_calls_become_short(monkeypatch, projector, images):
    monkeypatch.setattr(projection, "LARGEST_FIXED_GROUP", 8)
    calls, found = sizes(monkeypatch, projector, images, lambda n: 0.5 * n)
    assert calls == [8, 2, 2, 2, 2, 2, 2]
    monkeypatch.undo()
    whole = projector.project(images)
    assert torch.equal(found.images, whole.images)
    assert torch.equal(found.errors, whole.errors)


def test_fast_calls_grow(monkeypatch, projector, images):
    monkeypatch.setattr(projection, "LARGEST_FIXED_GROUP", 1)
    calls, _ = sizes(monkeypatch, projector, images, lambda n: 0.01 * n)
    assert calls == [1, 4, 15]
    monkeypatch.setattr(projection, "LARGEST_GROUP", 6)
    monkeypatch.undo()
    monkeypatch.setattr(projection, "LARGEST_FIXED_GROUP", 1)
    monkeypatch.setattr(projection, "LARGEST_GROUP", 6)
    calls, _ = sizes(monkeypatch, projector, images, lambda n: 0.01 * n)
    assert calls == [1, 4, 6, 6, 3]


def test_the_reference_has_groups_of_a_fixed_size(monkeypatch, generator, images):
    """Its bits depend on the batch, so the batch must not depend on the machine."""
    reference = Projector(generator, steps=2, restarts=1, backend="reference")
    monkeypatch.setattr(projection, "LARGEST_FIXED_GROUP", 6)
    calls, _ = sizes(monkeypatch, reference, images, lambda n: 100.0 * n)
    assert calls == [6, 6, 6, 2]


def test_no_images(projector, images):
    found = projection.project(projector, images[:0])
    assert found.images.shape == (0, 1, 28, 28)
    assert found.errors.shape == (0,)


def test_work_of_the_paper_is_one_image_a_call():
    """L = 200, R = 10 on the paper's generator takes seconds for a few images on two cores."""
    assert projection.fixed_group(Projector(models.Generator())) == 1
