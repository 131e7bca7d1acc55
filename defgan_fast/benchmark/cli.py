"""`defgan-fast bench`: measures, prints the table, and writes the JSON that the report is made of.

Importing this module is quick, since the command line imports the modules of all its commands: what
measures is imported when it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers `defgan-fast bench`."""
    parser = subparsers.add_parser("bench", help="measure the kernels against the machine and other software")
    parser.add_argument(
        "--quick", action="store_true", help="float32 at 1 and 10 images x 10 restarts only, about a minute"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
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
    if args.json is not None:
        with args.json.open("a"):
            pass
    if args.quick:
        result = runner.measure(runner.QUICK, generator_name=args.generator, seconds=0.6, steps=60)
    else:
        result = runner.measure(runner.ALL, generator_name=args.generator)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    print(table(result))
    for backend, reason in result["skipped"].items():
        print(f"{backend} was left out: {reason}")
    warning = runner.disturbance(result)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
