"""Two processes against one: the same batch, the same result within rounding, one set of files."""

import os
import subprocess
import sys

import pytest
import torch

from defgan_fast import weights
from defgan_fast.training import distributed, loop

WORDS = [
    "train",
    "gan",
    "--dataset",
    "digits",
    "--steps",
    "3",
    "--width",
    "2",
    "--critic-width",
    "2",
    "--batch",
    "8",
]
WORDS += ["--critic-steps", "2", "--lr", "0.0001", "--augment", "1", "--sample-every", "2", "--threads", "1"]


def start(out, processes, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    prefix = launcher if processes > 1 else [sys.executable]
    return subprocess.Popen(
        [*prefix, "-m", "defgan_fast", *WORDS, "--out", str(out), *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return out


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(tmp_path):
    running = [start(tmp_path / "two", 2), start(tmp_path / "one", 1)]
    outputs = [finish(process) for process in running]
    assert outputs[0].count("generator of step 3") == 1, "the first process alone reports"
    one, two = (loop.load_checkpoint(tmp_path / name / loop.CHECKPOINT) for name in ("one", "two"))
    assert one["settings"] == two["settings"]
    different = 0
    for network in ("generator", "critic", "average"):
        for name, value in one["trainer"][network].items():
            other = two["trainer"][network][name]
            # Adam's steps are 1e-4 long; those of gradients near zero may point either way.
            assert (value - other).abs().max() < 7e-4
            assert (value - other).abs().median() < 1e-6
            different += int(not torch.equal(value, other))
    assert different > 0, "two processes add in another order: no difference at all means that one did it all"
    assert torch.equal(one["trainer"]["random"], two["trainer"]["random"])
    assert weights.read_card(tmp_path / "two" / "generator.safetensors")["processes"] == 2
    assert sorted(path.name for path in (tmp_path / "two" / "samples").iterdir()) == [
        "step_000002.png",
        "step_000003.png",
    ]


def test_shares_cover_the_batch_once(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    covered = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        covered += [row for part in distributed.part(12, 2) for row in range(12)[part]]
    assert covered == list(range(12))
    with pytest.raises(
        ValueError, match=r"batch must be a multiple of processes x accumulate, 3 x 2, got 10"
    ):
        distributed.part(10, 2)
