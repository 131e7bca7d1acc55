"""The cache of reconstructions: what is in it, what its key depends on, and two runs, a kill and a full disk."""

import copy
import errno
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from defgan_fast import commands, data, models, weights
from defgan_fast.evaluation import cache
from defgan_fast.evaluation.cache import cached
from defgan_fast.projector import Projector


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(2)
    return models.Generator(4, 2)


@pytest.fixture(scope="module")
def images():
    return data.load("digits", split="validation").images[:62]


def projector(generator, **changes):
    return Projector(generator, **{"steps": 3, "restarts": 2, **changes})


def folders(path):
    return sorted(child.name for child in path.iterdir())


def test_the_cache_holds_what_the_projector_gives(generator, images, tmp_path):
    found = cached(projector(generator), images, "hash", tmp_path)
    with torch.no_grad():
        expected = projector(generator).project(images)
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.errors, expected.errors)


def test_nothing_is_computed_twice(generator, images, tmp_path, monkeypatch):
    calls = []
    project = Projector.project

    def counting(self, batch, *args, **kwargs):
        calls.append(len(batch))
        return project(self, batch, *args, **kwargs)

    monkeypatch.setattr(Projector, "project", counting)
    part = cached(projector(generator), images, "hash", tmp_path, limit=7)
    assert part.images.shape == (7, 1, 28, 28)
    assert sum(calls) == 7
    whole = cached(projector(generator), images, "hash", tmp_path)
    assert sum(calls) == len(images) == len(whole.images)
    again = cached(projector(generator), images, "hash", tmp_path)
    assert sum(calls) == len(images)
    assert torch.equal(again.images, whole.images)


def test_images_follow_the_generator_to_its_device(generator, images, tmp_path, monkeypatch):
    """A projector on another device was once given images of the CPU; the meta device stands for a GPU."""
    elsewhere = copy.deepcopy(generator).to("meta")
    moved, expected = projector(elsewhere), projector(generator)
    seen = []

    def project(batch):
        seen.append(batch.device.type)
        return expected.project(torch.zeros(batch.shape))

    monkeypatch.setattr(moved, "project", project)
    monkeypatch.setattr(moved, "precision_for", lambda one: seen.append(one.device.type))
    monkeypatch.setattr(moved, "backend_for", lambda one: seen.append(one.device.type))
    monkeypatch.setattr(cache, "weights_hash", lambda module: "hash of the weights")
    found = cached(moved, images, "hash", tmp_path, limit=3)
    assert set(seen) == {"meta"}
    assert found.images.device.type == "cpu"


def test_the_key_depends_on_generator_settings_and_data(generator, images, tmp_path):
    torch.manual_seed(3)
    other = models.Generator(4, 2)
    for number, (model, changes, data_hash) in enumerate(
        [
            (generator, {}, "hash"),
            (other, {}, "hash"),
            (generator, {"steps": 4}, "hash"),
            (generator, {"restarts": 3}, "hash"),
            (generator, {"lr": 5.0}, "hash"),
            (generator, {"seed": 1}, "hash"),
            (generator, {}, "other"),
            (generator, {"start_std": 1.0}, "hash"),
            (generator, {"radius": 1.0}, "hash"),
            (generator, {"keep": ((1, 1),)}, "hash"),
            (generator, {"starts": "nearest", "candidates": 9}, "hash"),
            (generator, {"starts": "nearest", "candidates": 10}, "hash"),
            (generator, {"starts": "nearest", "candidates": torch.ones(9, 4)}, "hash"),
            (generator, {"starts": "nearest", "candidates": torch.zeros(9, 4)}, "hash"),
        ],
        start=1,
    ):
        cached(projector(model, **changes), images, data_hash, tmp_path, limit=1)
        assert len(folders(tmp_path)) == number
    cached(projector(generator), images, "hash", tmp_path, limit=1)
    assert len(folders(tmp_path)) == 14
    with pytest.raises(ValueError, match=r"projector must have a seed to be cached, got seed=None"):
        cached(projector(generator, seed=None), images, "hash", tmp_path)


def test_a_damaged_file_is_named(generator, images, tmp_path):
    cached(projector(generator), images, "hash", tmp_path, limit=1)
    (place,) = tmp_path.iterdir()
    content = (place / cache.IMAGES).read_bytes()
    (place / cache.IMAGES).write_bytes(content[:1000])
    with pytest.raises(ValueError, match=r"images.npy is truncated or not an array .*; delete its folder"):
        cached(projector(generator), images, "hash", tmp_path)
    np.save(place / cache.IMAGES, np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"images.npy must be float32 \(62, 1, 28, 28\), got float32 \(3,\)"):
        cached(projector(generator), images, "hash", tmp_path)


def test_a_full_disk_stops_before_the_work(generator, images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device, reserving space for"):
        cached(projector(generator), images, "hash", tmp_path)
    (place,) = tmp_path.iterdir()
    assert not list(place.glob("*.npy")) + list(place.glob("*.new"))
    monkeypatch.undo()
    assert len(cached(projector(generator), images, "hash", tmp_path).images) == len(images)


# Children are forked from one process that has imported torch, which takes seconds.
TWO_AND_A_KILL = textwrap.dedent(
    """
    import os, pathlib, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from defgan_fast import data, models
    from defgan_fast.projector import Projector
    from defgan_fast.evaluation import cache, projection as projections

    folder = pathlib.Path(sys.argv[1])
    projections.LARGEST_GROUP = 5
    images = data.load("digits", split="validation").images[:62]
    torch.manual_seed(2)
    projector = Projector(models.Generator(4, 2), steps=3, restarts=2)
    calls = 0
    project = projector.project

    def slow(batch):
        global calls
        calls += len(batch)
        time.sleep(0.01)
        return project(batch)

    projector.project = slow

    def child(number):
        pid = os.fork()
        if pid:
            return pid
        cache.cached(projector, images, "hash", folder)
        (folder / f"calls-{number}").write_text(str(calls))
        os._exit(0)

    # Killed half-way, then two at once.
    victim = child(0)
    time.sleep(0.08)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    for pid in [child(1), child(2)]:
        assert os.waitpid(pid, 0)[1] == 0
    """
)


def test_two_runs_and_a_killed_one(generator, images, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TWO_AND_A_KILL, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "calls-0").exists()
    # One of the two waited and then found all of it done; the other did no more than what was left.
    calls = sorted(int((tmp_path / f"calls-{number}").read_text()) for number in (1, 2))
    assert calls[0] == 0
    assert 0 < calls[1] <= len(images)
    assert "waiting for another process that computes" in done.stderr
    found = cached(projector(generator), images, "hash", tmp_path)
    with torch.no_grad():
        expected = projector(generator).project(images)
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.errors, expected.errors)


@pytest.mark.parametrize("on", ["reconstructions", "both"])
def test_train_classifier_on_reconstructions(on, generator, tmp_path, monkeypatch):
    """What the trainer gets, and that the command says it."""
    weights.save(generator, tmp_path / "g.safetensors", {})
    small = data.load("digits", split="validation")
    part = small.first(30)
    monkeypatch.setattr(data, "load", lambda *_: part)
    seen = []
    keep_trainers(monkeypatch, seen)
    words = ["train", "classifier", "--dataset", "digits", "--arch", "E", "--epochs", "1", "--on", on]
    words += ["--augment", "0", "--corrupt", "0", "--projection-steps", "2", "--restarts", "2"]
    words += ["--generator", str(tmp_path / "g.safetensors"), "--cache", str(tmp_path / "cache")]
    assert commands.main([*words, "--out", str(tmp_path / "out")]) == 0
    with torch.no_grad():
        expected = Projector(generator, steps=2, restarts=2)(part.images)
    if on == "both":
        expected = torch.cat((part.images, expected))
    assert torch.equal(seen[0].images, expected)
    assert torch.equal(seen[0].labels, part.labels.repeat(len(expected) // 30))
    command = weights.read_card(tmp_path / "out" / "classifier.safetensors")["command"]
    assert f"--on {on}" in command
    assert "--projection-steps 2 --restarts 2" in command


def keep_trainers(monkeypatch, seen):
    """Keep the trainers that the command makes."""
    from defgan_fast.training import train_classifier as training

    class Kept(training.ClassifierTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self)

    monkeypatch.setattr(training, "ClassifierTrainer", Kept)
