"""The command line, ``defgan-fast``: every subcommand is registered by the module that does the work.

A user's mistake ends with one line on stderr and status 2, an interruption with one line and status 130;
neither shows a traceback. Nothing imports this module but the entry points.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

# Modules with add_parser(subparsers), in the order of the help text.
COMMANDS = (
    "defgan_fast.experiments.demo",
    "defgan_fast.training.cli",
    "defgan_fast.info",
    "defgan_fast.benchmark.cli",
)


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one line; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets ``run``, a function of the parsed arguments."""
    from defgan_fast._version import __version__

    parser = _Parser(
        prog="defgan-fast",
        description="Defense-GAN: project images onto the range of a generator before they are classified.",
    )
    parser.add_argument("--version", action="version", version=f"defgan-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(name).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt as interruption:
        return _fail(str(interruption) or "interrupted", 130)
    except (ValueError, OSError, RuntimeError) as error:
        return _fail(_one_line(error), 2)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, status: int) -> int:
    # The progress bar may have left the cursor inside a line.
    print(f"defgan-fast: {message}", file=sys.stderr)
    return status
