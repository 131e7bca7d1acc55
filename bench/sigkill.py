"""Kills a training, a cache of reconstructions and a benchmark at random moments, and checks that nothing is lost.

    python bench/sigkill.py --moments 100

Each job is started, killed by SIGKILL after a random time, and started again until it ends by itself. After every kill
what lies on the disk must be readable and must not be less than before; at the end it must have the bits of a job that
nobody killed. A benchmark's timings cannot have the same bits: its finished cases must be kept as they were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defgan_fast.files import write_json
from defgan_fast.training import loop

TRAINING = """
import sys
from pathlib import Path
import torch
from defgan_fast import data
from defgan_fast.training import loop
from defgan_fast.training.classifier import ClassifierSettings, ClassifierTrainer
torch.set_num_threads(1)
images = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(1))
dataset = data.Dataset(images, torch.arange(64) % 10, (0.0, 1.0))
trainer = ClassifierTrainer(ClassifierSettings(arch="D", batch=16, augment=1.0), dataset, "hash")
print("begun", flush=True)
loop.run(trainer, 40, Path(sys.argv[1]), resume=True, checkpoint_every=2, log_every=2)
"""

CACHE = """
import sys
from pathlib import Path
import torch
from defgan_fast import Projector, load_generator
from defgan_fast.evaluation import cache, projection
torch.set_num_threads(1)
projection.LARGEST_FIXED_GROUP = projection.LARGEST_GROUP = 2
images = torch.rand(60, 1, 28, 28, generator=torch.Generator().manual_seed(1))
print("begun", flush=True)
cache.cached(Projector(load_generator("digits"), steps=20, restarts=2), images, "hash", Path(sys.argv[1]))
"""

BENCH = """
import sys
from defgan_fast.benchmark import run
from defgan_fast.commands import main
run.QUICK_SIZES = [(1, 1), (1, 2), (2, 1), (2, 2)]
print("begun", flush=True)
sys.exit(main(["bench", "--quick", "--generator", "digits", "--threads", "1", "--json", sys.argv[1] + "/report.json"]))
"""


class Job:
    """A job that writes into a folder, and what there is to know of the folder."""

    def __init__(self, code: str) -> None:
        self.code = code

    def start(self, folder: Path) -> subprocess.Popen[str]:
        """Starts the job, and returns once its imports are done, which are not what is to be killed."""
        # The child's errors go to a file, which cannot fill up as a pipe can.
        with (folder / "stderr").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-c", self.code, str(folder)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def finished(self, folder: Path) -> int:
        """Returns how much is finished and on the disk; raises where a file is damaged."""
        raise NotImplementedError

    def result(self, folder: Path) -> Any:
        """Returns what must have the same bits whether the job was killed or not."""
        raise NotImplementedError


class Training(Job):
    def finished(self, folder: Path) -> int:
        path = folder / loop.CHECKPOINT
        return int(loop.load_checkpoint(path)["step"]) if path.exists() else 0

    def result(self, folder: Path) -> Any:
        trainer = loop.load_checkpoint(folder / loop.CHECKPOINT)["trainer"]
        return {name: value.numpy().tobytes() for name, value in trainer["model"].items()}


class Cache(Job):
    def finished(self, folder: Path) -> int:
        found = list(folder.glob("*/done.json"))
        return int(json.loads(found[0].read_text())["images"]) if found else 0

    def result(self, folder: Path) -> Any:
        (place,) = (path.parent for path in folder.glob("*/done.json"))
        return {name: np.load(place / name).tobytes() for name in ("images.npy", "errors.npy")}


class Bench(Job):
    def finished(self, folder: Path) -> int:
        return len(self.cases(folder))

    def cases(self, folder: Path) -> list[Any]:
        """Returns the finished cases with all that was measured."""
        path = folder / "report.json"
        text = path.read_text() if path.exists() else ""
        return list(json.loads(text)["rows"]) if text else []  # the command opens an empty file first

    def result(self, folder: Path) -> Any:
        return len(self.cases(folder))


JOBS: dict[str, Job] = {"training": Training(TRAINING), "cache": Cache(CACHE), "bench": Bench(BENCH)}


def check(name: str, moments: int, seed: int = 0, folder: Path | None = None) -> dict[str, Any]:
    """Kills one job at a number of random moments; a job that ends before it is killed begins anew.

    Returns:
        How many kills there were, how many of them hit work that was under way, and how often the job ended.

    Raises:
        AssertionError: something was lost, or has other bits.
    """
    job, draw = JOBS[name], random.Random(seed)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        whole, number = Path(temporary, "whole"), 0
        whole.mkdir()
        began = time.monotonic()
        process = job.start(whole)
        began = time.monotonic()
        assert process.wait() == 0, (whole / "stderr").read_text()
        seconds, expected = time.monotonic() - began, job.result(whole)
        kills = mid = ended = 0
        while kills < moments or not ended:
            number += 1
            place = Path(temporary, str(number))
            place.mkdir()
            before, kept = 0, []
            while True:
                process = job.start(place)
                try:
                    # Once all kills are made, the job goes to its end.
                    process.wait(draw.uniform(0, seconds / 3) if kills < moments else None)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    kills += 1
                    now = job.finished(place)
                    assert now >= before, f"{name}: {before} were finished before the kill, {now} after it"
                    if isinstance(job, Bench):
                        cases = job.cases(place)
                        assert cases[: len(kept)] == kept, f"{name}: finished cases were measured again"
                        kept = cases
                    mid += now > before
                    before = now
                    continue
                assert process.returncode == 0, (place / "stderr").read_text()
                break
            ended += 1
            assert job.result(place) == expected, f"{name}: other bits than a run that nobody killed"
    return {
        "job": name,
        "kills": kills,
        "kills_after_progress": mid,
        "ended": ended,
        "seconds_whole": seconds,
    }


def main() -> int:
    """Runs all jobs, prints what was found, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moments", type=int, default=100, help="kills of each job (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", choices=tuple(JOBS), nargs="+", default=list(JOBS))
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = []
    for name in arguments.job:
        found.append(check(name, arguments.moments, arguments.seed))
        print(found[-1], flush=True)
    if arguments.json is not None:
        write_json(arguments.json, {"torch": torch.__version__, "moments": arguments.moments, "jobs": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
