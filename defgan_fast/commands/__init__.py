"""The command line, ``defgan-fast``: one file for each command, named after it.

A command's file has ``add_arguments(parser)``, which also sets ``run``, a function from the parsed arguments to the
exit status. Only the file of the command that was asked for is imported, so that ``--help`` is quick; nothing imports
this package but the entry points. A user's mistake ends with one line on stderr and status 2, an interruption with
one line and status 130; neither shows a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

# Each name is that of a module here, in the order of the help text.
COMMANDS = {
    "demo": "defend real images against FGSM and an adaptive attack",
    "project": "replace images by the nearest ones that a generator makes",
    "attack": "make adversarial images of a classifier, through its defence or not",
    "detect": "find attacked images by their reconstruction error",
    "evaluate": "what is left of a defended classifier under a threat, with checks",
    "train": "train a generator or a classifier",
    "tune": "find the settings that suit a generator of your own",
    "info": "versions, backends, and how the extension was built",
    "bench": "measure the kernels against the machine and other software",
}
# A shell reports so a process that SIGPIPE ended.
BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one line; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Returns the parser of all commands.

    Args:
        argv: the words to be parsed, of which the first that is no option names the command, whose arguments alone
            are added; None adds those of all commands.
    """
    from defgan_fast._version import __version__

    parser = _Parser(
        prog="defgan-fast",
        description="Defense-GAN: project images onto the range of a generator before they are classified.",
    )
    parser.add_argument("--version", action="version", version=f"defgan-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = tuple(COMMANDS) if argv is None else [word for word in argv if not word.startswith("-")][:1]
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text)
        if name in wanted:
            importlib.import_module(f"{__name__}.{name}").add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    args = build_parser(words).parse_args(words)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except KeyboardInterrupt as interruption:
        return _fail(str(interruption) or "interrupted", 130)
    except BrokenPipeError:
        # The reader, such as head, has what it wanted. Python would complain again when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError, RuntimeError) as error:
        return _fail(_one_line(error), 2)
    return status


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, status: int) -> int:
    # The progress bar may have left the cursor inside a line.
    print(f"defgan-fast: {message}", file=sys.stderr)
    return status
