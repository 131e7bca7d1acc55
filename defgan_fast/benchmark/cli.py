"""`defgan-fast bench`: measures, prints the table, and writes the JSON that the report is made of.

Importing this module is quick, since the command line imports the modules of all its commands: what
measures is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .. import files

PRECISIONS = ("float32", "bfloat16")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers `defgan-fast bench`."""
    parser = subparsers.add_parser("bench", help="measure the kernels against the machine and other software")
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
    import torch

    from . import run as runner
    from .report import table

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
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
    """What an interrupted call left; None where there is nothing to continue. The file is opened for writing."""
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
