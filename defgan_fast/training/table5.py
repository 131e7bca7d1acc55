"""``defgan-fast train classifiers``: every classifier of table 5 with one recipe, beside the paper's accuracies.

The results are kept as JSON, one entry for each data set and architecture, and written as a table between two
marks of a Markdown file, so that no number there is typed by hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

from defgan_fast import data, files, weights
from defgan_fast.evaluation.metrics import accuracy
from defgan_fast.models.classifier import ARCHITECTURES, VARIANTS
from defgan_fast.training.selection import KEEP

# "No attack" of table 4; E and F, the substitutes, have none.
PAPER = {
    "mnist": {"A": 0.997, "B": 0.962, "C": 0.996, "D": 0.992},
    "fashion_mnist": {"A": 0.934, "B": 0.747, "C": 0.933, "D": 0.892},
}
BEGIN, END = "<!-- table 5 begins -->", "<!-- table 5 ends -->"


def add_parser(jobs: Any) -> None:
    """Register ``classifiers`` with ``train``."""
    parser = jobs.add_parser("classifiers", help="train classifiers A to F and compare them with the paper")
    parser.add_argument("--dataset", choices=tuple(PAPER), nargs="+", default=list(PAPER))
    parser.add_argument("--arch", choices=ARCHITECTURES, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        default="paper",
        help="networks of the paper's table or of the released code (default: paper)",
    )
    parser.add_argument(
        "--keep",
        choices=KEEP,
        default=KEEP[0],
        help=f"epoch of each, as in train classifier (default: {KEEP[0]})",
    )
    parser.add_argument(
        "--ema",
        type=float,
        default=0.0,
        help="decay of averaged weights, as in train classifier; rows of their own (default: 0, none)",
    )
    parser.add_argument("--work", type=Path, default=Path("out") / "train", help="default: out/train")
    parser.add_argument("--json", type=Path, default=Path("classifiers.json"), help="results, extended")
    parser.add_argument("--markdown", type=Path, help="file whose table is written anew")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument(
        "--root", help="folder of the data files (default: $DEFGAN_DATA/NAME, cache, download)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train what is not there, measure on the test images, and record it."""
    from defgan_fast.training import cli

    results: dict[str, dict[str, Any]] = json.loads(args.json.read_text()) if args.json.exists() else {}
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    for arch in args.arch:
        for name in args.dataset:
            row = row_of(arch, args.variant, args.ema > 0)
            out = args.work / f"classifier-{name}-{row}"
            words = ["train", "classifier", "--dataset", name, "--arch", arch, "--variant", args.variant]
            words += ["--keep", args.keep, "--ema", str(args.ema), "--out", str(out), "--resume"]
            words += ["--threads", str(args.threads)] if args.threads else []
            words += ["--root", args.root] if args.root else []
            cli.run_classifier(parser.parse_args(words))
            file = out / cli.CLASSIFIER_FILE
            results.setdefault(name, {})[row] = entry(file, data.load(name, args.root, "test"))
            files.write_atomically(args.json, (json.dumps(results, indent=2, sort_keys=True) + "\n").encode())
    text = table(results)
    print(text)
    if args.markdown:
        files.write_atomically(args.markdown, insert(args.markdown.read_text(), text).encode())
    return 0


def row_of(arch: str, variant: str, averaged: bool) -> str:
    """Name of a classifier's row: the table's letter, or one such as A-released or A-averaged."""
    return "-".join([arch] + [variant] * (variant != "paper") + ["averaged"] * averaged)


def entry(file: Path, test: data.Dataset) -> dict[str, Any]:
    """What one weight file came to on the test images."""
    card = weights.read_card(file)
    return {
        "accuracy_test": round(accuracy(weights.load_classifier(file), test.images, test.labels), 6),
        "accuracy_validation": round(card["quality"]["accuracy_validation"], 6),
        "images_test": len(test.images),
        **{key: card[key] for key in ("command", "steps", "seed", "torch", "data_sha256")},
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each architecture, for each data set our accuracy, the paper's, and the difference."""
    names = [name for name in PAPER if name in results]
    lines = ["| | " + " | ".join(f"{name} | paper | difference" for name in names) + " |"]
    lines.append("|---" * (1 + 3 * len(names)) + "|")
    for arch, variant, averaged in itertools.product(ARCHITECTURES, VARIANTS, (False, True)):
        row = row_of(arch, variant, averaged)
        if not any(row in results[name] for name in names):
            continue
        cells = [row]
        for name in names:
            ours = results[name].get(row, {}).get("accuracy_test")
            paper = PAPER[name].get(arch)
            cells.append("" if ours is None else f"{ours:.4f}")
            cells.append("" if paper is None else f"{paper:.3f}")
            cells.append("" if ours is None or paper is None else f"{100 * (ours - paper):+.1f} points")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def insert(document: str, text: str) -> str:
    """``document`` with ``text`` between the two marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"--markdown must be a file with the lines {shlex.quote(BEGIN)} and {shlex.quote(END)}"
        )
    return f"{before}{BEGIN}\n{text}\n{END}{after}"
