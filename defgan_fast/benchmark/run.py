"""Times the kernels and their peers on the same problems, in one run and in turns.

A comparison holds only within a run: clocks and neighbours change. So each case is repeated with every
backend in turn and medians are taken; each backend's errors are compared with the float64 reference before
it is timed; the load that others put on the machine is recorded with the numbers. A repetition of a peer
has fewer steps where a step is slow, since its time per step does not depend on their number; the kernels
run the method's 200 steps up to 100 rows. A measurement can be interrupted: each case is complete in itself,
peers and peak included, so a later call continues with the cases that are missing.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import nn

from .. import reference
from ..info import environment
from ..kernels import extension
from . import peers
from .flops import flop_per_step
from .generators import latent_size, moving_generator
from .limits import machine_limits, probe
from .load import DISTURBED, OtherLoad

REPETITIONS = 5
STEPS = 200  # of the method
MANY_ROWS = 100  # beyond them a step is so slow that fewer are timed
CHECK_STEPS = 8
CHECK_IMAGES = 10
# Median over rows of the relative difference of the errors after CHECK_STEPS: about twice what PyTorch itself has in
# that precision (0.03 in float16 and TF32, 0.05 in bfloat16: an error of the first steps moves by some percent in any
# implementation). float32 rounds by 6e-8, and each step multiplies it by a few.
TOLERANCE = {"float32": 1e-4, "tf32": 0.06, "float16": 0.06, "bfloat16": 0.1}


@dataclass(frozen=True)
class Case:
    """How many images and restarts, in which precision."""

    images: int
    restarts: int
    precision: str


class Row(TypedDict):
    """One line of the result. `ratio_to_best_peer` is above 1 where the backend is the faster one."""

    backend: str
    precision: str
    images: int
    restarts: int
    steps: int
    threads: int
    ms_per_step: float
    ms_per_step_range: tuple[float, float]
    gflops_useful: float
    share_of_peak: float | None
    ratio_to_best_peer: float | None


SIZES = [(1, 1), (1, 10), (10, 10), (200, 10)]
QUICK_SIZES = SIZES[1:3]


def cases(sizes: Sequence[tuple[int, int]], precisions: Sequence[str]) -> list[Case]:
    """Every size in every precision."""
    return [Case(images, restarts, precision) for images, restarts in sizes for precision in precisions]


def problem(generator: nn.Module, images: int, restarts: int, seed: int = 0) -> peers.Work:
    """Images that the generator can make, from latents other than the starting points; all from `seed`."""
    k = latent_size(generator)
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(images, k, generator=random) / math.sqrt(k)
    z0 = torch.randn(images, restarts, k, generator=random) / math.sqrt(k)
    with torch.no_grad():
        return peers.Work(generator, generator(hidden), z0)


def moved(work: peers.Work, device: str) -> peers.Work:
    """The same problem on another device."""
    return peers.Work(copy.deepcopy(work.generator).to(device), work.images.to(device), work.z0.to(device))


def reference_errors(work: peers.Work, steps: int) -> torch.Tensor:
    """[B, R] final errors in float64 by the specification, from the same starting points."""
    generator = copy.deepcopy(work.generator).double()
    rates = peers.learning_rates(steps)
    return reference.project(generator, work.images.double(), work.z0.double(), rates, peers.MOMENTUM)[1]


def expected_errors(work: peers.Work) -> torch.Tensor:
    """[b, R] errors after CHECK_STEPS of the first images, which every backend has to reproduce.

    Raises:
        RuntimeError: the problem does not move, so that reproducing its errors would prove nothing.
    """
    part = peers.Work(work.generator, work.images[:CHECK_IMAGES], work.z0[:CHECK_IMAGES])
    before, after = reference_errors(part, 0), reference_errors(part, CHECK_STEPS)
    if not after.median() < 2 / 3 * before.median():
        raise RuntimeError("the problem does not move: the loss falls by less than a third")
    return after


def check(peer: peers.Peer, run: peers.Run, expected: torch.Tensor) -> None:
    """Compares a backend's errors after a few steps with `expected_errors`.

    Raises:
        RuntimeError: it computes something else.
    """
    found = run(CHECK_STEPS)[: len(expected)].double()
    difference = ((found - expected).abs() / expected).median().item()
    if not difference < TOLERANCE[peer.precision]:
        raise RuntimeError(
            f"{peer.name} ({peer.precision}) is not correct and was not timed: after {CHECK_STEPS} steps its "
            f"errors differ from the reference by {difference:.1e}, expected less than "
            f"{TOLERANCE[peer.precision]:.0e}"
        )


def measure(
    cases: Sequence[Case],
    *,
    generator_name: str = "mnist",
    repetitions: int = REPETITIONS,
    seconds: float = 1.5,
    steps: int = STEPS,
    compiled: bool = True,
    earlier: dict[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Runs all cases.

    Args:
        cases: what to measure.
        generator_name: one of `generators.GENERATORS`.
        repetitions: timed repetitions of every backend; the median is reported.
        seconds: how long one repetition of a peer takes, about.
        steps: of the kernels, up to 100 rows; beyond as many as take about `10 * seconds`, at least a twentieth.
        compiled: whether `torch.compile` takes part, which compiles for some ten seconds a case.
        earlier: the result of a call that was interrupted; its cases are not measured again.
        save: called with the result so far after every case, and with the whole.

    Returns:
        `environment`, `generator`, `flop_per_row_and_step`, `limits`, `other_load` (cores taken by others,
        the most over all cases), `skipped` (backend -> reason), `complete` (whether all cases are there) and
        `rows`, a list of `Row`.

    Raises:
        ValueError: `earlier` was measured under other conditions.
    """
    generator = moving_generator(generator_name)
    flop = flop_per_step(generator, latent_size(generator))
    threads = torch.get_num_threads()
    result: dict[str, Any] = {
        "environment": _portable(environment()),
        "generator": generator_name,
        "flop_per_row_and_step": flop,
        "limits": {},
        "other_load": None,
        "skipped": {},
        "complete": False,
        "rows": [],
    }
    if earlier is not None:
        _check_continues(earlier, result, threads)
        result = copy.deepcopy(earlier) | {"complete": False}
    missing = dict.fromkeys(case.precision for case in cases if case.precision not in result["limits"])
    if missing:
        with OtherLoad() as load:
            result["limits"].update(machine_limits(threads, missing))
        result["other_load"] = _most(result["other_load"], load.cores)
    if extension.module() is None:
        result["skipped"]["defgan_fast"] = extension.status()["reason"]
    measured = {Case(row["images"], row["restarts"], row["precision"]) for row in result["rows"]}
    for case in cases:
        if case in measured:
            continue
        work = problem(generator, case.images, case.restarts)
        torch.compiler.reset()  # a function compiled for too many shapes is no longer compiled at all
        candidates = [] if "defgan_fast" in result["skipped"] else [peers.ours(case.precision)]
        others = peers.pytorch_peers(compiled) + peers.jax_peers()
        candidates += [peer for peer in others if peer.precision == case.precision]
        with OtherLoad() as load:
            timings = _time_in_turns(candidates, work, repetitions, seconds, steps, result["skipped"])
        result["rows"] += _rows(case, timings, flop * case.images * case.restarts, threads)
        _raise_peak(result, case.precision, probe(case.precision, threads))
        result["other_load"] = _most(result["other_load"], load.cores)
        if save is not None:
            save(result)
    result["complete"] = True
    if save is not None:
        save(result)
    return result


def _check_continues(earlier: dict[str, Any], now: dict[str, Any], threads: int) -> None:
    """Whether rows measured now may stand beside those of `earlier`."""

    def conditions(result: dict[str, Any]) -> dict[str, Any]:
        found = result["environment"]
        return {"generator": result["generator"], "versions": found["versions"], "cpu": found["cpu"]}

    before, after = conditions(earlier), conditions(now)
    for key, value in after.items():
        if before[key] != value:
            raise ValueError(f"the earlier measurement has {key} {before[key]}, this one {value}")
    for row in earlier["rows"]:
        if row["threads"] != threads:
            raise ValueError(f"the earlier measurement has {row['threads']} threads, this one {threads}")


def _raise_peak(result: dict[str, Any], precision: str, peak: float | None) -> None:
    """Clocks change within minutes: the peak is the best that was seen at any time, and all shares follow it."""
    limits = result["limits"][precision]
    limits["probe"] = _most(peak, limits["probe"])
    for row in result["rows"]:
        if row["precision"] == precision and limits["probe"]:
            row["share_of_peak"] = row["gflops_useful"] / limits["probe"]


def _most(a: float | None, b: float | None) -> float | None:
    return max((value for value in (a, b) if value is not None), default=None)


def _portable(found: dict[str, Any]) -> dict[str, Any]:
    """Without where the module lies on this machine, since results are kept and compared elsewhere; with JAX's
    version, where it is a peer."""
    extension = {key: value for key, value in found["extension"].items() if key != "path"}
    jax = {"jax": importlib.metadata.version("jax")} if peers.jax_peers() else {}
    return {**found, "extension": extension, "versions": {**found["versions"], **jax}}


def disturbance(result: dict[str, Any]) -> str | None:
    """A warning, where something else ran during the measurement."""
    cores = result["other_load"]
    if cores is None or cores <= DISTURBED:
        return None
    return f"other processes took {cores:.1f} cores while this ran: the numbers are not to be trusted"


@dataclass
class _Timing:
    peer: peers.Peer
    run: peers.Run
    steps: int
    seconds: list[float]


def _time_in_turns(
    candidates: Sequence[peers.Peer],
    work: peers.Work,
    repetitions: int,
    seconds: float,
    steps: int,
    skipped: dict[str, str],
) -> list[_Timing]:
    timings: list[_Timing] = []
    expected = expected_errors(work)
    for peer in candidates:
        _say(f"{len(work.images)} x {work.z0.shape[1]} {peer.precision}: {peer.name}")
        try:
            run = peer.prepare(work)
            check(peer, run, expected)
        except peers.Unavailable as reason:
            skipped[peer.name] = str(reason)
            continue
        if peer.name.startswith("defgan_fast"):
            few = max(1, steps // 20)
            n = steps if work.rows <= MANY_ROWS else _affordable_steps(run, 10 * seconds, steps, few)
        else:
            n = _affordable_steps(run, seconds, steps, 4 if work.rows <= MANY_ROWS else 1)
        run(n)
        timings.append(_Timing(peer, run, n, []))
    for _ in range(repetitions):
        for timing in timings:
            start = time.perf_counter()
            timing.run(timing.steps)
            timing.seconds.append(time.perf_counter() - start)
    return timings


def _affordable_steps(run: peers.Run, seconds: float, most: int, least: int) -> int:
    """How many steps take about `seconds`."""
    run(least)  # a peer may compile once more for another number of steps
    start = time.perf_counter()
    run(least)
    per_step = (time.perf_counter() - start) / least
    return max(least, min(most, round(seconds / per_step)))


def _rows(case: Case, timings: Sequence[_Timing], flop: int, threads: int) -> list[Row]:
    milliseconds = [[1e3 * s / timing.steps for s in timing.seconds] for timing in timings]
    medians = [statistics.median(each) for each in milliseconds]
    peer_medians = [
        median
        for median, timing in zip(medians, timings, strict=True)
        if not timing.peer.name.startswith("defgan_fast")
    ]
    rows: list[Row] = []
    for timing, each, median in zip(timings, milliseconds, medians, strict=True):
        gflops = flop / median / 1e6
        rows.append(
            {
                "backend": timing.peer.name,
                "precision": case.precision,
                "images": case.images,
                "restarts": case.restarts,
                "steps": timing.steps,
                "threads": threads,
                "ms_per_step": median,
                "ms_per_step_range": (min(each), max(each)),
                "gflops_useful": gflops,
                "share_of_peak": None,  # when the peak is known
                "ratio_to_best_peer": min(peer_medians) / median if peer_medians else None,
            }
        )
    return rows


def _say(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{message} ...", end="", file=sys.stderr, flush=True)
