"""Checkpoints: a resumed run has the bits of one that was never stopped, however it was stopped."""

import csv
import importlib.util
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from defgan_fast import data
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
    return ClassifierTrainer(settings, data.Dataset(images, torch.arange(40) % 10, (0.0, 1.0)), "hash")


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


# All runs are forked from one process that has imported torch: importing it 24 times would take minutes.
KILLS = 24
KILL_AND_RESUME = textwrap.dedent(
    """
    import os, pathlib, random, signal, sys, time
    import torch
    torch.set_num_threads(1)
    from defgan_fast.training import loop
    from defgan_fast.training.wgan_gp import GanSettings, WganGp

    folder, kills, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2]), 60
    images = torch.rand(40, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    small = {"latent_size": 4, "width": 2, "critic_width": 2, "batch": 7, "critic_steps": 1, "augment": 1.0}
    settings = GanSettings(steps=steps, lr_schedule="linear", **small)

    def start(out):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            # A checkpoint at every step: about half of the time is spent in writing it.
            loop.run(WganGp(settings, images, "hash"), steps, out, resume=True, checkpoint_every=1)
            os._exit(0)
        return pid

    started = time.perf_counter()
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0
    whole = time.perf_counter() - started
    random.seed(int(sys.argv[3]))
    killed, reached = 0, []
    while killed < kills:
        pid = start(folder / "killed")
        # Runs advance a little between kills, and the last one may not come too early.
        time.sleep(random.uniform(0, 2.5 * whole / kills))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        path = folder / "killed" / loop.CHECKPOINT
        reached.append(loop.load_checkpoint(path)["step"] if path.exists() else 0)
        if reached[-1] == steps:
            break
    assert os.waitpid(start(folder / "killed"), 0)[1] == 0
    print(killed, *reached)
    """
)


def test_killed_runs_resume_to_the_same_bits(tmp_path):
    """SIGKILL at 24 random moments of one run, between steps, in them, and while a checkpoint is written."""
    kills, seed = 0, 0
    while kills < KILLS:
        folder = tmp_path / str(seed)
        command = [sys.executable, "-c", KILL_AND_RESUME, str(folder), str(KILLS - kills), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        killed, *reached = map(int, done.stdout.split())
        assert killed >= 1
        assert reached == sorted(reached), "a checkpoint was lost"
        first, second = (loop.load_checkpoint(folder / out / loop.CHECKPOINT) for out in ("whole", "killed"))
        assert first["step"] == second["step"] == 60
        assert same_bits(first["trainer"], second["trainer"])
        kills, seed = kills + killed, seed + 1


def same_bits(one, other):
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    assert len(pairs) > 10
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_killed_command_resumes_to_the_same_bits(tmp_path):
    """The same through the command line, once: evaluations included."""
    command = [sys.executable, "-m", "defgan_fast", "train", "gan", "--dataset", "digits", "--steps", "12"]
    command += ["--width", "2", "--critic-width", "2", "--batch", "8", "--checkpoint-every", "1"]
    command += ["--evaluate-every", "3", "--evaluate-images", "2", "--evaluate-steps", "2", "--threads", "1"]

    def start(out, *more):
        arguments = [*command, "--out", str(tmp_path / out), *more]
        return subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    killed, whole = start("killed"), start("whole")
    checkpoint = tmp_path / "killed" / loop.CHECKPOINT
    limit = time.monotonic() + 60
    while not checkpoint.exists() and killed.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    assert checkpoint.exists()
    assert loop.load_checkpoint(checkpoint)["step"] >= 1
    _, errors = start("killed", "--resume").communicate(timeout=120)
    assert whole.wait(timeout=120) == 0
    first, second = (loop.load_checkpoint(tmp_path / out / loop.CHECKPOINT) for out in ("killed", "whole"))
    assert first["step"] == second["step"] == 12, errors
    assert same_bits(first["trainer"], second["trainer"])
    assert first["evaluator"]["rows"] == second["evaluator"]["rows"]
    assert len(first["evaluator"]["rows"]) == 4


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


def test_full_disk_in_earnest(images, tmp_path):
    """A limit on the size of files: the system refuses the write itself, half-way through the checkpoint."""
    loop.run(make_trainer("gan", images), 2, tmp_path)
    before = (tmp_path / loop.CHECKPOINT).read_bytes()
    resumed = make_trainer("gan", images)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large"):
            loop.run(resumed, 3, tmp_path, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / loop.CHECKPOINT).read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no half file stays"
    loop.run(make_trainer("gan", images), 3, tmp_path, resume=True)


def test_scalars_go_to_tensorboard_where_it_is_installed(images, tmp_path, monkeypatch):
    """With a writer of its own: the package is large, and most machines lack it."""
    import types

    written, closed = [], []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            closed.append(True)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "tensorboard" else None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    loop.run(make_trainer("gan", images), 4, tmp_path, log_every=2)
    assert written[0] == (str(tmp_path / "tensorboard"), None)
    assert [(name, step) for name, _, step in written[1:]] == [
        (name, step) for step in (2, 4) for name in ("critic_distance", "penalty", "generator_loss")
    ]
    assert closed == [True]
    loop.run(make_trainer("gan", images), 4, tmp_path, resume=True)
    assert written[-1] == (str(tmp_path / "tensorboard"), 5), "what came after the checkpoint is hidden"


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
