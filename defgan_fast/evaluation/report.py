"""Pictures of an evaluation: attacked images with their reconstructions, and accuracy against epsilon."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import torch
from PIL import Image
from torch import nn

from defgan_fast import files, pictures
from defgan_fast.evaluation.evaluations import Evaluation
from defgan_fast.evaluation.metrics import predict

COLUMNS = 12


def picture(
    evaluation: Evaluation, classifier: nn.Module, defence: nn.Module | None = None, columns: int = COLUMNS
) -> Image.Image:
    """Draws the first images as they are, under each attack, and what the defence makes of them.

    The captions are the classes that the classifier reads in the images shown, green where they are right.

    Args:
        evaluation: whose attacked images are drawn.
        classifier: images to logits, without the defence.
        defence: images to images; None leaves its rows out.
        columns: number of images at most.
    """
    rows: dict[str, torch.Tensor] = {}
    for row in evaluation.attacked:
        if row.error is not None or len(row.adversarial) < min(columns, len(evaluation.images)):
            continue
        shown = row.adversarial[:columns]
        rows[row.attack.name] = shown
        if defence is not None:
            with torch.no_grad():
                rows[f"{row.attack.name}, defended"] = defence(shown)
    captions = {
        name: [
            (str(seen), seen == truth)
            for seen, truth in zip(
                predict(classifier.eval(), images).tolist(), evaluation.labels.tolist(), strict=False
            )
        ]
        for name, images in rows.items()
    }
    return pictures.labelled_rows(rows, captions, evaluation.value_range)


def plot(evaluations: Sequence[Evaluation], path: str | os.PathLike[str]) -> None:
    """Plots accuracy against epsilon with its intervals, and writes it as PNG.

    Args:
        evaluations: of the same images under several budgets, as :func:`accuracy_curve` returns them.
        path: of the picture.

    Raises:
        RuntimeError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError(
            "the plot needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    points = sorted(
        (found.threat.epsilon, found.minimum, *found.minimum_interval)
        for found in evaluations
        if found.threat.epsilon is not None
        and found.minimum is not None
        and found.minimum_interval is not None
    )
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    epsilons, left, low, high = ([point[i] for point in points] for i in range(4))
    axes.plot(epsilons, left, marker="o")
    axes.fill_between(epsilons, low, high, alpha=0.2)
    norm = {"linf": "l-infinity", "l2": "l2"}[evaluations[0].threat.norm] if evaluations else ""
    axes.set(xlabel=f"epsilon, {norm}", ylabel="accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    files.write_atomically(path, buffer.getvalue())
