"""Signals are heard during calls of any length, and what their handlers raise ends the call and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from projectors import kernels

HERE = Path(__file__).parent
ALONE = "project row in_inference_mode in_bfloat16 before_a_gradient keyboard a_handler_that_returns in_another_thread"
OTHERS = "decode nearest reference unrolled in_workers compiled_and_exported"


@kernels
@pytest.mark.parametrize(
    ("threads", "cases"),
    [
        pytest.param(1, ALONE, marks=pytest.mark.slow),
        (2, ALONE),
        pytest.param(2, OTHERS, marks=pytest.mark.slow),
    ],
    ids=["1", "2", "others"],
)
def test_a_signal_is_heard(threads: int, cases: str) -> None:
    """A call that does not hear its signal would go on for minutes: the process is ended, and the case named."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    process = subprocess.Popen(
        [sys.executable, HERE / "interrupted.py", HERE.parent, str(threads), *cases.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and the workers that it started
        out, err = process.communicate()
    assert out.split() == cases.split(), err[-3000:]


ONE_CORE = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from projectors import make_generator, make_images, make_projector
torch.set_num_threads(1)
generator = make_generator()
images, projector = make_images(generator), make_projector(generator, steps=50)
expected = projector(images)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(32)
before = len(os.listdir("/proc/self/task"))
assert torch.equal(projector(images), expected)
print(len(os.listdir("/proc/self/task")) - before)
"""


@kernels
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs affinities")
def test_no_more_threads_than_cores() -> None:
    """torch is told to use 32 threads where the process may use one core: its pool must not even be made."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    out = subprocess.run(
        [sys.executable, "-c", ONE_CORE, str(HERE.parent)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    ).stdout
    assert out.split() == ["0"]
