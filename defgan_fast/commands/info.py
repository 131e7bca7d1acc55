"""``defgan-fast info``: prints what this installation is and can do."""

from __future__ import annotations

import argparse
import json

from defgan_fast import info


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``info``."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    found = info.environment()
    print(json.dumps(found, indent=2) if args.json else info.text(found))
    return 0
