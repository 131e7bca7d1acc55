"""Times whole projections on a GPU: the kernels, each of their mappings and every peer, in one process.

Where there is no GPU the same code rehearses a tiny problem on the CPU kernels and records no time. Synchronisation
is inside what is timed, and every backend's errors are compared with the float64 reference before it is timed.
"""

from __future__ import annotations

import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..kernels import extension, ops
from ..plan import Plan, lower
from ..precisions import ON_CPU
from . import peers, run
from .flops import flop_per_step
from .generators import latent_size, moving_generator

STEPS, RESTARTS = 200, 10
SIZES = (1, 16, 1000)
MAPPINGS = ("fused", "layered", "split")
REPETITIONS = 7
SECONDS, PEER_SECONDS = 1.0, 0.3  # of one repetition, about
# What a peer needs to be prepared and timed; compilation takes a third of a minute for each size.
LEAST_SECONDS, LEAST_SECONDS_COMPILED = 8, 30

_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def backend() -> str:
    """Returns where this runs: "cuda", or "cpu" as a rehearsal where torch sees no GPU.

    Raises:
        RuntimeError: there is a GPU, and the kernels were not built for it.
    """
    if not torch.cuda.is_available():
        return "cpu"
    missing = ops.missing_cuda()
    if missing is not None:
        raise RuntimeError(f"no CUDA kernels: {missing}")
    return "cuda"


def plan_of(generator: nn.Module) -> Plan:
    """Returns the lowered generator, lowered once: lowering checks itself in float64, which takes long."""
    if generator not in _plans:
        _plans[generator] = lower(generator, latent_size(generator))
    return _plans[generator]


@contextmanager
def forced_mapping(name: str) -> Iterator[None]:
    """Forces one mapping of rows onto the GPU for a while; "auto" forces none."""
    before = os.environ.pop("DEFGAN_CUDA_MAPPING", None)
    if name != "auto":
        os.environ["DEFGAN_CUDA_MAPPING"] = name
    try:
        yield
    finally:
        os.environ.pop("DEFGAN_CUDA_MAPPING", None)
        if before is not None:
            os.environ["DEFGAN_CUDA_MAPPING"] = before


def usable_mappings(generator: nn.Module, precision: str) -> list[str]:
    """Returns the mappings that this GPU has for a generator in a precision; without a GPU, those it might have."""
    if not torch.cuda.is_available():
        return [name for name in MAPPINGS if name != "fused" or precision != "float32"]
    gpu: Any = torch.cuda.get_device_properties(0)
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


def seconds_of(body: Callable[[], Any], repetitions: int) -> list[float]:
    """Returns the wall-clock seconds of each repetition, synchronised inside."""
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    found = []
    for _ in range(repetitions):
        start = time.perf_counter()
        body()
        synchronise()
        found.append(time.perf_counter() - start)
    return found


def measure(found: dict[str, Any], save: Callable[[], None], left: Callable[[], float]) -> list[str]:
    """Measures milliseconds of a whole projection, L = 200 and R = 10: medians with their range.

    What takes long does fewer steps, since its time per step does not depend on their number.

    Args:
        found: receives ``backend``, ``steps``, ``restarts``, ``flop_per_row_and_step`` and ``rows``.
        save: is called after every row.
        left: tells the seconds that remain; a peer for which they do not suffice is left out and named.

    Returns:
        One line for each thing that went wrong: a failure of the kernels, or a peer that was left out.
    """
    what = backend()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # the peers at their best
    torch.backends.cudnn.benchmark = True
    generator = moving_generator("mnist" if what == "cuda" else "digits")
    flop = flop_per_step(generator, latent_size(generator))
    rows: list[dict[str, Any]] = []
    found |= {
        "backend": what,
        "steps": STEPS,
        "restarts": RESTARTS,
        "flop_per_row_and_step": flop,
        "rows": rows,
    }
    failures: list[str] = []
    problems = {
        n: run.moved(run.problem(generator, n, RESTARTS), what) for n in (SIZES if what == "cuda" else (1,))
    }
    expected = {n: run.expected_errors(work) for n, work in problems.items()}

    def add(peer: peers.Peer, label: str, images: int, seconds: float) -> None:
        print(f"    {images:>5} x {RESTARTS}  {label}, {peer.precision}", flush=True)
        row: dict[str, Any] = {"backend": label, "precision": peer.precision, "images": images}
        rows.append(row)
        try:
            row |= _timed(peer, problems[images], expected[images], seconds, flop, what)
        except Exception as error:  # a peer that cannot do it must not end the measurement of the others
            row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if label.startswith("defgan_fast"):
                failures.append(f"{label}: {row['error']}")
        save()

    for images, work in problems.items():
        for precision in ("float32", "float16", "bfloat16") if what == "cuda" else ON_CPU:
            add(peers.ours(precision, what), "defgan_fast", images, SECONDS)
        for mapping in usable_mappings(work.generator, "float16") if what == "cuda" else []:
            with forced_mapping(mapping):
                add(peers.ours("float16", what), f"defgan_fast {mapping}", images, SECONDS)
    others = peers.gpu_peers() if what == "cuda" else peers.pytorch_peers(compiled=False)[:1]
    for peer in sorted(
        others, key=_is_compiled
    ):  # compiled peers last: each takes long before it can be timed
        for images in problems:
            if left() < (LEAST_SECONDS_COMPILED if _is_compiled(peer) else LEAST_SECONDS):
                failures.append(f"out of time before {peer.name} at {images} images")
                continue
            torch.compiler.reset()
            add(peer, peer.name, images, PEER_SECONDS)
            if what == "cuda":
                torch.cuda.empty_cache()
    return failures


def _is_compiled(peer: peers.Peer) -> bool:
    return "compile" in peer.name


def _timed(
    peer: peers.Peer, work: peers.Work, expected: torch.Tensor, seconds: float, flop: int, what: str
) -> dict[str, Any]:
    """Returns what one row says of a peer that has been found correct; a rehearsal gives no time."""
    prepared = peer.prepare(work)
    run.check(peer, prepared, expected)
    once = seconds_of(lambda: prepared(run.CHECK_STEPS), 2)[1] / run.CHECK_STEPS
    most = STEPS if what == "cuda" else run.CHECK_STEPS
    steps = max(run.CHECK_STEPS, min(most, round(seconds / once)))
    prepared(steps)
    milliseconds = sorted(1e3 * s * STEPS / steps for s in seconds_of(lambda: prepared(steps), REPETITIONS))
    row: dict[str, Any] = {"steps_run": steps, "repetitions": len(milliseconds)}
    if what == "cuda":
        row |= {"ms": statistics.median(milliseconds), "ms_range": [milliseconds[0], milliseconds[-1]]}
        row["useful_tflops"] = flop * len(work.images) * RESTARTS * STEPS / row["ms"] * 1e-9
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows that have a time as text, a line for each backend, with our ratios to eager and the best."""
    rows = [row for row in rows if "ms" in row]
    if not rows:
        return ""
    sizes = sorted({row["images"] for row in rows})
    lines = [f"{'ms, L = 200, R = 10':<44}" + "".join(f"{size:>10,} images" for size in sizes)]
    for label in dict.fromkeys((row["backend"], row["precision"]) for row in rows):
        cells = {row["images"]: row["ms"] for row in rows if (row["backend"], row["precision"]) == label}
        texts = (f"{cells[size]:>17.2f}" if size in cells else f"{'-':>17}" for size in sizes)
        lines.append(f"{', '.join(label):<44}" + "".join(texts))
    others = [row for row in rows if not row["backend"].startswith("defgan_fast")]
    ours = {
        r["images"]: r["ms"] for r in rows if (r["backend"], r["precision"]) == ("defgan_fast", "float16")
    }
    for name, chosen in (
        ("eager", [r for r in others if r["backend"].startswith("eager")]),
        ("best peer", others),
    ):
        best = {n: min((r["ms"] for r in chosen if r["images"] == n), default=None) for n in sizes}
        texts = (f"{best[n] / ours[n]:>16.1f}x" if best[n] and n in ours else f"{'-':>17}" for n in sizes)
        lines.append(f"{'float16 to ' + name:<44}" + "".join(texts))
    return "\n".join(lines)
