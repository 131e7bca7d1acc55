#!/usr/bin/env python3
"""Everything that a GPU is needed for, in one command of at most eight minutes; no network.

    python bench/gpu_check.py                        # all parts, in their order; bench/results/gpu.json
    python bench/gpu_check.py --part correctness     # one part (several: repeat it)

Each part runs in a process of its own with a time budget: a part that fails, hangs or breaks the CUDA context does
not take the others with it, and what a part had found until then is kept. The tests are those of
python_tests/kernels_cuda, the timings those of defgan_fast/benchmark/gpu.py. Where there is no GPU, parts rehearse on
a tiny problem, so that the script is tested: what is about results on the kernels' execution on the CPU, what is about
times on the CPU kernels, and without a time. The others are skipped by name. Needs Python 3.10, torch with CUDA, nvcc,
pybind11, ninja, numpy and pytest; compute-sanitizer and ncu are used where found.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_parts as parts
from gpu_parts import ROOT, Findings, Skip

MINUTES = 8.0
CEILINGS = ("product_fp16_tflops", "mma_tflops")


@dataclass(frozen=True)
class Part:
    name: str
    run: Callable[[Findings], None]
    budget: float  # seconds at most


PARTS = (
    Part("card", parts.card, 20),
    Part("ceilings", parts.ceilings, 50),
    Part("build", parts.build, 240),
    Part("correctness", parts.correctness, 60),
    Part("sanitizer", parts.sanitizer, 50),
    Part("quality", parts.quality, 20),
    Part("tests", parts.tests, 45),
    Part("timings", parts.timings, 160),
    Part("profile", parts.profile, 45),
)
CHILDREN = {part.name: part.run for part in PARTS} | {"profiled": parts.profiled}


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
    """Returns what there is to read at the end: outcomes, ceilings, times."""
    from defgan_fast.benchmark import gpu

    found_parts = result["parts"]
    lines = [""]
    for name, found in found_parts.items():
        note = found.get("skipped") or (f"{len(found['failures'])} failures" if found["failures"] else "")
        if found.get("backend") == "cpu" and not note:
            note = "rehearsed on the CPU: no GPU"
        lines.append(f"{name:<12} {found['outcome']:<8} {found['seconds_taken']:>6.1f} s  {note}")
    measured = found_parts.get("ceilings", {})
    if "mma_tflops" in measured:
        name, product, mma = (found_parts.get("card", {}).get("name"), *(measured[k] for k in CEILINGS))
        lines += ["", f"{name}: product {product:.0f} TFLOP/s, mma.sync {mma:.0f} TFLOP/s"]
        lines.append(f"L2 {measured['l2_gb_per_s']:.0f} GB/s, meetings (us) {measured['meeting_us']}")
    times = gpu.table(found_parts.get("timings", {}).get("rows", []))
    return "\n".join([*lines, "", times] if times else lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the parts and returns 1 where one failed."""
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
    slack = 1 if parts.gpu_here() else 4
    end = time.monotonic() + 60 * args.minutes * slack
    described = parts.output_of(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"])
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
        parts.files.write_json(args.json, result, indent=1)
    print(table(result))
    failed = [name for name, found in result["parts"].items() if found["outcome"] == "failed"]
    for name in failed:
        for line in result["parts"][name]["failures"][:5]:
            print(f"{name}: {line}", file=sys.stderr)
    print(f"\n{args.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
