"""The Projector's contract: what comes out and in which dtype, the same bits whatever the batch, chunk, threads or
mode, weights noticed however they change, gradients of every mode, and an error of one line for every bad input.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from generators import PaperGenerator, scale_up
from torch import Tensor, nn

from defgan_fast import Projection, Projector, gradients, reference
from defgan_fast.kernels import ops
from defgan_fast.starts import starting_points

kernels = pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")
# What holds on both paths is tested on both: the reference path is all there is without a compiler.
BACKENDS = [pytest.param("cpu", marks=kernels), "reference"]
K = 8


def make_generator(end: nn.Module | None = None) -> PaperGenerator:
    """The paper's geometry, small, with weights that make its images depend on the latent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        generator = PaperGenerator(latent_size=K, width=4)
        scale_up(generator)
    if end is not None:
        generator.convolutions[-1] = end
    return generator.eval()


def make_images(generator: nn.Module, count: int = 4) -> Tensor:
    """Images near the generator's range."""
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        images = generator(torch.randn(count, K, generator=rng) * 0.7)
        return (images + 0.05 * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def make_projector(generator: nn.Module | None = None, **arguments) -> Projector:
    arguments = {"steps": 5, "restarts": 3, "lr": 8.0, **arguments}
    return Projector(make_generator() if generator is None else generator, **arguments)


@pytest.fixture
def images() -> Tensor:
    return make_images(make_generator())


def same(a: Projection, b: Projection) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def one_line(caught: pytest.ExceptionInfo) -> str:
    text = str(caught.value)
    assert "\n" not in text, f"an error message is one line: {text}"
    return text


# --- what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_field_against_the_specification(images: Tensor, backend: str) -> None:
    """steps, staircase, starting points and selection, all from the constructor's arguments, against float64."""
    generator = make_generator()
    p = make_projector(
        generator,
        steps=7,
        restarts=4,
        lr=6.0,
        momentum=0.6,
        lr_decay=0.2,
        decay_at=0.5,
        seed=3,
        backend=backend,
    ).project(images)
    twin = copy.deepcopy(generator).double()
    latents, errors = reference.project(
        twin, images.double(), starting_points(3, 4, K).double(), [6.0] * 4 + [6.0 * 0.2] * 3, 0.6
    )
    _, before = reference.project(twin, images.double(), starting_points(3, 4, K).double(), [], 0.6)
    assert errors.median() < before.median() * 2 / 3, "the case does not move"
    torch.testing.assert_close(p.all_errors.double(), errors, rtol=1e-3, atol=1e-7)
    assert ((p.all_errors - errors).abs() / errors).median() < 1e-4
    best = errors.argmin(1)
    assert len(set(best.tolist())) > 1, (
        "images with one best restart for all cannot tell per image from per batch"
    )
    assert torch.equal(p.restarts, best)
    rows = torch.arange(len(images))
    torch.testing.assert_close(p.latents.double(), latents[rows, best], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(p.errors, p.all_errors.amin(1), rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(p.images.double(), twin(p.latents.double()), rtol=1e-5, atol=1e-5)
    # The reported error is that of the reported image.
    torch.testing.assert_close(
        p.errors, (p.images - images).square().flatten(1).mean(1), rtol=1e-4, atol=1e-8
    )


@pytest.mark.parametrize("wrong", ["no step", "one step fewer", "one restart for the batch", "other seed"])
def test_wrong_projectors_are_seen(images: Tensor, wrong: str) -> None:
    """The differences that the test above must notice are far above its tolerances."""
    generator = make_generator()
    z0 = starting_points(3, 4, K).double()
    twin, x = copy.deepcopy(generator).double(), images.double()
    rates = [6.0] * 4 + [1.2] * 3
    latents, errors = reference.project(twin, x, z0, rates, 0.6)
    if wrong == "one restart for the batch":
        assert not torch.equal(errors.argmin(1), errors.sum(0).argmin().expand(len(x)))
        return
    cut = {"no step": [], "one step fewer": rates[:-1], "other seed": rates}[wrong]
    z0 = starting_points(4, 4, K).double() if wrong == "other seed" else z0
    other_latents, other = reference.project(twin, x, z0, cut, 0.6)
    assert ((other - errors).abs() / errors).median() > 1e-3
    assert (other_latents - latents).abs().max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes_and_dtypes(images: Tensor, backend: str, dtype: torch.dtype) -> None:
    projector = make_projector(backend=backend)
    x = images.to(dtype)
    p = projector.project(x)
    assert isinstance(p, Projection)
    assert p.images.shape == x.shape
    assert p.images.dtype == dtype
    assert p.latents.shape == (4, K)
    assert p.errors.shape == p.restarts.shape == (4,)
    assert p.all_errors.shape == (4, 3)
    assert p.latents.dtype == p.errors.dtype == p.all_errors.dtype == torch.float32
    assert p.restarts.dtype == torch.int64
    assert all(t.device == x.device for t in p)
    assert torch.equal(projector(x), p.images)
    # The work is in float32 whatever the images' dtype: only the result is rounded.
    assert torch.equal(projector(x.float()).to(dtype), p.images)
    if dtype == torch.float32:
        assert projector.precision_for(x) == "float32"


@pytest.mark.parametrize("generator_dtype", [torch.float32, torch.float64])
def test_float64_runs_on_the_reference_path(images: Tensor, generator_dtype: torch.dtype) -> None:
    generator = make_generator().to(generator_dtype)
    projector = make_projector(generator)
    x = images.double()
    p = projector.project(x)
    assert p.images.dtype == torch.float64
    assert projector.precision_for(x) == "float64"
    assert projector.backend_for(x) == "reference"
    twin = copy.deepcopy(generator).double()
    z0 = starting_points(0, 3, K).double()
    _, errors = reference.project(twin, x, z0, [8.0] * 4 + [0.8], 0.7)
    tolerance = 1e-9 if generator_dtype == torch.float64 else 1e-4
    torch.testing.assert_close(p.all_errors.double(), errors, rtol=tolerance, atol=1e-12)


def test_float64_generator_takes_float32_images(images: Tensor) -> None:
    p = make_projector(make_generator().double()).project(images)
    assert p.images.dtype == torch.float32
    torch.testing.assert_close(p.images, make_projector()(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kernels
def test_sixteen_bit_generators(images: Tensor, dtype: torch.dtype) -> None:
    """Their weights are used as they are, the arithmetic stays in float32."""
    generator = make_generator().to(dtype)
    rounded = copy.deepcopy(generator).float()
    assert same(make_projector(generator).project(images), make_projector(rounded).project(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_channels(backend: str) -> None:
    torch.manual_seed(5)
    generator = nn.Sequential(
        nn.ConvTranspose2d(K, 9, 4), nn.ReLU(), nn.ConvTranspose2d(9, 3, 4, 2, 1), nn.Tanh()
    )
    scale_up(generator)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    p = make_projector(generator, backend=backend).project(x)
    assert p.images.shape == x.shape
    _, errors = reference.project(
        lambda z: generator(z[:, :, None, None]), x, starting_points(0, 3, K), [8.0] * 4 + [0.8], 0.7
    )
    torch.testing.assert_close(p.all_errors, errors, rtol=1e-3, atol=1e-6)


def test_repr_says_what_it_is() -> None:
    text = repr(make_projector(steps=17, seed=5))
    assert "steps=17" in text
    assert "seed=5" in text


def test_defaults_are_the_contracts() -> None:
    p = Projector(make_generator())
    got = (
        p.steps,
        p.restarts,
        p.lr,
        p.momentum,
        p.lr_decay,
        p.decay_at,
        p.seed,
        p.precision,
        p.gradient,
        p.backend,
    )
    assert got == (200, 10, 10.0, 0.7, 0.1, 0.8, 0, "auto", "straight_through", "auto")
    assert p.max_rows is None
    assert p.validate is None
    with pytest.raises(TypeError):
        Projector(make_generator(), 100)  # everything but the generator is a keyword


# --- bits ---------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_image_has_the_bits_that_it_has_in_a_batch(
    images: Tensor, precision: str, dtype: torch.dtype
) -> None:
    projector = make_projector(precision=precision)
    x = images.to(dtype)
    whole = projector.project(x)
    for i in range(len(x)):
        assert same(projector.project(x[i : i + 1]), Projection(*(field[i : i + 1] for field in whole)))
        assert torch.equal(projector(x[i : i + 1])[0], whole.images[i])
    assert same(projector.project(x.flip(0)), Projection(*(field.flip(0) for field in whole)))


@kernels
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_max_rows_or_threads(images: Tensor, precision: str) -> None:
    generator = make_generator()
    whole = make_projector(generator, precision=precision).project(images)
    before = torch.get_num_threads()
    try:
        for threads, max_rows in ((1, None), (2, None), (5, None), (2, 1), (1, 2), (2, 4), (1, 7), (2, 1000)):
            torch.set_num_threads(threads)
            projector = make_projector(generator, precision=precision, max_rows=max_rows)
            assert same(projector.project(images), whole), f"{threads} threads, max_rows={max_rows}"
            one = projector.project(images[3:])
            assert same(one, Projection(*(field[3:] for field in whole))), (
                f"{threads} threads, max_rows={max_rows}"
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("max_rows", [1, 2, 5])
def test_max_rows_on_the_reference_path(images: Tensor, max_rows: int) -> None:
    """The same values; bits are not promised there."""
    whole = make_projector(backend="reference").project(images)
    parts = make_projector(backend="reference", max_rows=max_rows).project(images)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_seed_same_bits(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend, seed=21)
    first = projector.project(images)
    torch.manual_seed(1234)
    assert same(projector.project(images), first)
    assert same(make_projector(backend=backend, seed=21).project(images), first)
    assert same(make_projector(backend=backend, seed=2).project(images, seed=21), first)
    assert same(projector.project(images, z0=starting_points(21, 3, K)), first)
    other = make_projector(backend=backend, seed=22).project(images)
    assert not torch.equal(other.all_errors, first.all_errors)
    assert same(projector.project(images, seed=22), other)
    assert same(projector.project(images), first), "the seed of one call must not stay"


@kernels
def test_more_restarts_keep_the_first_ones(images: Tensor) -> None:
    few, many = make_projector(restarts=2).project(images), make_projector(restarts=6).project(images)
    assert torch.equal(many.all_errors[:, :2], few.all_errors)
    assert (many.errors <= few.errors).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_seed_points_are_fresh_but_reproducible(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend, seed=None)
    torch.manual_seed(5)
    first, second = projector.project(images), projector.project(images)
    assert not torch.equal(first.all_errors, second.all_errors)
    torch.manual_seed(5)
    assert same(projector.project(images), first)
    assert same(projector.project(images, seed=4), make_projector(backend=backend, seed=4).project(images))
    twice = projector.project(images[:1].expand(2, -1, -1, -1))
    assert not torch.equal(twice.all_errors[0], twice.all_errors[1]), "each image must get points of its own"


def test_fresh_points_are_normal_over_root_k() -> None:
    """With a rate that moves nothing, the latents that come back are the starting points."""
    generator = make_generator()
    x = make_images(generator, 40)
    projector = make_projector(generator, seed=None, steps=1, restarts=1, lr=1e-12)
    z = torch.cat([projector.project(x).latents for _ in range(5)]).flatten() * math.sqrt(K)
    assert abs(z.mean()) < 4 / math.sqrt(len(z))
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / len(z))


@pytest.mark.parametrize("backend", BACKENDS)
def test_starting_points_shared_and_per_image(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend)
    z0 = torch.randn(2, K)  # its own R: 2, not 3
    shared = projector.project(images, z0=z0)
    assert shared.all_errors.shape == (4, 2)
    assert same(projector.project(images, z0=z0.expand(4, 2, K)), shared)
    own = torch.randn(4, 2, K)
    own[2] = z0
    got = projector.project(images, z0=own)
    torch.testing.assert_close(got.all_errors[2], shared.all_errors[2], rtol=1e-4, atol=1e-7)
    assert not torch.allclose(got.all_errors[1], shared.all_errors[1], rtol=1e-3)
    assert same(projector.project(images, z0=own.transpose(0, 1).contiguous().transpose(0, 1)), got)
    if backend == "cpu":
        for i in range(4):
            one = projector.project(images[i : i + 1], z0=own[i])
            assert same(one, Projection(*(field[i : i + 1] for field in got)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_images_does_not_matter(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend)
    expected = projector.project(images)
    wide = torch.zeros(4, 1, 28, 56)
    wide[..., ::2] = images
    for x in (
        images.to(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        wide[..., ::2],
        images.flip(0).flip(0),
    ):
        assert same(projector.project(x), expected)
    assert same(
        projector.project(images[:1].expand(4, -1, -1, -1)), projector.project(images[:1].repeat(4, 1, 1, 1))
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled", "none"])
def test_an_empty_batch(images: Tensor, backend: str, gradient: str) -> None:
    projector = make_projector(backend=backend, gradient=gradient)
    for x in (images[:0], images[:0].clone().requires_grad_()):
        p = projector.project(x)
        assert p.images.shape == (0, 1, 28, 28)
        assert p.latents.shape == (0, K)
        assert p.errors.shape == p.restarts.shape == (0,)
        assert p.all_errors.shape == (0, 3)
    if gradient != "none":
        p.images.sum().backward()
        assert x.grad.shape == x.shape
    make_projector(backend=backend, seed=None)(images[:0])
    projector.project(images[:0], z0=torch.randn(0, 3, K))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled", "none"])
def test_images_are_left_alone(images: Tensor, backend: str, gradient: str) -> None:
    projector = make_projector(backend=backend, gradient=gradient)
    for needs in (False, True):
        x = images.clone().requires_grad_(needs)
        version = x._version
        out = projector(x)
        assert torch.equal(x, images)
        assert x._version == version
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        with torch.no_grad():
            out.zero_()
        assert torch.equal(x, images)
    z0 = starting_points(0, 3, K)
    kept = z0.clone()
    p = projector.project(images, z0=z0)
    p.latents.zero_()
    assert torch.equal(z0, kept)
    assert torch.equal(projector.project(images).all_errors, p.all_errors)


PEAK = """
import resource, sys, torch

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

torch.set_num_threads(2)
torch.ones(64, 64) @ torch.ones(64, 64)
before = peak()
sys.path.insert(0, sys.argv[1])
from generators import PaperGenerator
from defgan_fast import Projector
projector = Projector(PaperGenerator(128, 64), steps=1, restarts=10, backend="cpu")
projector(torch.rand(200, 1, 28, 28))
print(peak() - before)
"""


@kernels
def test_peak_memory() -> None:
    """200 images x 10 restarts of the paper's generator: 300 MB above torch at most."""
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(Path(__file__).parent)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert float(out) < 300, f"{out} MB"


# --- modes of the caller ------------------------------------------------------------------------------------


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
from test_projector import make_generator, make_images, make_projector

generator = make_generator()
images, projector = make_images(generator), make_projector(generator, steps=500)
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
    """No thread is started for a projection, unless a fork or the environment leaves torch without its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    if limit is not None:
        environment["OMP_THREAD_LIMIT"] = limit
    out = subprocess.run(
        [sys.executable, "-c", POOL, str(Path(__file__).parent), str(threads)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    ).stdout
    assert (int(out) > 0) == (limit is not None), f"{out} new threads"


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


# --- the generator ------------------------------------------------------------------------------------------


def optimiser_step(generator: PaperGenerator, images: Tensor) -> None:
    optimiser = torch.optim.SGD(generator.parameters(), lr=0.5)
    generator(torch.ones(1, K)).sum().backward()
    optimiser.step()


def load_other_weights(generator: PaperGenerator, images: Tensor) -> None:
    generator.load_state_dict({key: value * 1.1 for key, value in generator.state_dict().items()})


def load_assigned(generator: PaperGenerator, images: Tensor) -> None:
    state = {key: value * 1.1 for key, value in generator.state_dict().items()}
    generator.load_state_dict(state, assign=True)


def write_data(generator: PaperGenerator, images: Tensor) -> None:
    generator.convolutions[4].weight.data[0, 0, 2, 2] += 0.5


def swap_data(generator: PaperGenerator, images: Tensor) -> None:
    generator.linear.weight.data = generator.linear.weight.data * 1.1


def write_numpy(generator: PaperGenerator, images: Tensor) -> None:
    generator.linear.bias.detach().numpy()[3] += 0.5


def write_in_inference_mode(generator: PaperGenerator, images: Tensor) -> None:
    with torch.inference_mode():
        generator.linear.bias.add_(0.1)


def replace_layer(generator: PaperGenerator, images: Tensor) -> None:
    generator.linear = nn.Linear(K, generator.linear.out_features)


def smallest_change(generator: PaperGenerator, images: Tensor) -> None:
    """One bit, of the largest weight of the last layer."""
    weight = generator.convolutions[4].weight.data.flatten()
    i = weight.abs().argmax()
    weight[i] = torch.nextafter(weight[i], torch.tensor(9.0))


CHANGES = [
    optimiser_step,
    load_other_weights,
    load_assigned,
    write_data,
    swap_data,
    write_numpy,
    write_in_inference_mode,
    replace_layer,
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(images: Tensor, backend: str, change: Callable) -> None:
    generator = make_generator()
    projector = make_projector(generator, backend=backend)
    original = copy.deepcopy(generator)
    before = projector.project(images)
    change(generator, images)
    after = projector.project(images)
    assert not torch.equal(before.images, after.images)
    assert same(after, make_projector(copy.deepcopy(generator), backend=backend).project(images))
    generator.load_state_dict(original.state_dict())
    assert same(projector.project(images), before)


@kernels
def test_a_change_anywhere_is_noticed() -> None:
    """Also far into a large parameter, which several threads share the reading of."""
    generator = nn.Sequential(
        nn.Linear(K, 25_000), nn.LeakyReLU(0.2), nn.Linear(25_000, 64), nn.Unflatten(1, (1, 8, 8))
    )
    generator.latent_size = K
    projector = Projector(generator, steps=1, restarts=1, backend="cpu")
    images = torch.rand(1, 1, 8, 8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            weight = generator[2].weight.data.view(-1)
            for place in (0, weight.numel() // 2, weight.numel() - 1):
                errors = projector.project(images).errors
                weight[place] += 1e3
                changed = projector.project(images).errors
                weight[place] -= 1e3
                assert not torch.equal(changed, errors)
    finally:
        torch.set_num_threads(before)


@kernels
def test_the_smallest_change_is_noticed(images: Tensor) -> None:
    """Of one bit of one weight: seen in the latents of many steps, and exactly as by a projector built afterwards."""
    generator = make_generator()
    projector = make_projector(generator, steps=20)
    before = projector.project(images)
    smallest_change(generator, images)
    after = projector.project(images)
    assert not torch.equal(before.latents, after.latents)
    assert same(after, make_projector(copy.deepcopy(generator), steps=20).project(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_batch_norm_are_weights_too(backend: str) -> None:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(K, 12), nn.BatchNorm1d(12), nn.Unflatten(1, (1, 3, 4)))
    projector = make_projector(generator, backend=backend)
    x = torch.rand(2, 1, 3, 4)
    before = projector(x)
    generator[1].running_mean.data[2] += 1
    assert not torch.equal(projector(x), before)


class Recording(nn.Module):
    """Says in which mode it is run; nothing can lower it."""

    latent_size = K

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.seen = nn.Linear(K, 12), nn.BatchNorm1d(12), set()

    def forward(self, z: Tensor) -> Tensor:
        self.seen.add((self.training, self.norm.training))
        return nn.functional.softplus(self.norm(self.linear(z))).view(-1, 1, 3, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_generator_stays_in_eval_mode(backend: str) -> None:
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(K, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Unflatten(1, (1, 3, 4))
    ).train()
    projector = make_projector(generator, backend=backend)
    assert not any(m.training for m in generator.modules())
    x = torch.rand(3, 1, 3, 4)
    state = copy.deepcopy(generator.state_dict())
    expected = projector(x)

    def whole_model(model: nn.Module) -> None:
        model.train()

    def generator_itself(model: nn.Module) -> None:
        generator.train()

    def batch_norms(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.train()

    def dropouts(model: nn.Module) -> None:
        generator[3].train()

    model = nn.Sequential(projector, nn.Flatten(), nn.Linear(12, 2))
    for disturb in (whole_model, generator_itself, batch_norms, dropouts):
        disturb(model)
        assert torch.equal(projector(x), expected), disturb.__name__
        assert not any(m.training for m in generator.modules()), disturb.__name__
        assert all(torch.equal(state[key], value) for key, value in generator.state_dict().items())
    model.train()
    assert projector.training, "the projector itself obeys"
    assert not generator.training
    assert projector.train() is projector
    assert not projector.eval().training


def test_a_generator_without_a_plan_runs_in_eval_mode() -> None:
    generator = Recording()
    projector = make_projector(generator, backend="reference")
    generator.seen.clear()
    state = copy.deepcopy(generator.state_dict())
    projector.train()
    generator.norm.train()
    projector(torch.rand(2, 1, 3, 4))
    assert generator.seen == {(False, False)}
    assert all(torch.equal(state[key], value) for key, value in generator.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled"])
def test_parameters_and_their_gradients_are_untouched(images: Tensor, backend: str, gradient: str) -> None:
    generator = make_generator()
    projector = make_projector(generator, backend=backend, gradient=gradient)
    state = copy.deepcopy(generator.state_dict())
    for i, parameter in enumerate(generator.parameters()):
        parameter.grad = torch.full_like(parameter, 7.0) if i % 2 else None
    x = images.clone().requires_grad_()
    projector(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    for i, parameter in enumerate(generator.parameters()):
        assert (parameter.grad == 7).all() if i % 2 else parameter.grad is None
        assert parameter.requires_grad
    assert all(torch.equal(state[key], value) for key, value in generator.state_dict().items())


def test_the_generator_is_held_and_not_copied() -> None:
    generator = make_generator()
    projector = make_projector(generator)
    assert projector.generator is generator
    assert [id(p) for p in projector.parameters()] == [id(p) for p in generator.parameters()]
    assert next(projector.parameters()).device.type == "cpu"


# --- the module as a module ---------------------------------------------------------------------------------


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


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_straight_through_is_the_identity(images: Tensor, backend: str, dtype: torch.dtype) -> None:
    projector = make_projector(backend=backend)
    x = images.to(dtype).detach().clone().requires_grad_()
    weight = torch.randn(x.shape).to(dtype)
    out = projector(x)
    assert torch.equal(out, projector(x.detach())), "the gradient must not change the reconstruction's bits"
    (out * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    # Through a graph, and twice: BPDA composes with whatever comes before and after.
    x.grad = None
    inner = x * 0.5
    projector(inner + 0.25).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_straight_through_differentiates_twice(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend)
    x = images.clone().requires_grad_()
    out = projector(x)
    (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 3 * out.detach().square())
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * out.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["straight_through", "unrolled", "none"])
def test_only_the_image_carries_the_gradient(images: Tensor, backend: str, gradient: str) -> None:
    projector = make_projector(backend=backend, gradient=gradient)
    x = images.clone().requires_grad_()
    p = projector.project(x)
    assert p.images.requires_grad
    assert p.images.grad_fn is not None
    for field in (p.latents, p.errors, p.restarts, p.all_errors):
        assert not field.requires_grad
    assert same(Projection(*(field.detach() for field in p)), projector.project(images))
    for quiet in (
        projector.project(images),
        projector.project(images, z0=torch.randn(3, K, requires_grad=True)),
    ):
        assert not any(field.requires_grad for field in quiet)
    with torch.no_grad():
        assert not projector(x).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_raises_on_backward(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend, gradient="none")
    x = images.clone().requires_grad_()
    out = nn.Sequential(projector, nn.Flatten())(x)
    with pytest.raises(RuntimeError, match=r"none.*straight_through.*unrolled") as caught:
        out.sum().backward()
    one_line(caught)
    assert x.grad is None
    assert torch.equal(projector(images), make_projector(backend=backend)(images))


class Smooth(nn.Module):
    """Small, float64 and without kinks; `hidden` keeps torch.fx from tracing it."""

    latent_size = 3

    def __init__(self, lowerable: bool) -> None:
        super().__init__()
        self.first, self.second, self.lowerable = nn.Linear(3, 6), nn.ConvTranspose2d(6, 1, 2), lowerable
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.8)

    def forward(self, z: Tensor) -> Tensor:
        h = torch.tanh(self.first(z)).view(-1, 6, 1, 1)
        if not self.lowerable and not torch.isfinite(h).all():
            return h
        return torch.sigmoid(self.second(h))


@pytest.mark.filterwarnings("ignore:running on the reference path")
@pytest.mark.parametrize("lowerable", [True, False])
@pytest.mark.parametrize("restarts", [1, 3])
def test_unrolled_passes_gradcheck(lowerable: bool, restarts: int) -> None:
    """Through 3 steps, the last of them at the reduced rate, with the starting points of several restarts."""
    torch.manual_seed(restarts)
    generator = Smooth(lowerable).double()
    projector = make_projector(
        generator, steps=3, restarts=restarts, lr=2.0, decay_at=0.5, gradient="unrolled"
    )
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(projector, (x,), eps=1e-6, atol=1e-8)
    # It is not the identity, nor nothing, and each image's gradient is its own.
    (gradient,) = torch.autograd.grad(projector(x)[0].sum(), x)
    assert gradient[0].abs().max() > 1e-3
    assert not torch.allclose(gradient[0], torch.ones_like(gradient[0]), atol=1e-2)
    assert (gradient[1] == 0).all()


@kernels
def test_unrolled_op_passes_gradcheck() -> None:
    """The op that the kernel path uses, in float64 through a plan's text."""
    from defgan_fast import lowering

    torch.manual_seed(1)
    generator = Smooth(True).double()
    plan = lowering.lower(generator, 3)
    parameters = [p.detach() for p in plan.tensors(generator)]
    z0, rates = torch.randn(2, 3, dtype=torch.float64), [2.0, 1.5, 0.2]

    def reconstruct(x: Tensor) -> Tensor:
        latents, _ = reference.project(generator, x, z0[:, None], rates, 0.7)
        with torch.no_grad():
            reconstruction = generator(latents[:, 0])
        return gradients.unrolled(x, reconstruction, z0, parameters, plan.text, rates, 0.7)

    x = torch.rand(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reconstruct, (x,), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unrolled_in_float32_is_the_one_of_float64(backend: str) -> None:
    torch.manual_seed(4)
    generator = Smooth(True)
    x = torch.rand(5, 1, 2, 2)
    weight = torch.randn(5, 1, 2, 2)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(generator).to(dtype)
        projector = make_projector(twin, steps=6, lr=2.0, gradient="unrolled", backend=backend, max_rows=2)
        y = x.to(dtype, copy=True).requires_grad_()
        (projector(y) * weight.to(dtype)).sum().backward()
        gradients.append(y.grad.double())
    assert gradients[1].abs().max() > 0.01
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unrolled_follows_the_chosen_restart_of_each_image(images: Tensor, backend: str) -> None:
    """Against a projector that is given each image's best starting point alone; per image and for [B, R, k]."""
    projector = make_projector(backend=backend, gradient="unrolled")
    for z0 in (starting_points(0, 3, K), torch.randn(4, 3, K)):
        x = images.clone().requires_grad_()
        p = projector.project(x, z0=z0)
        assert len(set(p.restarts.tolist())) > 1, "the case cannot tell restarts apart"
        (got,) = torch.autograd.grad(p.images.square().sum(), x)
        for i in range(4):
            one = images[i : i + 1].clone().requires_grad_()
            start = z0[p.restarts[i]] if z0.dim() == 2 else z0[i, p.restarts[i]]
            (expected,) = torch.autograd.grad(
                projector.project(one, z0=start[None]).images.square().sum(), one
            )
            torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-3, atol=1e-5)
            assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("gradient", ["straight_through", "unrolled"])
def test_a_projector_built_in_inference_mode_differentiates(images: Tensor, gradient: str) -> None:
    with torch.inference_mode():
        projector = make_projector(gradient=gradient)
    x = images.clone().requires_grad_()
    projector(x).sum().backward()
    assert x.grad.abs().sum() > 0


# --- bad input ----------------------------------------------------------------------------------------------


def grey(*shape: int, **options) -> Tensor:
    return torch.full(shape, 0.5, **options)


def with_value(value: float) -> Tensor:
    x = grey(2, 1, 28, 28)
    x[1, 0, 3, 4] = value
    return x


BAD_IMAGES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "rank 2": (lambda: grey(28, 28), ValueError, r"images must have shape \[B, .*\], got \[28, 28\]"),
    "rank 3": (lambda: grey(1, 28, 28), ValueError, r"images must have shape \[B, .*\], got \[1, 28, 28\]"),
    "rank 5": (lambda: grey(1, 1, 1, 28, 28), ValueError, r"images must have shape \[B, .*\], got \[1, 1, 1, 28, 28\]"),
    "channels": (lambda: grey(2, 3, 28, 28), ValueError, r"(?=.*images)(?=.*[\[ ]1, 28, 28\]).*[\[ ]3, 28, 28\]"),
    "height": (lambda: grey(2, 1, 27, 28), ValueError, r"(?=.*images)(?=.*[\[ ]1, 28, 28\]).*[\[ ]1, 27, 28\]"),
    "width": (lambda: grey(2, 1, 28, 32), ValueError, r"(?=.*images)(?=.*[\[ ]1, 28, 28\]).*[\[ ]1, 28, 32\]"),
    "uint8": (
        lambda: torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
        TypeError,
        r"^images must have dtype float32, bfloat16 or float16, got uint8$",
    ),
    "int64": (
        lambda: torch.zeros(2, 1, 28, 28, dtype=torch.int64),
        TypeError,
        r"^images must have dtype float32, bfloat16 or float16, got int64$",
    ),
    "complex": (lambda: torch.zeros(2, 1, 28, 28, dtype=torch.complex64), TypeError, r"images must .*got complex64"),
    "numpy": (lambda: np.zeros((2, 1, 28, 28), dtype=np.float32), TypeError, r"images must be a .*Tensor, got ndarray"),
    "none": (lambda: None, TypeError, r"images must be a .*Tensor, got NoneType"),
    "device": (lambda: grey(2, 1, 28, 28, device="meta"), ValueError, r"images must be on .*\(cpu\), got meta"),
    "nan": (lambda: with_value(math.nan), ValueError, r"^images must be finite"),
    "inf": (lambda: with_value(math.inf), ValueError, r"^images must be finite"),
    "-inf": (lambda: with_value(-math.inf), ValueError, r"^images must be finite"),
    "bytes": (
        lambda: with_value(255.0),
        ValueError,
        r"^images must lie in the generator's range \[0, 1\], got \[0.5, 255\]$",
    ),
    "negative": (lambda: with_value(-1.0), ValueError, r"generator's range \[0, 1\], got \[-1, 0.5\]$"),
    "beyond the slack": (lambda: with_value(1.011), ValueError, r"range \[0, 1\], got \[0.5, 1.011\]"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BAD_IMAGES))
def test_bad_images(backend: str, name: str) -> None:
    build, error, message = BAD_IMAGES[name]
    projector = make_projector(backend=backend)
    for call in (projector, projector.project):
        with pytest.raises(error, match=message) as caught:
            call(build())
        one_line(caught)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_range_of_sigmoid_and_tanh(backend: str, dtype: torch.dtype) -> None:
    for end, low, high in ((nn.Sigmoid(), 0, 1), (nn.Tanh(), -1, 1)):
        projector = make_projector(make_generator(end), steps=1, restarts=1, backend=backend)
        x = torch.linspace(low, high, 784, dtype=dtype).view(1, 1, 28, 28)
        slack = 0.01 * (high - low) if dtype != torch.bfloat16 else 0.0078
        for fine in (
            x,
            x * (1 + (slack / 2 if low == 0 else slack)),
            x.clamp(low + slack),
            x - slack * (low == 0),
        ):
            projector(fine)
        with pytest.raises(ValueError, match=rf"range \[{low}, 1\], got \[0, 255\]") as caught:
            projector(torch.linspace(0, 255, 784, dtype=dtype).view(1, 1, 28, 28))
        one_line(caught)
    with pytest.raises(ValueError, match=r"images must lie in the generator's range \[0, 1\], got \[-1, 1\]"):
        make_projector(backend=backend)(torch.linspace(-1, 1, 784).view(1, 1, 28, 28).to(dtype))
    # Any pixel may come where the last layer bounds nothing.
    make_projector(make_generator(nn.Identity()), steps=1, restarts=1, lr=1e-6, backend=backend)(
        torch.full((1, 1, 28, 28), 255.0, dtype=dtype)
    )


class EndsInFunction(nn.Module):
    """The range is that of the last thing done: a function here, although a Tanh is registered last."""

    latent_size = K

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.last, self.between, self.end = nn.Linear(K, 6), nn.Linear(6, 12), nn.Tanh(), end

    def forward(self, z: Tensor) -> Tensor:
        return self.end(self.last(self.between(self.linear(z)))).view(-1, 1, 3, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_range_is_that_of_the_last_layer_run(backend: str, dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 3, 4), 3.0, dtype=dtype)
    make_projector(EndsInFunction(lambda h: h), steps=1, restarts=1, backend=backend)(x)
    with pytest.raises(ValueError, match=r"range \[0, 1\], got \[3, 3\]"):
        make_projector(EndsInFunction(torch.sigmoid), steps=1, restarts=1, backend=backend)(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unvalidated_rows_show_it_and_leave_others_alone(images: Tensor, backend: str, value: float) -> None:
    for max_rows in (None, 1, 4):
        projector = make_projector(backend=backend, validate=False, max_rows=max_rows)
        expected = projector.project(images)
        x = images.clone()
        x[1, 0, 14, 14] = value
        p = projector.project(x)
        assert not torch.isfinite(p.all_errors[1]).any()
        assert not torch.isfinite(p.errors[1])
        others = [0, 2, 3]
        if backend == "cpu":
            assert same(Projection(*(f[others] for f in p)), Projection(*(f[others] for f in expected)))
        else:
            torch.testing.assert_close(p.images[others], expected.images[others], rtol=1e-3, atol=1e-4)
        if backend == "cpu":  # nothing of it stays in working memory either
            assert same(projector.project(images), expected)
    with pytest.raises(ValueError, match="finite"):
        make_projector(backend=backend, validate=True)(x)
    make_projector(backend=backend, validate=False)(images * 255)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38, -3e38])
def test_a_restart_that_overflows_never_wins(images: Tensor, backend: str, bad: float) -> None:
    for end in (nn.Sigmoid(), nn.Identity()):
        projector = make_projector(make_generator(end), backend=backend, validate=False, lr=1e-3)
        z0 = starting_points(0, 3, K)
        finite = projector.project(images, z0=z0[1:])
        z0[0] = bad
        p = projector.project(images, z0=z0)
        assert not torch.isfinite(p.all_errors[:, 0]).any()
        assert (p.restarts != 0).all()
        torch.testing.assert_close(p.restarts, finite.restarts + 1)
        torch.testing.assert_close(p.images, finite.images, rtol=1e-4, atol=1e-4)
        assert torch.isfinite(p.errors).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_that_overflows_shows_in_the_errors(images: Tensor, backend: str) -> None:
    """Every restart of every image runs away: the errors say so instead of a plausible number."""
    projector = make_projector(make_generator(nn.Identity()), backend=backend, lr=1e30, steps=10)
    p = projector.project(images)
    assert not torch.isfinite(p.all_errors).any()
    assert not torch.isfinite(p.errors).any()
    assert p.images.shape == images.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_starting_points(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend)
    bad = {
        r"z0 must have shape \[R, 8\] or \[4, R, 8\].*got \[3, 7\]": torch.randn(3, 7),
        r"z0 must have shape .*got \[8\]": torch.randn(8),
        r"z0 must have shape .*got \[3, 2, 8\]": torch.randn(3, 2, 8),
        r"z0 must have shape .*got \[0, 8\]": torch.randn(0, 8),
        r"z0 must have shape .*got \[1, 4, 2, 8\]": torch.randn(1, 4, 2, 8),
        r"z0 must be finite": torch.full((2, 8), math.nan),
        r"z0 must be on the images' device \(cpu\), got meta": torch.empty(2, 8, device="meta"),
    }
    for message, z0 in bad.items():
        with pytest.raises(ValueError, match=message) as caught:
            projector.project(images, z0=z0)
        one_line(caught)
    for message, z0 in {
        r"z0 must have .*dtype.*got int64": torch.ones(2, 8, dtype=torch.int64),
        r"z0 must be a .*Tensor, got list": [[0.0] * 8],
    }.items():
        with pytest.raises(TypeError, match=message) as caught:
            projector.project(images, z0=z0)
        one_line(caught)


@pytest.mark.parametrize("bad", [1.5, "a", True])
def test_bad_seed_of_a_call(images: Tensor, bad: object) -> None:
    with pytest.raises(TypeError, match=r"seed must be an int.*got") as caught:
        make_projector().project(images, seed=bad)
    one_line(caught)


@pytest.mark.parametrize("seed", [-1, 2**40, 2**63, 2**64 - 1])
def test_any_int_is_a_seed(images: Tensor, seed: int) -> None:
    assert same(make_projector(seed=seed).project(images), make_projector().project(images, seed=seed))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": -3}, ValueError, "steps must be at least 1, got -3"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float"),
        ({"steps": True}, TypeError, "steps must be an int, got bool"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1, got 0"),
        ({"restarts": 1.5}, TypeError, "restarts must be an int, got float"),
        ({"max_rows": 0}, ValueError, "max_rows must be at least 1, got 0"),
        ({"max_rows": 2.5}, TypeError, "max_rows must be an int, got float"),
        ({"lr": 0}, ValueError, "lr must be .*, got 0"),
        ({"lr": -1.0}, ValueError, "lr must be .*, got -1"),
        ({"lr": math.nan}, ValueError, "lr must be .*, got nan"),
        ({"lr": "10"}, TypeError, "lr must be a number, got str"),
        ({"momentum": 1.0}, ValueError, "momentum must be .*, got 1"),
        ({"momentum": -0.1}, ValueError, r"momentum must be .*, got -0\.1"),
        ({"lr_decay": -1}, ValueError, "lr_decay must be .*, got -1"),
        ({"decay_at": 1.5}, ValueError, r"decay_at must be .*, got 1\.5"),
        ({"seed": 0.5}, TypeError, "seed must be an int or None, got float"),
        ({"precision": "float64"}, ValueError, "precision must be one of .*'auto'.*'bfloat16'.*, got 'float64'"),
        ({"gradient": "bpda"}, ValueError, "gradient must be one of .*'straight_through'.*, got 'bpda'"),
        ({"gradient": None}, ValueError, "gradient must be one of .*, got None"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*'auto'.*'reference'.*, got 'gpu'"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Projector(make_generator(), **arguments)
    one_line(caught)


def test_generator_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"generator must be a .*Module, got function") as caught:
        Projector(lambda z: z)
    one_line(caught)


class Gives(nn.Module):
    """Returns what it is told to."""

    latent_size = K

    def __init__(self, give: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.give = nn.Linear(K, 12), give

    def forward(self, z: Tensor) -> object:
        return self.give(self.linear(z))


@pytest.mark.filterwarnings("ignore:running on the reference path")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("give", "came"),
    [
        (lambda h: (h.view(-1, 1, 3, 4), h), "tuple"),
        (lambda h: {"image": h}, "dict"),
        (lambda h: h.view(-1, 1, 2, 6), r"\[.*1, 2, 6\]"),
        (lambda h: h.view(-1, 12), r"\[.*12\]"),
        (lambda h: h.view(-1, 3, 4), r"\[.*3, 4\]"),
        (lambda h: h.mean(0).view(1, 1, 3, 4), r"."),
    ],
    ids=["tuple", "dict", "other shape", "flat", "three dimensions", "rows lost"],
)
def test_generators_that_return_something_else_are_named(backend: str, give: Callable, came: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"(?=.*Gives).*{came}") as caught:
        make_projector(Gives(give), backend=backend)(grey(2, 1, 3, 4))
    one_line(caught)


class NoLayers(nn.Module):
    """Says nothing of its latent; takes any number of them above two."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z[:, :2].repeat(1, 6).view(-1, 1, 3, 4) + z.mean())


class Matrix(NoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 12))

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z @ self.weight).view(-1, 1, 3, 4)


@pytest.mark.filterwarnings("ignore:running on the reference path")
@pytest.mark.parametrize("generator", [NoLayers(), Matrix()], ids=["no layers", "a matrix of its own"])
def test_latent_size_unknown(generator: nn.Module) -> None:
    projector = make_projector(generator)
    x = grey(2, 1, 3, 4)
    with pytest.raises(ValueError, match=rf"{type(generator).__name__}.*latent.*z0.*latent_size") as caught:
        projector(x)
    one_line(caught)
    p = projector.project(x, z0=torch.randn(4, 5))  # read from z0
    assert p.latents.shape == (2, 5)
    assert p.all_errors.shape == (2, 4)
    generator = copy.deepcopy(generator)
    generator.latent_size = 5
    assert make_projector(generator).project(x).latents.shape == (2, 5)


def test_warnings_of_a_projection_are_none(images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projector = make_projector()
        x = images.clone().requires_grad_()
        projector(x).sum().backward()
        make_projector(backend="reference", gradient="unrolled")(x).sum().backward()
