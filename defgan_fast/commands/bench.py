"""``defgan-fast bench``: measures, prints the table, and writes the JSON that the report is made of."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from defgan_fast import arguments, files
from defgan_fast.benchmark import run as runner
from defgan_fast.benchmark.report import table
from defgan_fast.precisions import ON_CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench``."""
    parser.add_argument(
        "--quick",
        action="store_true",
        help="1 and 10 images x 10 restarts only, and float32 unless --precision is given: a few minutes",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all numbers to FILE, and continue with what is missing in FILE where an earlier call was"
        " interrupted",
    )
    parser.add_argument(
        "--precision",
        choices=ON_CPU,
        action="append",
        help="only this one (default: both; --quick: float32)",
    )
    parser.add_argument(
        "--generator", default="mnist", help="geometry: mnist (default), digits, celeba, dcgan or upsampling"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of all backends (default: torch's)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and reports.

    Raises:
        ValueError: an unknown generator, or threads below 1.
        OSError: the JSON file cannot be written; found out before anything is measured.
    """
    if args.threads is not None:
        torch.set_num_threads(arguments.count("threads", args.threads))
    earlier = None if args.json is None else _partial(args.json)
    save = None if args.json is None else partial(_write, args.json)
    precisions = args.precision or (ON_CPU[:1] if args.quick else ON_CPU)
    result = runner.measure(
        runner.cases(runner.QUICK_SIZES if args.quick else runner.SIZES, precisions),
        generator_name=args.generator,
        seconds=0.6 if args.quick else 1.0,
        earlier=earlier,
        save=save,
    )
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(table(result))
    for backend, reason in result["skipped"].items():
        print(f"{backend} was left out: {reason}")
    warning = runner.disturbance(result)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _partial(file: Path) -> dict[str, Any] | None:
    """Returns what an interrupted call left, None where there is nothing; the file is opened for writing, too."""
    with file.open("a+") as stream:
        stream.seek(0)
        text = stream.read()
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("complete") is False else None


def _write(file: Path, result: dict[str, Any]) -> None:
    """Writes the report whole or not at all: an interrupted call must leave what the one before it wrote."""
    files.write_json(file, result, indent=1)
