"""Checkpoints: a resumed run has the bits of one that was never stopped, however it was stopped."""

import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from defgan_fast.training import loop
from defgan_fast.training.classifier import ClassifierSettings, ClassifierTrainer
from defgan_fast.training.wgan_gp import GanSettings, WganGp

STEPS = 6


@pytest.fixture
def images():
    return torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def make_trainer(kind, images, **changes):
    if kind == "gan":
        small = {"latent_size": 4, "width": 2, "critic_width": 2, "batch": 7, "augment": 1.0, "steps": STEPS}
        settings = GanSettings(**{"critic_steps": 2, "lr_schedule": "linear", **small, **changes})
        return WganGp(settings, images, "hash")
    # D has dropout, whose random numbers are PyTorch's own.
    settings = ClassifierSettings(**{"arch": "D", "batch": 7, "augment": 1.0, **changes})
    return ClassifierTrainer(settings, images, torch.arange(40) % 10, "hash")


def tensors(state):
    """All tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [t for part in state for t in tensors(part)] if isinstance(state, list | tuple) else []


def assert_same_bits(one, other):
    first, second = tensors(one.state()), tensors(other.state())
    assert len(first) == len(second) > 10
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["gan", "classifier"])
def test_three_and_three_steps_are_six(kind, images, tmp_path):
    whole = make_trainer(kind, images)
    loop.run(whole, STEPS, tmp_path / "whole", log_every=1)
    loop.run(make_trainer(kind, images), 3, tmp_path / "parts", log_every=1)
    torch.rand(5)  # the caller's own random numbers must not matter
    resumed = make_trainer(kind, images)
    loop.run(resumed, STEPS, tmp_path / "parts", resume=True, log_every=1)
    assert resumed.step == STEPS
    assert_same_bits(whole, resumed)

    def rows(folder):
        with (tmp_path / folder / loop.METRICS).open() as file:
            return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in csv.DictReader(file)]

    assert rows("whole") == rows("parts")
    assert [int(row["step"]) for row in rows("parts")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("kind", ["gan", "classifier"])
def test_the_state_is_needed(kind, images, tmp_path):
    """Otherwise the test above would pass with an empty checkpoint."""
    one, other = make_trainer(kind, images), make_trainer(kind, images, seed=1)
    loop.run(one, 3, tmp_path / "one")
    loop.run(other, 3, tmp_path / "other")
    assert not all(
        torch.equal(a, b) for a, b in zip(tensors(one.state()), tensors(other.state()), strict=True)
    )


def test_training_leaves_the_callers_random_state_alone(images, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    loop.run(make_trainer("classifier", images), 2, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_signal_saves_at_the_end_of_the_step(images, tmp_path):
    class Interrupting(WganGp):
        def advance(self):
            if self.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().advance()

    before = signal.getsignal(signal.SIGINT)
    trainer = Interrupting(make_trainer("gan", images).options, images, "hash")
    with pytest.raises(loop.Interrupted, match=r"interrupted at step 3 of 6; continue with --resume"):
        loop.run(trainer, STEPS, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is before
    resumed = make_trainer("gan", images)
    loop.run(resumed, STEPS, tmp_path / "stopped", resume=True)
    whole = make_trainer("gan", images)
    loop.run(whole, STEPS, tmp_path / "whole")
    assert_same_bits(whole, resumed)


def test_killed_run_resumes_to_the_same_bits(tmp_path):
    """SIGKILL through the command line, in the middle of a run that saves at every step."""
    command = [sys.executable, "-m", "defgan_fast", "train", "gan", "--dataset", "digits", "--steps", "12"]
    command += ["--width", "2", "--critic-width", "2", "--batch", "8", "--checkpoint-every", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out, *more):
        arguments = [*command, "--out", str(tmp_path / out), *more]
        return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    killed, whole = start("killed"), start("whole")
    checkpoint = tmp_path / "killed" / loop.CHECKPOINT
    limit = time.monotonic() + 60
    while not checkpoint.exists() and killed.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    assert checkpoint.exists()
    step = loop.load_checkpoint(checkpoint)["step"]
    resumed = start("killed", "--resume")
    _, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert whole.wait(timeout=120) == 0
    assert step >= 1
    first, second = (loop.load_checkpoint(tmp_path / out / loop.CHECKPOINT) for out in ("killed", "whole"))
    assert first["step"] == second["step"] == 12
    assert all(
        torch.equal(a, b) for a, b in zip(tensors(first["trainer"]), tensors(second["trainer"]), strict=True)
    )


def test_existing_run_is_not_overwritten(images, tmp_path):
    loop.run(make_trainer("gan", images), 2, tmp_path)
    with pytest.raises(FileExistsError, match=r"checkpoint.pt exists: continue it with --resume"):
        loop.run(make_trainer("gan", images), 2, tmp_path)


def test_other_settings_are_named(images, tmp_path):
    loop.run(make_trainer("gan", images), 2, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint.pt was made with width 2, got width 3"):
        loop.run(make_trainer("gan", images, width=3), STEPS, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"made with steps 6, got steps 9"):
        loop.run(make_trainer("gan", images, steps=9), 9, tmp_path, resume=True)
    other_data = WganGp(make_trainer("gan", images).options, images, "other hash")
    with pytest.raises(ValueError, match=r"made with data 'hash', got data 'other hash'"):
        loop.run(other_data, STEPS, tmp_path, resume=True)


def test_constant_rate_may_be_prolonged(images, tmp_path):
    constant = {"lr_schedule": "constant"}
    loop.run(make_trainer("gan", images, steps=3, **constant), 3, tmp_path / "parts")
    longer = make_trainer("gan", images, steps=5, **constant)
    loop.run(longer, 5, tmp_path / "parts", resume=True)
    whole = make_trainer("gan", images, steps=5, **constant)
    loop.run(whole, 5, tmp_path / "whole")
    assert_same_bits(whole, longer)


@pytest.mark.parametrize("keep", [0, 50, 0.5, 0.99])
def test_truncated_checkpoint(keep, images, tmp_path):
    loop.run(make_trainer("gan", images), 2, tmp_path)
    path = tmp_path / loop.CHECKPOINT
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"checkpoint.pt is truncated or not a checkpoint \(") as caught:
        loop.run(make_trainer("gan", images), STEPS, tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_foreign_checkpoint(images, tmp_path):
    torch.save({"model": torch.zeros(3)}, tmp_path / loop.CHECKPOINT)
    with pytest.raises(ValueError, match=r"checkpoint.pt is not a checkpoint of defgan_fast training"):
        loop.run(make_trainer("gan", images), 2, tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent"):
        loop.load_checkpoint(tmp_path / "absent.pt")


def test_full_disk_leaves_the_last_checkpoint(images, tmp_path, monkeypatch):
    loop.run(make_trainer("gan", images), 2, tmp_path)
    before = (tmp_path / loop.CHECKPOINT).read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left"):
        loop.run(make_trainer("gan", images), 3, tmp_path, resume=True)
    assert (tmp_path / loop.CHECKPOINT).read_bytes() == before


def test_metrics_after_the_checkpoint_are_dropped(images, tmp_path):
    loop.run(make_trainer("gan", images), 2, tmp_path, log_every=1)
    with (tmp_path / loop.METRICS).open("a") as file:
        file.write("3,1,1,1,1\n")
    loop.run(make_trainer("gan", images), 4, tmp_path, resume=True, log_every=1)
    with (tmp_path / loop.METRICS).open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_samples_are_asked_for(images, tmp_path):
    seen = []
    loop.run(make_trainer("gan", images), 5, tmp_path, sample_every=2, on_sample=seen.append)
    assert seen == [2, 4, 5]
