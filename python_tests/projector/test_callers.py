"""A projector under the modes that callers set: inference mode, autocast, threads, forked workers, default dtypes."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from projectors import BACKENDS, kernels, make_generator, make_images, make_projector, one_line, same
from torch import Tensor

from defgan_fast import Projector
from defgan_fast.kernels import ops


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_and_inference_mode(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend)
    expected = projector.project(images)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same(projector.project(images), expected)
            assert same(projector.project(images.clone()), expected)
            assert same(projector.project(images.clone().requires_grad_()), expected)
    generator = make_generator()
    with torch.inference_mode():
        inside = images.clone()
        built = make_projector(generator, backend=backend)
    assert same(projector.project(inside), expected)
    assert same(built.project(images), expected)


@kernels
def test_autocast_chooses_the_precision(images: Tensor) -> None:
    generator = make_generator()
    projector = make_projector(generator)
    narrow = make_projector(generator, precision="bfloat16").project(images)
    wide = projector.project(images)
    assert not torch.equal(narrow.latents, wide.latents)
    torch.testing.assert_close(narrow.errors, wide.errors, rtol=0.1, atol=1e-3)
    assert narrow.images.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projector.precision_for(images) == "bfloat16"
        assert same(projector.project(images), narrow)
        assert same(make_projector(generator, precision="float32").project(images), wide)
        with torch.autocast("cpu", enabled=False):
            assert same(projector.project(images), wide)
    assert same(projector.project(images), wide)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_on_the_cpu_is_refused_and_bfloat16_named(images: Tensor, backend: str) -> None:
    with pytest.raises(ValueError, match=r"precision.*float16.*bfloat16") as caught:
        make_projector(backend=backend, precision="float16")(images)
    one_line(caught)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="bfloat16") as caught:
        make_projector(backend=backend)(images)
    one_line(caught)


def test_reference_runs_layers_in_bfloat16(images: Tensor) -> None:
    wide = make_projector(backend="reference").project(images)
    narrow = make_projector(backend="reference", precision="bfloat16").project(images)
    assert narrow.latents.dtype == torch.float32
    assert not torch.equal(narrow.latents, wide.latents)
    torch.testing.assert_close(narrow.errors, wide.errors, rtol=0.1, atol=1e-3)


def test_threads_of_the_caller(images: Tensor) -> None:
    """Four threads share one projector; all get the bits that one alone gets."""
    generator = make_generator()
    x = make_images(generator, 12)
    projector = make_projector(generator)
    expected = [projector.project(x[i : i + 1]) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: projector.project(x[i % 12 : i % 12 + 1]), range(48)))
    for i, p in enumerate(got):
        assert (
            same(p, expected[i % 12]) if ops.kernels_available else torch.allclose(p[0], expected[i % 12][0])
        )


class Projected(torch.utils.data.Dataset):
    """Projects inside the worker."""

    def __init__(self, projector: Projector, images: Tensor) -> None:
        self.projector, self.images = projector, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.projector(self.images[i : i + 1])[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inside_forked_workers(images: Tensor, backend: str) -> None:
    """The parent has projected before the fork, on several threads: nothing of that may hang the children."""
    projector = make_projector(backend=backend, max_rows=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if backend == "cpu" else 1)
        expected = projector(images)
        loader = torch.utils.data.DataLoader(
            Projected(projector, images),
            batch_size=2,
            num_workers=2,
            multiprocessing_context="fork",
            timeout=60,
        )
        got = torch.cat(list(loader))
    finally:
        torch.set_num_threads(before)
    if backend == "cpu":
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


POOL = """
import os, sys, threading
import torch
torch.set_num_threads(int(sys.argv[2]))
sys.path.insert(0, sys.argv[1])
from projectors import make_generator, make_images, make_projector

generator = make_generator()
# Threads beyond the machine's processors make each step slow, and the watcher has time enough all the same.
steps = 500 if torch.get_num_threads() <= os.cpu_count() else 50
images, projector = make_images(generator), make_projector(generator, steps=steps)
expected = projector(images)  # torch's pool exists from here on
seen, done = set(), threading.Event()

def watch():
    while not done.is_set():
        seen.update(os.listdir("/proc/self/task"))

watcher = threading.Thread(target=watch)
watcher.start()
before = set(os.listdir("/proc/self/task"))
for _ in range(3):
    assert torch.equal(projector(images), expected)
done.set()
watcher.join()
print(len(seen - before))
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:  # on threads of its own
    os._exit(not (torch.get_num_threads() > 1 and torch.equal(projector(images), expected)))
"""


@kernels
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs the list of a process's threads")
@pytest.mark.parametrize(("threads", "limit"), [(2, None), (4, None), (2, "1")])
def test_threads_are_those_of_torch(threads: int, limit: str | None) -> None:
    """No thread is started for a projection, unless a fork or the environment leaves torch without its own.

    Nor does torch lend its own where it has more of them than there are cores.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    if limit is not None:
        environment["OMP_THREAD_LIMIT"] = limit
    out = subprocess.run(
        [sys.executable, "-c", POOL, str(Path(__file__).parents[1]), str(threads)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    ).stdout
    crowded = threads > len(os.sched_getaffinity(0)) > 1
    assert (int(out) > 0) == (limit is not None or crowded), f"{out} new threads"


FORKED_FIRST = """
import os, sys
import torch
torch.set_num_threads(2)
torch.ones(400_000).add_(1)  # the parent has a pool; the child will not, and its torch must not use one either
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
from torch import nn
from defgan_fast import Projector
assert torch.get_num_threads() == 2
generator = nn.Sequential(nn.Linear(4, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
Projector(generator, steps=2, restarts=2)(torch.full((2, 1, 8, 8), 0.5))
os._exit(0)
"""


@kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_imported_after_a_fork() -> None:
    subprocess.run([sys.executable, "-c", FORKED_FIRST], check=True, timeout=60)


@pytest.mark.parametrize("backend", BACKENDS)
def test_default_dtype_and_device_do_not_matter(images: Tensor, backend: str) -> None:
    """The images and the generator say where and in what the work is done, not torch's defaults."""
    generator = make_generator()
    fixed, fresh = (
        make_projector(generator, backend=backend),
        make_projector(generator, backend=backend, seed=None),
    )
    expected = fixed.project(images)
    try:
        torch.set_default_dtype(torch.float64)
        assert same(fixed.project(images), expected)
        assert same(fixed.project(images, seed=0), expected)
        assert same(make_projector(generator, backend=backend).project(images), expected)
        assert fresh.project(images).latents.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert same(fixed.project(images), expected)
        assert same(make_projector(generator, backend=backend).project(images), expected)
        assert fresh(images).device.type == "cpu"
