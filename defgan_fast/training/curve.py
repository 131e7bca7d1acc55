"""The reconstruction error and the accuracy on reconstructions against training steps (paper, equation 7).

Reads the ``quality.csv`` of one or more runs; the error must fall towards zero as the generator learns, and
what more training would give is read off the end of the curve.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from defgan_fast.files import write_atomically
from defgan_fast.training.loop import QUALITY

ERROR_COLOUR, ACCURACY_COLOUR = "#1f5fa8", "#c2410c"


def read(run: Path) -> list[dict[str, float]]:
    """Reads the rows of the file, or of the file in the folder, ``run``.

    Raises:
        FileNotFoundError, ValueError: there is none, or it has no evaluation.
    """
    path = run / QUALITY if run.is_dir() else run
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; train with --evaluate-every to have it written")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"step", "reconstruction_error"} <= set(rows[0]):
        raise ValueError(f"{path} must have the columns step and reconstruction_error and at least one row")
    return [{name: float(value) for name, value in row.items()} for row in rows]


def plot(runs: Sequence[Path], names: Sequence[str], out: Path) -> None:
    """Writes a PNG with one panel for each run.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("plotting needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(4.2 * len(runs), 3.0), dpi=100, layout="constrained")
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        rows = read(run)
        steps = [row["step"] for row in rows]
        left = figure.add_subplot(1, len(runs), index + 1)
        left.plot(steps, [row["reconstruction_error"] for row in rows], "o-", ms=3, color=ERROR_COLOUR)
        left.set_ylim(bottom=0)
        left.set_xlabel("generator steps")
        left.set_ylabel("mean reconstruction error", color=ERROR_COLOUR)
        left.set_title(name)
        if all("accuracy_reconstructed" in row for row in rows):
            right = left.twinx()
            accuracies = [row["accuracy_reconstructed"] for row in rows]
            right.plot(steps, accuracies, "s--", ms=3, color=ACCURACY_COLOUR)
            right.set_ylabel("accuracy on reconstructions", color=ACCURACY_COLOUR)
            right.set_ylim(min([*accuracies, 0.8]), 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(out, buffer.getvalue())
