"""The GPU's half of the op: how work is planned (any machine), how the op is built (a CUDA build), what it computes
(a GPU).

`make cuda-build` runs this against a CUDA build of torch, with DEFGAN_EXPECT_CUDA set so that a build without
kernels fails instead of being skipped. The kernels' own arithmetic is tested beside this file, without a GPU too.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from typing import Any

import pytest
import torch

import defgan_fast
from defgan_fast import Projector, reference
from defgan_fast.benchmark import gpu
from defgan_fast.benchmark import run as benchmark
from defgan_fast.benchmark.generators import moving_generator
from defgan_fast.kernels import extension, ops
from defgan_fast.plan import lower

needs_kernels = pytest.mark.skipif(not ops.kernels_available, reason="the extension is not built")
needs_cuda_build = pytest.mark.skipif(
    not ops.cuda_kernels_built and "DEFGAN_EXPECT_CUDA" not in os.environ,
    reason="a build without CUDA kernels",
)
needs_gpu = pytest.mark.skipif(ops.missing_cuda() is not None, reason=f"no GPU to use: {ops.missing_cuda()}")

H100 = {"capability": (9, 0), "multiprocessors": 132, "shared_memory": 227 * 1024}
A100 = {"capability": (8, 0), "multiprocessors": 108, "shared_memory": 163 * 1024}


# --- planning -----------------------------------------------------------------------------------------------


@functools.cache
def generator_of(name: str) -> torch.nn.Module:
    """Returns the same generator every time, so that it is lowered once: lowering checks itself, which takes long."""
    return moving_generator(name)


def lowered(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns the plan's text and its parameters' elements."""
    plan = gpu.plan_of(generator_of(name))
    return plan.text, tuple(tensor.numel() for tensor in plan.tensors(generator_of(name)))


def schedule(name: str, precision: str, rows: int, device: dict[str, Any], **options: Any) -> dict[str, Any]:
    text, elements = lowered(name)
    module: Any = extension.module()
    return module.cuda_schedule(text, elements, precision, rows=rows, **device, **options)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "precision", "rows", "device", "mapping"),
    [
        ("mnist", "float16", 10, H100, "layered"),
        ("mnist", "float16", 264, H100, "layered"),  # 33 groups for 132 multiprocessors
        ("mnist", "float16", 272, H100, "fused"),
        ("mnist", "float16", 10_000, H100, "fused"),
        ("mnist", "bfloat16", 10_000, H100, "fused"),
        ("digits", "float16", 10_000, H100, "fused"),
        ("mnist", "float32", 10_000, H100, "layered"),
        ("mnist", "float16", 10_000, A100, "layered"),
        ("celeba", "float16", 10_000, H100, "layered"),
        ("celeba", "float16", 10, H100, "layered"),
    ],
)
def test_the_mapping_follows_the_work_and_the_device(
    name: str, precision: str, rows: int, device: dict[str, Any], mapping: str
) -> None:
    found = schedule(name, precision, rows, device)
    assert found["mapping"] == mapping
    assert found["reason"]


@needs_kernels
@pytest.mark.parametrize("device", [H100, A100], ids=["H100", "A100"])
@pytest.mark.parametrize("rows", [1, 8, 9, 160, 1056, 10_000, 1_000_000])
@pytest.mark.parametrize("mapping", ["auto", "layered", "split"])
def test_every_schedule_covers_the_rows_and_fits(rows: int, device: dict[str, Any], mapping: str) -> None:
    found = schedule("mnist", "float16", rows, device, mapping=mapping)
    assert 1 <= found["rows_in_flight"] <= rows
    assert found["teams"] >= 1
    assert found["blocks_per_team"] >= 1
    if found["mapping"] != "fused":  # a cooperative launch has at most one block a multiprocessor to count on
        assert found["teams"] * found["blocks_per_team"] <= device["multiprocessors"]
    assert found["workspace_bytes"] < 300e6


@needs_kernels
@pytest.mark.parametrize("mapping", ["auto", *gpu.MAPPINGS])
def test_max_rows_bounds_the_rows_in_flight(mapping: str) -> None:
    for rows, most in ((10_000, 100), (10, 1), (7, 100)):
        found = schedule("digits", "float16", rows, H100, mapping=mapping, max_rows=most)
        assert found["rows_in_flight"] <= min(rows, most)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "precision", "device", "options", "message"),
    [
        ("mnist", "float32", H100, {"mapping": "fused"}, "fused.*float32"),
        ("celeba", "float16", H100, {"mapping": "fused"}, "fused.*geometry"),
        ("mnist", "float16", A100, {"mapping": "fused"}, "fused.*9.0 and 10.0"),
        (
            "mnist",
            "float16",
            {**H100, "shared_memory": 100_000},
            {"mapping": "fused"},
            "fused.*shared memory",
        ),
        ("mnist", "float16", {**H100, "capability": (7, 5)}, {}, "8.0 or later, got 7.5"),
        ("mnist", "float16", H100, {"mapping": "tiled"}, 'mapping must be "auto", .*, got "tiled"'),
        ("mnist", "float8", H100, {}, 'precision must be "float32", .*, got "float8"'),
    ],
)
def test_what_cannot_run_is_said_in_one_line(
    name: str, precision: str, device: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        schedule(name, precision, 10_000, device, **options)
    assert "\n" not in str(caught.value)


@needs_kernels
def test_planning_checks_the_parameters() -> None:
    module: Any = extension.module()
    generator = moving_generator("digits")
    plan = lower(generator, 64)
    with pytest.raises(ValueError, match="weight must have 131072 elements, got 1"):
        module.cuda_schedule(plan.text, [1] * len(plan.parameters), "float16", rows=1, **H100)


# --- without a GPU ------------------------------------------------------------------------------------------


@pytest.mark.skipif(ops.missing_cuda() is None, reason="there is a GPU")
def test_asking_for_cuda_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r'^backend "cuda" is not available: .') as caught:
        Projector(moving_generator("digits"), backend="cuda")
    assert "\n" not in str(caught.value)
    if torch.version.cuda is None:
        assert f"torch {torch.__version__} is a build without CUDA" in str(caught.value)
    elif ops.cuda_kernels_built:
        assert "the kernels are built, but torch sees no GPU" in str(caught.value)


# --- a CUDA build, with or without a GPU --------------------------------------------------------------------


@needs_cuda_build
def test_the_build_has_the_kernels() -> None:
    status = extension.status()
    assert status["without_cuda"] is None, status["without_cuda"]
    assert ops.cuda_kernels_built
    module: Any = extension.module()
    assert module.build_info()["cuda"] == "yes"
    assert torch.version.cuda is not None
    assert module.build_info()["cuda_toolkit"].split(".")[0] == torch.version.cuda.split(".")[0]
    assert status["architectures"]


@needs_cuda_build
@pytest.mark.parametrize("op", ["project", "decode"])
def test_ops_are_registered_for_gpus(op: str) -> None:
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"defgan_fast::{op}", key), key


@needs_cuda_build
def test_the_cpu_half_of_a_cuda_build_works() -> None:
    generator = moving_generator("digits")
    work = benchmark.problem(generator, 2, 2)
    found = Projector(generator, steps=3, restarts=2, backend="cpu").project(work.images, z0=work.z0)
    expected = benchmark.reference_errors(work, 3)
    torch.testing.assert_close(found.all_errors.double(), expected, rtol=1e-4, atol=0)


# --- on a GPU -----------------------------------------------------------------------------------------------


def on_gpu(name: str, images: int, restarts: int) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Returns a generator that moves, images and starting points on the GPU."""
    generator = moving_generator(name)
    work = benchmark.problem(generator, images, restarts)
    return generator.cuda(), work.images.cuda(), work.z0.cuda()


def available(name: str, precision: str) -> list[str]:
    """Returns the mappings that this GPU has for a generator."""
    return gpu.usable_mappings(generator_of(name), precision)


def same(a: defgan_fast.Projection, b: defgan_fast.Projection) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@needs_gpu
@pytest.mark.parametrize("name", ["digits", "mnist", "upsampling", "dcgan"])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_errors_match_the_specification(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, images, z0 = on_gpu(name, 5, 2)
    double = moving_generator(name).cuda().double()
    rates = reference.learning_rates(3, 10.0, 0.1, 0.8)
    _, expected = reference.project(double, images.double(), z0.double(), rates, 0.7)
    # Median over rows, as in docs/numerics.md: one row on a ReLU's kink differs in any implementation. PyTorch's own
    # network in 16 bits is 1e-2 to 3e-2 off after a few steps.
    tolerance = {"float32": 1e-4, "float16": 4e-2, "bfloat16": 0.1}[precision]
    for mapping in available(name, precision):
        monkeypatch.setenv("DEFGAN_CUDA_MAPPING", mapping)
        projector = Projector(generator, steps=3, restarts=2, precision=precision, backend="cuda")
        found = projector.project(images, z0=z0).all_errors.double()
        assert ((found - expected).abs() / expected).median() < tolerance, mapping


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_mappings_batches_and_repetitions_give_the_same_bits(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, images, z0 = on_gpu("digits", 21, 3)
    projector = Projector(generator, steps=20, restarts=3, precision=precision)
    expected = projector.project(images, z0=z0)
    for mapping in available("digits", precision):
        monkeypatch.setenv("DEFGAN_CUDA_MAPPING", mapping)
        for max_rows in (None, 1, 9, 40):
            projector.max_rows = max_rows
            assert same(projector.project(images, z0=z0), expected), (mapping, max_rows)
        part = projector.project(images[5:6], z0=z0[5:6])
        assert all(torch.equal(x, y[5:6]) for x, y in zip(part, expected, strict=True)), mapping


@needs_gpu
def test_auto_means_half_precision_kernels() -> None:
    generator, images, _ = on_gpu("digits", 1, 1)
    projector = Projector(generator)
    assert projector.backend_for(images) == "cuda"
    assert projector.precision_for(images) == "float16"
    assert projector.backend_for(images.double()) == "reference"
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert projector.precision_for(images) == "bfloat16"
    with pytest.raises(ValueError, match=r'^images must be on a cpu device with backend="cpu", got cuda:0$'):
        Projector(generator, backend="cpu")(images)


@needs_gpu
def test_a_call_does_not_synchronise() -> None:
    generator, images, z0 = on_gpu("digits", 2, 2)
    projector = Projector(generator, steps=3, restarts=2)
    projector.project(images, z0=z0)  # uploads tables
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        projector.project(images, z0=z0)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@needs_gpu
def test_a_graph_captures_a_call() -> None:
    generator, images, z0 = on_gpu("digits", 4, 2)
    projector = Projector(generator, steps=5, restarts=2)
    expected = [projector.project(x, z0=z0) for x in (images, images.flip(0).contiguous())]
    static = images.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = projector.project(static, z0=z0)
    for x, wanted in zip((images, images.flip(0)), expected, strict=True):
        static.copy_(x)
        graph.replay()
        assert same(found, wanted)


@needs_gpu
def test_a_first_call_inside_a_capture_says_what_to_do() -> None:
    generator, images, z0 = on_gpu("digits", 1, 1)
    projector = Projector(generator, steps=7, restarts=1, lr=math.pi)  # a schedule that nothing else uses
    projector.project(images, z0=z0)
    fresh = Projector(generator, steps=7, restarts=1, lr=math.e)
    graph = torch.cuda.CUDAGraph()
    message = "make one such call on cuda:0 before the capture"
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph):
        fresh.project(images, z0=z0)


@needs_gpu
def test_streams() -> None:
    generator, images, z0 = on_gpu("digits", 8, 4)
    projector = Projector(generator, steps=10, restarts=4)
    expected = projector.project(images, z0=z0)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append(projector.project(images, z0=z0))
    torch.cuda.synchronize()
    assert all(same(each, expected) for each in found)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_images_device_is_used_and_the_current_one_kept() -> None:
    generator, images, z0 = on_gpu("digits", 2, 2)
    expected = Projector(generator, steps=5, restarts=2).project(images, z0=z0)
    other = Projector(generator.to("cuda:1"), steps=5, restarts=2).project(
        images.to("cuda:1"), z0=z0.to("cuda:1")
    )
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(other, expected, strict=True))


@needs_gpu
def test_values_are_checked_on_request() -> None:
    generator, images, z0 = on_gpu("digits", 2, 2)
    checked = Projector(generator, steps=1, restarts=2, validate=True)
    bad = images.clone()
    bad[1, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match=r"^images must be finite"):
        checked(bad)
    with pytest.raises(ValueError, match=r"range \[0, 1\], got \[0, 255\]"):
        checked(torch.tensor([0.0, 255.0], device="cuda").repeat(392).view(1, 1, 28, 28))
    with pytest.raises(ValueError, match=r"^z0 must be finite"):
        checked.project(images, z0=torch.full_like(z0, math.inf))


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_row_that_overflows_shows_never_wins_and_raises_on_request(precision: str) -> None:
    generator, images, z0 = on_gpu("digits", 2, 3)
    z0[1, 2] = 3e38
    projector = Projector(generator, steps=3, restarts=3, precision=precision)
    p = projector.project(images, z0=z0)
    assert not p.all_errors[1, 2].isfinite()
    assert p.all_errors.isfinite().sum() == 5
    assert p.restarts[1] != 2
    projector.validate = True
    with pytest.raises(
        ValueError, match=rf"^errors must be finite .*, got 1 of 6 rows that overflowed in {precision}"
    ):
        projector.project(images, z0=z0)


@needs_gpu
def test_an_unknown_mapping_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, images, z0 = on_gpu("digits", 1, 1)
    monkeypatch.setenv("DEFGAN_CUDA_MAPPING", "tiled")
    with pytest.raises(ValueError, match=r'^DEFGAN_CUDA_MAPPING: mapping must be "auto"'):
        Projector(generator, steps=1, restarts=1).project(images, z0=z0)


@needs_gpu
def test_compiled_graphs_hold_the_op() -> None:
    generator, images, _ = on_gpu("digits", 3, 2)
    projector = Projector(generator, steps=4, restarts=2)
    expected = projector(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.compile(projector, fullgraph=True)(images), expected)


@needs_gpu
def test_an_empty_batch() -> None:
    generator, images, _ = on_gpu("digits", 1, 1)
    p = Projector(generator, steps=2, restarts=3).project(images[:0])
    assert p.images.shape == images[:0].shape
    assert p.all_errors.shape == (0, 3)
