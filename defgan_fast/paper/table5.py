"""Table 5, the classifiers A to F: every one trained with one recipe, beside the paper's accuracies.

The results are kept as JSON, one entry for each data set and architecture.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from defgan_fast import data, files, weights
from defgan_fast.evaluation.metrics import accuracy
from defgan_fast.models.classifier import ARCHITECTURES, VARIANTS
from defgan_fast.training.recipes import CLASSIFIER
from defgan_fast.training.run import Run
from defgan_fast.training.train_classifier import train_classifier

# The accuracies are those of "no attack" in table 4; E and F, the substitutes, have none.
PAPER = {
    "mnist": {"A": 0.997, "B": 0.962, "C": 0.996, "D": 0.992},
    "fashion_mnist": {"A": 0.934, "B": 0.747, "C": 0.933, "D": 0.892},
}
BEGIN, END = "<!-- table 5 begins -->", "<!-- table 5 ends -->"


def train_and_measure(
    archs: Iterable[str],
    datasets: Iterable[str],
    *,
    variant: str,
    ema: float,
    keep: str,
    work: Path,
    results: Path,
    root: str | None = None,
    threads: int | None = None,
) -> Iterator[str]:
    """Trains what is not there, measures it on the test images, and records it.

    Args:
        archs: letters of classifiers.
        datasets: names of data sets.
        variant: see :class:`defgan_fast.models.Classifier`.
        ema: decay of averaged weights, 0 for none.
        keep: see :func:`train_classifier`.
        work: folder of the trainings.
        results: JSON file, extended after every training.
        root: folder of the data files.
        threads: CPU threads; None leaves PyTorch's own choice.

    Yields:
        Lines that say what was done; the last is the table.
    """
    found: dict[str, dict[str, Any]] = json.loads(results.read_text()) if results.exists() else {}
    names = tuple(datasets)
    for arch in archs:
        for name in names:
            row = row_of(arch, variant, ema > 0)
            own = replace(CLASSIFIER[name], arch=arch, variant=variant, ema=ema)
            run = Run(name, work / f"classifier-{name}-{row}", root, resume=True, threads=threads)
            trained = train_classifier(own, run, keep=keep)
            yield from trained.summary
            found.setdefault(name, {})[row] = entry(trained.file, data.load(name, root, "test"))
            files.write_json(results, found, sort_keys=True)
    yield table(found)


def row_of(arch: str, variant: str, averaged: bool) -> str:
    """Returns the name of a classifier's row: the table's letter, or one such as A-released or A-averaged."""
    return "-".join([arch] + [variant] * (variant != "paper") + ["averaged"] * averaged)


def entry(file: Path, test: data.Dataset) -> dict[str, Any]:
    """Returns what one weight file came to on the test images."""
    card = weights.read_card(file)
    return {
        "accuracy_test": round(accuracy(weights.load_classifier(file), test.images, test.labels), 6),
        "accuracy_validation": round(card["quality"]["accuracy_validation"], 6),
        "images_test": len(test.images),
        **{key: card[key] for key in ("command", "steps", "seed", "torch", "data_sha256")},
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Returns Markdown: a row for each architecture, for each data set our accuracy, the paper's, the difference."""
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
