#!/usr/bin/env python3
"""Everything that a GPU is needed for, in one command of at most eight minutes; no network.

    python bench/gpu_check.py                        # all parts, in their order; bench/results/gpu.json
    python bench/gpu_check.py --part correctness     # one part (several: repeat it)

Each part runs in a process of its own with a time budget: a part that fails, hangs or breaks the CUDA context does
not take the others with it, and what a part had found until then is kept. Where there is no GPU, parts rehearse on a
tiny problem, so that the script is tested: what is about results on the kernels' execution on the CPU, what is about
times on the CPU kernels, and without a time. The others are skipped by name. Needs Python 3.10, torch with CUDA, nvcc,
pybind11, ninja and numpy; compute-sanitizer and ncu are used where found.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MINUTES = 8.0
STEPS, RESTARTS = 200, 10
SIZES = (1, 16, 1000)
MAPPINGS = ("fused", "layered", "split")
OP_TESTS = "python_tests/kernels_cuda/test_cuda.py"


class Skip(Exception):
    """This part has nothing to run on here; the message says why."""


class Findings(dict):  # type: ignore[type-arg]
    """What a part has found so far; written to its file at every step, since the part may be killed at any time."""

    def __init__(self, path: Path, budget: float) -> None:
        super().__init__(failures=[])
        self.path = path
        self.end = time.monotonic() + budget

    def save(self) -> None:
        write(self.path, dict(self))

    def expect(self, true: bool, what: str) -> None:
        if not true:
            self["failures"].append(what)
            print(f"    FAILED: {what}", flush=True)
            self.save()

    def left(self) -> float:
        """Seconds of the budget."""
        return self.end - time.monotonic()


def write(path: Path, what: Any) -> None:
    """Atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(what, indent=1) + "\n")
    partial.replace(path)


def output_of(command: list[str], timeout: float = 60) -> str:
    """Standard output of a tool, empty where it is not there or fails."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=timeout
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def gpu_here() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def mapping(name: str) -> Iterator[None]:
    """Forces one for a while; "auto" forces none."""
    before = os.environ.pop("DEFGAN_CUDA_MAPPING", None)
    if name != "auto":
        os.environ["DEFGAN_CUDA_MAPPING"] = name
    try:
        yield
    finally:
        os.environ.pop("DEFGAN_CUDA_MAPPING", None)
        if before is not None:
            os.environ["DEFGAN_CUDA_MAPPING"] = before


# --- the card -------------------------------------------------------------------------------------------------


def card(found: Findings) -> None:
    """Versions, and the limits that the card states."""
    import torch

    found["python"], found["torch"], found["torch_cuda"] = (
        sys.version.split()[0],
        torch.__version__,
        torch.version.cuda,
    )
    lines = output_of(["nvcc", "--version"]).splitlines()
    found["nvcc"] = lines[-1] if lines else None
    found["tools"] = {tool: shutil.which(tool) for tool in ("compute-sanitizer", "ncu")}
    if not gpu_here():
        found.save()
        raise Skip("torch sees no GPU")
    gpu = torch.cuda.get_device_properties(0)
    found["name"] = gpu.name
    found["capability"] = [gpu.major, gpu.minor]
    found["multiprocessors"] = gpu.multi_processor_count
    found["l2_bytes"] = gpu.L2_cache_size
    found["shared_bytes_of_a_block"] = gpu.shared_memory_per_block_optin
    found["memory_bytes"] = gpu.total_memory
    fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,clocks.sm"
    said = output_of(["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"])
    found["nvidia_smi"] = dict(zip(fields.split(","), said.split(", "), strict=False))


def ceilings(found: Findings) -> None:
    """What it does at best: a large product, L2, mma.sync, barriers."""
    import torch

    if not gpu_here():
        raise Skip("torch sees no GPU")
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    rates = []
    for _ in range(13):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b)
        stop.record()
        stop.synchronize()
        rates.append(2e-9 * n**3 / start.elapsed_time(stop))
    found["product_fp16_tflops"] = statistics.median(rates[3:])
    found.save()

    from defgan_fast.kernels import build

    home = build.cuda_home()
    if home is None:
        raise RuntimeError("no nvcc: the probes of L2, mma.sync and barriers were not built")
    major, minor = torch.cuda.get_device_capability(0)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "gpu_probes"
        command = [f"{home}/bin/nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr"]
        command += [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}", f"-I{ROOT / 'csrc'}"]
        subprocess.run([*command, str(ROOT / "bench" / "gpu_probes.cu"), "-o", str(program)], check=True)
        said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    found.update(json.loads(said))


def build(found: Findings) -> None:
    """The extension, as a first import builds it; at once where it is built already."""
    start = time.monotonic()
    import torch

    from defgan_fast.kernels import extension, ops

    extension.load()
    found["seconds"] = round(time.monotonic() - start, 1)
    found["status"] = {key: value for key, value in extension.status().items() if key != "path"}
    found.expect(ops.kernels_available, f"no kernels: {extension.status()['reason']}")
    if torch.cuda.is_available():
        found.expect(ops.missing_cuda() is None, f"no CUDA kernels: {ops.missing_cuda()}")
    else:
        on_cpu().kernels()


# --- correctness ----------------------------------------------------------------------------------------------


def backend() -> str:
    """Where this runs: "cuda", or where there is no GPU "cpu", as a rehearsal.

    Raises:
        RuntimeError: there is a GPU, and the kernels are not there for it.
    """
    from defgan_fast.kernels import ops

    if not gpu_here():
        return "cpu"
    missing = ops.missing_cuda()
    if missing is not None:
        raise RuntimeError(f"no CUDA kernels: {missing}")
    return "cuda"


PRECISIONS = ("float32", "float16", "bfloat16")


_plans: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def plan_of(generator: Any) -> Any:
    """The lowered generator; lowering checks itself in float64, which takes longer than what is checked here."""
    from defgan_fast.plan import lower

    if generator not in _plans:
        _plans[generator] = lower(generator, generator.latent_size)
    return _plans[generator]


def mappings_for(generator: Any, precision: str) -> list[str]:
    """Those that this card has for this generator."""
    import torch

    from defgan_fast.kernels import extension

    if backend() == "cpu":
        return [name for name in MAPPINGS if name != "fused" or precision != "float32"]
    gpu = torch.cuda.get_device_properties(0)
    plan = plan_of(generator)
    elements = [tensor.numel() for tensor in plan.tensors(generator)]
    module: Any = extension.module()
    usable = []
    for name in MAPPINGS:
        try:
            module.cuda_schedule(
                plan.text,
                elements,
                precision,
                capability=(gpu.major, gpu.minor),
                multiprocessors=gpu.multi_processor_count,
                shared_memory=gpu.shared_memory_per_block_optin,
                rows=10,
                mapping=name,
            )
        except ValueError:
            continue
        usable.append(name)
    return usable


def on_cpu() -> Any:
    """The tests' module that compiles the kernels for the CPU and calls them."""
    sys.path.insert(0, str(ROOT / "python_tests" / "kernels_cuda"))
    import on_cpu

    return on_cpu


def poison() -> None:
    """Fills what torch's allocator will give out next with NaN: nothing may be read before it is written."""
    import torch

    if not torch.cuda.is_available():
        return
    torch.cuda.empty_cache()
    blocks = [
        torch.full((size // 4,), math.nan, device="cuda")
        for size in (256 << 20, 64 << 20, 1 << 20, *[4096] * 64)
    ]
    del blocks


def projection(generator: Any, work: Any, steps: int, precision: str, max_rows: int | None = None) -> Any:
    """(latents [B, R, k], errors [B, R]) of the op, on poisoned memory."""
    import torch

    from defgan_fast.benchmark import peers

    plan = plan_of(generator)
    parameters = [tensor.detach() for tensor in plan.tensors(generator)]
    rates = peers.learning_rates(steps)
    if backend() == "cpu":
        chosen = os.environ.get("DEFGAN_CUDA_MAPPING", "auto")
        arguments = (work.images, work.z0, parameters, plan.text, rates, peers.MOMENTUM, precision, chosen)
        result = on_cpu().kernels().project(*arguments, blocks=3, max_rows=max_rows or 0)
        return result.latents, result.errors
    poison()
    return torch.ops.defgan_fast.project(
        work.images, work.z0, parameters, plan.text, rates, peers.MOMENTUM, precision, max_rows or 0, False
    )


def descents(work: Any, steps: int, precision: str) -> tuple[Any, Any]:
    """(latents, errors) of PyTorch with the network in a precision, latents and loss in float32; or all in float64."""
    import copy

    from defgan_fast import reference
    from defgan_fast.benchmark import peers

    rates = peers.learning_rates(steps)
    if precision == "float64":
        double = copy.deepcopy(work.generator).double()
        return reference.project(double, work.images.double(), work.z0.double(), rates, peers.MOMENTUM)
    network = peers.network_in(work.generator, precision)
    return reference.project(network, work.images, work.z0, rates, peers.MOMENTUM)


# Problems that may be tried for a case, and more tries than one in all: a row on the kink of a ReLU is off in any
# implementation, and a case of one row, or by bad luck of nine, can be such. A bug is not that rare.
DRAWS, REDRAWS = 3, 5
# Added to twice PyTorch's own error: a few roundings of the format, where PyTorch happens to be exact.
EPSILON = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}


def correctness(found: Findings) -> None:
    """One step and five against float64 with fresh weights and images; partial groups; the same bits always."""
    import torch

    from defgan_fast.benchmark import run
    from defgan_fast.benchmark.generators import moving_generator

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    what = backend()
    on_gpu = what == "cuda"
    found["backend"] = what
    found["seed"] = seed = int.from_bytes(os.urandom(3), "little")
    print(f"    seed {seed}", flush=True)
    names = (
        ("digits", "mnist", "mnist_tensorflow", "celeba", "upsampling", "dcgan") if on_gpu else ("digits",)
    )
    shapes = ((1, 1), (3, 3), (8, 3)) if on_gpu else ((3, 3),)
    all_steps, long, batch, in_flight = (
        ((1, 5), 20, 13, (None, 1, 7, 8, 20)) if on_gpu else ((1,), 1, 2, (4,))
    )
    found["rows"], found["redraws"] = [], 0

    def compare(
        name: str, generator: Any, shape: tuple[int, int], steps: int, precision: str, draw: int
    ) -> bool:
        """Whether all mappings are as close to float64 as PyTorch; other expectations are stated here."""
        images, restarts = shape
        work = run.moved(
            run.problem(generator.cpu(), images, restarts, seed=seed + images + 1000 * draw), what
        )
        z64, e64 = descents(work, steps, "float64")
        travelled = (z64 - work.z0).norm(dim=-1)
        found.expect(bool((travelled > 0).all()), f"{name}: the problem does not move")
        theirs = ((descents(work, steps, precision)[0] - z64).norm(dim=-1) / travelled).median().item()
        bound = 2 * theirs + EPSILON[precision]
        bits, close = None, True
        for chosen in mappings_for(work.generator, precision):
            with mapping(chosen):
                z, errors = projection(work.generator, work, steps, precision)
            ours = ((z - z64).norm(dim=-1) / travelled).median().item()
            label = f"{name}, {images} x {restarts}, {steps} steps, {precision}, {chosen}"
            found["rows"].append(
                {
                    "case": label,
                    "draw": draw,
                    "latent_error": ours,
                    "pytorch": theirs,
                    "bound": bound,
                    "loss_error": ((errors - e64).abs() / e64).median().item(),
                }
            )
            if not ours <= bound:
                close = False
                last = draw + 1 == DRAWS
                found.expect(not last, f"{label}: latents are off by {ours:.1e}, at most {bound:.1e}")
            found.expect(bool(torch.isfinite(errors).all()), f"{label}: errors are not finite")
            bits = bits or (z, errors)
            same = torch.equal(z, bits[0]) and torch.equal(errors, bits[1])
            found.expect(same, f"{label}: other bits than {mappings_for(work.generator, precision)[0]}")
        return close

    for name in names:
        generator = moving_generator(name, seed=seed)
        for shape, steps, precision in itertools.product(shapes, all_steps, PRECISIONS):
            if found.left() < 5:
                found.expect(False, f"out of time at {name}, {shape}, {steps} steps")
                return
            for draw in range(DRAWS):
                if compare(name, generator, shape, steps, precision, draw):
                    break
                if draw + 1 < DRAWS:
                    found["redraws"] += 1
                    print(f"    another problem for {name}, {shape}, {steps} steps, {precision}", flush=True)
        found.save()
    found.expect(found["redraws"] <= REDRAWS, f"{found['redraws']} cases were too far off at first")

    # The same bits from run to run, at every place in the batch, for every size of what is in flight.
    generator = moving_generator("digits", seed=seed)
    work = run.moved(run.problem(generator, batch, 3, seed=seed), what)
    for precision in PRECISIONS:
        expected = projection(work.generator, work, long, precision)
        for chosen in mappings_for(work.generator, precision):
            with mapping(chosen):
                for max_rows in in_flight:
                    again = projection(work.generator, work, long, precision, max_rows)
                    same = all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
                    found.expect(same, f"{precision}, {chosen}, max_rows={max_rows}: other bits")
                for first in sorted({0, batch // 2, batch - 1}):
                    part = type(work)(
                        work.generator, work.images[first : first + 1], work.z0[first : first + 1]
                    )
                    alone = projection(work.generator, part, long, precision)
                    same = all(torch.equal(a[0], b[first]) for a, b in zip(alone, expected, strict=True))
                    found.expect(same, f"{precision}, {chosen}: image {first} alone has other bits")


def tiny(found: Findings) -> None:
    """One projection of 9 rows by each mapping: what compute-sanitizer and ncu look at."""
    import torch

    from defgan_fast.benchmark import run
    from defgan_fast.benchmark.generators import moving_generator

    work = run.moved(run.problem(moving_generator("digits"), 3, 3), backend())
    for precision in ("float16", "float32"):
        for chosen in mappings_for(work.generator, precision):
            with mapping(chosen):
                _, errors = projection(work.generator, work, 1, precision)
                found.expect(
                    bool(torch.isfinite(errors).all()), f"{precision}, {chosen}: errors are not finite"
                )


def sanitizer(found: Findings) -> None:
    """memcheck and racecheck of a tiny case."""
    if not gpu_here():
        raise Skip("torch sees no GPU")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skip("compute-sanitizer was not found")
    for check in ("memcheck", "racecheck"):
        with tempfile.TemporaryDirectory() as folder:
            child = [
                sys.executable,
                __file__,
                "--child",
                "tiny",
                "--result",
                f"{folder}/r.json",
                "--budget",
                "100",
            ]
            command = [
                tool,
                "--tool",
                check,
                "--kernel-name",
                "kernel_substring=defgan",
                "--error-exitcode",
                "9",
            ]
            start = time.monotonic()
            try:
                done = subprocess.run(
                    [*command, *child],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=max(5, found.left() - 3),
                )
            except subprocess.TimeoutExpired:
                found.expect(False, f"{check} ran out of time")
                return
            found[check] = {"status": done.returncode, "seconds": round(time.monotonic() - start, 1)}
            summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
            found[check]["summary"] = summary
            found.expect(
                done.returncode == 0 and bool(summary), f"{check}: {done.stdout[-1500:]} {done.stderr[-500:]}"
            )
            found.save()


def tests(found: Findings) -> None:
    """The op's own tests that need a GPU: streams, captured graphs, waiting, overflow."""
    if not gpu_here():
        raise Skip("torch sees no GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", OP_TESTS]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(5, found.left() - 3)
        )
    except subprocess.TimeoutExpired as late:
        said = late.stdout or ""
        found["said"] = said.decode() if isinstance(said, bytes) else said
        found.expect(False, "the tests ran out of time")
        return
    found["said"] = done.stdout.splitlines()[-1:]
    found.expect(done.returncode == 0, f"{OP_TESTS}: {done.stdout[-1500:]}")


# --- quality --------------------------------------------------------------------------------------------------


def quality(found: Findings) -> None:
    """After all steps: mean final error beside float64's, and the regret of the restart that was chosen."""
    import torch

    from defgan_fast import reference
    from defgan_fast.benchmark import peers, run
    from defgan_fast.benchmark.generators import moving_generator

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    what = backend()
    name, images, restarts, steps = ("mnist", 64, RESTARTS, STEPS) if what == "cuda" else ("digits", 2, 3, 3)
    work = run.moved(run.problem(moving_generator(name), images, restarts, seed=1), what)
    # Not exactly reachable, so that the final error is no rounding error.
    noise = torch.randn(work.images.shape, generator=torch.Generator().manual_seed(2)).to(what) * 0.1
    work = type(work)(work.generator, (work.images + noise).clamp(0, 1), work.z0)
    _, e64 = descents(work, steps, "float64")
    best64 = e64.min(1).values.mean().item()
    found.update(backend=what, generator=name, images=images, restarts=restarts, steps=steps, float64=best64)
    for precision in PRECISIONS:
        z, errors = projection(work.generator, work, steps, precision)
        rows, _ = peers.rows_of(work)
        with torch.no_grad():
            own = peers.row_errors(work.generator, z.flatten(0, 1), rows).view_as(errors)
        chosen = own.gather(1, reference.best_restarts(errors)[:, None])[:, 0]
        regret = (chosen / own.min(1).values).max().item()
        mean = chosen.mean().item()
        found[precision] = {
            "mean_final_error": mean,
            "ratio_to_float64": mean / best64,
            "worst_regret": regret,
        }
        # All steps end in the minima, where rounding is forgotten. The rehearsal's three end on the slope: there
        # PyTorch's own 16-bit descents of these two images are up to 5 percent off.
        bound = 0.01 if what == "cuda" or precision == "float32" else 0.1
        found.expect(
            abs(mean / best64 - 1) < bound, f"{precision}: mean final error {mean:.6f}, float64 {best64:.6f}"
        )
        found.expect(regret <= 1.001, f"{precision}: a chosen restart is {regret:.4f} times its best")
        found.save()


# --- times ----------------------------------------------------------------------------------------------------


def seconds_of(body: Callable[[], Any], repetitions: int) -> list[float]:
    """Wall-clock time of each repetition, synchronised inside."""
    import torch

    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    all_of_them = []
    for _ in range(repetitions):
        start = time.perf_counter()
        body()
        synchronise()
        all_of_them.append(time.perf_counter() - start)
    return all_of_them


def timings(found: Findings) -> None:
    """Milliseconds of a whole projection, L = 200 and R = 10, medians with spread; ours and peers in one process.

    What takes long does fewer steps, since its time per step does not depend on their number.
    """
    import torch

    from defgan_fast.benchmark import flops, peers, run
    from defgan_fast.benchmark.generators import moving_generator

    what = backend()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # the peers at their best
    torch.backends.cudnn.benchmark = True
    generator = moving_generator("mnist" if what == "cuda" else "digits")
    found["backend"], found["steps"], found["restarts"] = what, STEPS, RESTARTS
    found["flop_per_row_and_step"] = flops.flop_per_step(generator, int(generator.latent_size))  # type: ignore[arg-type]
    found["rows"] = []
    steps = STEPS if what == "cuda" else run.CHECK_STEPS

    def measure(peer: Any, label: str, work: Any, expected: Any, most: float) -> None:
        row: dict[str, Any] = {"backend": label, "precision": peer.precision, "images": len(work.images)}
        found["rows"].append(row)
        print(f"    {row['images']:>5} x {RESTARTS}  {label}, {peer.precision}", flush=True)
        try:
            prepared = peer.prepare(work)
            run.check(peer, prepared, expected)
            once = seconds_of(lambda: prepared(run.CHECK_STEPS), 2)[1] / run.CHECK_STEPS
            n = max(run.CHECK_STEPS, min(steps, round(most / once)))
            prepared(n)
            each = seconds_of(lambda: prepared(n), 7)
        except Exception as error:  # a peer that cannot do it must not end the measurement of the others
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            found.expect(not label.startswith("defgan_fast"), f"{label}: {row['error']}")
            found.save()
            return
        milliseconds = sorted(1e3 * s * STEPS / n for s in each)
        row |= {"steps_run": n, "repetitions": len(each)}
        if what == "cuda":  # a rehearsal gives no time
            row |= {"ms": statistics.median(milliseconds), "ms_range": [milliseconds[0], milliseconds[-1]]}
            flop = found["flop_per_row_and_step"] * len(work.images) * RESTARTS * STEPS
            row["useful_tflops"] = flop / row["ms"] * 1e-9
        found.save()

    sizes = SIZES if what == "cuda" else (1,)
    problems = {images: run.moved(run.problem(generator, images, RESTARTS), what) for images in sizes}
    expected = {images: run.expected_errors(work) for images, work in problems.items()}
    others = peers.gpu_peers() if what == "cuda" else peers.pytorch_peers(compiled=False)[:1]
    for images, work in problems.items():
        for precision in PRECISIONS if what == "cuda" else ("float32", "bfloat16"):
            measure(peers.ours(precision, what), "defgan_fast", work, expected[images], 1.0)
        for chosen in mappings_for(work.generator, "float16") if what == "cuda" else []:
            with mapping(chosen):
                measure(peers.ours("float16", what), f"defgan_fast {chosen}", work, expected[images], 1.0)
    # Compiled peers last: each takes a third of a minute before it can be timed.
    for peer in sorted(others, key=lambda peer: "compile" in peer.name):
        for images, work in problems.items():
            if found.left() < (30 if "compile" in peer.name else 8):
                found.expect(False, f"out of time before {peer.name} at {images} images")
                continue
            torch.compiler.reset()
            measure(peer, peer.name, work, expected[images], 0.3)
            if what == "cuda":
                torch.cuda.empty_cache()


# --- profile --------------------------------------------------------------------------------------------------

METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.sum.per_second",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__average_warps_issue_stalled_no_instruction_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
    "launch__registers_per_thread",
)


def profiled(found: Findings) -> None:
    """One call by each mapping, a few steps: what ncu looks at."""
    import torch

    from defgan_fast.benchmark import run
    from defgan_fast.benchmark.generators import moving_generator

    generator = moving_generator("mnist")
    for chosen in mappings_for(generator, "float16"):
        images = 105 if chosen == "fused" else 16  # 132 groups, one for each multiprocessor of an H100
        work = run.moved(run.problem(generator, images, RESTARTS), backend())
        with mapping(chosen):
            projection(work.generator, work, 3, "float16")
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profile(found: Findings) -> None:
    """ncu on one launch of each kernel that runs the steps."""
    if not gpu_here():
        raise Skip("torch sees no GPU")
    tool = shutil.which("ncu")
    if tool is None:
        raise Skip("ncu was not found")
    with tempfile.TemporaryDirectory() as folder:
        child = [
            sys.executable,
            __file__,
            "--child",
            "profiled",
            "--result",
            f"{folder}/r.json",
            "--budget",
            "100",
        ]
        command = [
            tool,
            "--csv",
            "--page",
            "raw",
            "--metrics",
            ",".join(METRICS),
            "--kernel-name-base",
            "demangled",
        ]
        command += ["--kernel-name", "regex:fused_entry|team_entry", "--clock-control", "none"]
        command += ["--launch-count", "8"]
        done = subprocess.run(
            [*command, *child], capture_output=True, text=True, check=False, timeout=max(5, found.left() - 2)
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    table = list(csv.DictReader(io.StringIO("\n".join(lines))))
    launches = [row for row in table if row.get("Kernel Name")]
    found["launches"] = [
        {key: row[key] for key in ("Kernel Name", "Grid Size", *METRICS) if row.get(key)} for row in launches
    ]
    found.expect(bool(launches), f"ncu told nothing: {done.stdout[-800:]} {done.stderr[-400:]}")


# --- all of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    name: str
    run: Callable[[Findings], None]
    budget: float  # seconds at most


PARTS = (
    Part("card", card, 20),
    Part("ceilings", ceilings, 50),
    Part("build", build, 240),
    Part("correctness", correctness, 60),
    Part("sanitizer", sanitizer, 50),
    Part("quality", quality, 20),
    Part("tests", tests, 45),
    Part("timings", timings, 160),
    Part("profile", profile, 45),
)
CHILDREN = {part.name: part.run for part in PARTS} | {"tiny": tiny, "profiled": profiled}


def run_child(name: str, path: Path, budget: float) -> int:
    """Runs one part in this process; its findings are in the file whatever happens."""
    found = Findings(path, budget)
    found.save()
    status = 0
    try:
        CHILDREN[name](found)
    except Skip as reason:
        found["skipped"] = str(reason)
    except Exception as error:
        found["failures"].append(f"{type(error).__name__}: {error}")
        status = 1
    found.save()
    return status or int(bool(found["failures"]))


def run_part(part: Part, budget: float) -> dict[str, Any]:
    """Runs one part in a process of its own, and ends it with all that it started when its time is over."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [
            sys.executable,
            __file__,
            "--child",
            part.name,
            "--result",
            str(path),
            "--budget",
            f"{budget:.0f}",
        ]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        late = False
        try:
            status = process.wait(budget + 2)
        except subprocess.TimeoutExpired:
            late, status = True, -1
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {"failures": []}
    if late:
        found["failures"].append(f"was ended after {budget:.0f} seconds")
    elif status not in (0, 1):
        found["failures"].append(f"ended with status {status}")
    found["seconds_taken"] = round(time.monotonic() - start, 1)
    found["outcome"] = "skipped" if "skipped" in found else "failed" if found["failures"] else "passed"
    return found


def table(result: dict[str, Any]) -> str:
    """What there is to read at the end: outcomes, ceilings, times."""
    parts = result["parts"]
    lines = [""]
    for name, found in parts.items():
        note = found.get("skipped") or (f"{len(found['failures'])} failures" if found["failures"] else "")
        if found.get("backend") == "cpu" and not note:
            note = "rehearsed on the CPU: no GPU"
        lines.append(f"{name:<12} {found['outcome']:<8} {found['seconds_taken']:>6.1f} s  {note}")
    measured = parts.get("ceilings", {})
    if "mma_tflops" in measured:
        lines.append(
            f"\n{parts.get('card', {}).get('name')}: product {measured['product_fp16_tflops']:.0f} TFLOP/s, mma.sync "
            f"{measured['mma_tflops']:.0f} TFLOP/s, L2 {measured['l2_gb_per_s']:.0f} GB/s, meetings (us) "
            f"{measured['meeting_us']}"
        )
    rows = [row for row in parts.get("timings", {}).get("rows", []) if "ms" in row]
    if rows:
        sizes = sorted({row["images"] for row in rows})
        lines += ["", f"{'ms, L = 200, R = 10':<44}" + "".join(f"{size:>10,} images" for size in sizes)]
        for label in dict.fromkeys((row["backend"], row["precision"]) for row in rows):
            cells = {row["images"]: row["ms"] for row in rows if (row["backend"], row["precision"]) == label}
            texts = (f"{cells[size]:>17.2f}" if size in cells else f"{'-':>17}" for size in sizes)
            lines.append(f"{', '.join(label):<44}" + "".join(texts))
        peers = [row for row in rows if not row["backend"].startswith("defgan_fast")]
        ours = {
            row["images"]: row["ms"]
            for row in rows
            if (row["backend"], row["precision"]) == ("defgan_fast", "float16")
        }
        for label, chosen in (
            ("eager", [r for r in peers if r["backend"].startswith("eager")]),
            ("best peer", peers),
        ):
            best = {
                size: min((r["ms"] for r in chosen if r["images"] == size), default=None) for size in sizes
            }
            texts = (
                f"{best[size] / ours[size]:>16.1f}x" if best[size] and size in ours else f"{'-':>17}"
                for size in sizes
            )
            lines.append(f"{'float16 to ' + label:<44}" + "".join(texts))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--part", choices=[part.name for part in PARTS], action="append", help="only this one"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    parser.add_argument("--commit", help="of the tree, where it is a copy without .git")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts, default {MINUTES:g}")
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return run_child(args.child, args.result, args.budget)

    # What has to be fast on a GPU may take its time where the kernels are executed on the CPU.
    slack = 1 if gpu_here() else 4
    end = time.monotonic() + 60 * args.minutes * slack
    described = output_of(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"])
    result: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": args.commit or described or None,
        "parts": {},
    }
    for part in PARTS:
        if args.part and part.name not in args.part:
            continue
        budget = min(part.budget * slack, end - time.monotonic())
        print(f"{part.name} ...", flush=True)
        if budget < 5:
            result["parts"][part.name] = {
                "failures": ["no time was left for it"],
                "outcome": "failed",
                "seconds_taken": 0.0,
            }
        else:
            result["parts"][part.name] = run_part(part, budget)
        write(args.json, result)
    print(table(result))
    failed = [name for name, found in result["parts"].items() if found["outcome"] == "failed"]
    for name in failed:
        for line in result["parts"][name]["failures"][:5]:
            print(f"{name}: {line}", file=sys.stderr)
    print(f"\n{args.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
