#!/usr/bin/env python3
"""What descents of different settings keep: a grid over starting points, norms, restarts, steps and votes.

    DEFGAN_DATA=... python bench/descents.py --dataset mnist fashion_mnist --images 200 --json FILE

Images are spread evenly over the validation split, since the first ones are easy. The attack is FGSM with epsilon 0.3
against the undefended classifier (paper, section 5.1). Each row gives the row-steps of an image, the classifier's
accuracy on the reconstructions of clean and of attacked images with its 95% interval, and the seconds that the
projections took. Rows that the file has already are not measured again, so an interrupted run goes on. --table prints
the file as Markdown and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from defgan_fast import Projector, Vote, data, files, sure_candidates, weights
from defgan_fast.evaluation import transfer
from defgan_fast.evaluation.metrics import interval, predict

SPHERE = {"starts": "nearest", "radius": "auto"}
SURE = 0.99
GROUP = 50  # images a call

# The name of a row to the projector's settings; "vote" and "sure" say what surrounds it.
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"restarts": 10, "steps": 200},
    "paper, L = 50": {"restarts": 10, "steps": 50},
    "nearest, no descent": {**SPHERE, "restarts": 1, "steps": 0},
    "R = 1, L = 25": {**SPHERE, "restarts": 1, "steps": 25},
    "R = 1, L = 50": {**SPHERE, "restarts": 1, "steps": 50},
    "R = 2, L = 25": {**SPHERE, "restarts": 2, "steps": 25},
    "R = 4 then 1, L = 30": {**SPHERE, "restarts": 4, "steps": 30, "keep": ((5, 1),)},
    "R = 8, 2, 1, L = 30": {**SPHERE, "restarts": 8, "steps": 30, "keep": ((3, 2), (8, 1))},
    "R = 1, L = 25, free": {"starts": "nearest", "restarts": 1, "steps": 25},
    "R = 1, L = 25, rate 30": {**SPHERE, "restarts": 1, "steps": 25, "lr": 30.0},
    "R = 1, L = 25, sure": {**SPHERE, "restarts": 1, "steps": 25, "sure": True},
    "R = 2, L = 25, sure": {**SPHERE, "restarts": 2, "steps": 25, "sure": True},
    "R = 1, L = 50, sure": {**SPHERE, "restarts": 1, "steps": 50, "sure": True},
    **{
        f"vote of {voters}, L = {steps}": {**SPHERE, "restarts": voters, "steps": steps, "vote": True}
        for voters in (4, 8)
        for steps in (10, 15, 25)
    },
    "vote of 8, L = 15, sure": {**SPHERE, "restarts": 8, "steps": 15, "vote": True, "sure": True},
}


def row_steps(settings: dict[str, Any]) -> int:
    """Returns the steps that all rows of an image take together."""
    total, before, rows = 0, 0, settings["restarts"]
    for step, kept in (*settings.get("keep", ()), (settings["steps"], 0)):
        total, before, rows = total + rows * (step - before), step, kept
    return total


def measure(
    settings: dict[str, Any],
    generator: nn.Module,
    classifier: nn.Module,
    sets: dict[str, data.Dataset],
    precision: str,
) -> dict[str, Any]:
    """Returns one row's figures for every set of images."""
    given = {name: value for name, value in settings.items() if name not in ("vote", "sure")}
    if settings.get("sure"):
        given["candidates"] = sure_candidates(generator, classifier, 8192, probability=SURE, most_draws=2**20)
    projector = Projector(generator, precision=precision, **given)
    model = Vote(projector, classifier) if settings.get("vote") else nn.Sequential(projector, classifier)
    found: dict[str, Any] = {"row_steps": row_steps(settings)}
    for name, images in sets.items():
        began = time.perf_counter()
        hits = int((predict(model.eval(), images.images, GROUP) == images.labels).sum())
        found[name] = {
            "accuracy": hits / len(images),
            "interval": interval(hits, len(images)),
            "seconds": time.perf_counter() - began,
        }
    return found


def spread(dataset: data.Dataset, count: int) -> data.Dataset:
    """Returns so many images from all over a data set."""
    picked = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long()
    return data.Dataset(dataset.images[picked], dataset.labels[picked], dataset.value_range)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown, the cheapest first."""
    lines = ["| data set | settings | row-steps | clean | FGSM 0.3 |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["dataset"], row["row_steps"])):
        cells = [
            f"{found['accuracy']:.3f} ({found['interval'][0]:.2f} to {found['interval'][1]:.2f})"
            for found in (row["clean"], row["fgsm"])
        ]
        lines.append(f"| {row['dataset']} | {row['name']} | {row['row_steps']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--dataset", nargs="+", default=["digits"], choices=("digits", "mnist", "fashion_mnist")
    )
    parser.add_argument(
        "--settings", nargs="+", metavar="NAME", default=list(SETTINGS), choices=list(SETTINGS)
    )
    parser.add_argument("--images", type=int, default=200, help="of each data set, spread over the split")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print what the file has")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.json.read_text())["rows"] if args.json.is_file() else []
    if args.table:
        print(table(rows))
        return
    for name in args.dataset:
        generator, classifier = weights.load_generator(name), weights.load_classifier(name)
        clean = spread(data.load(name, split=args.split), args.images)
        sets = {"clean": clean, "fgsm": transfer.attacked(classifier, clean)}
        asked = {"dataset": name, "split": args.split, "images": len(clean), "precision": args.precision}
        for setting in args.settings:
            key = {**asked, "name": setting}
            if any(key.items() <= row.items() for row in rows):
                continue
            found = measure(SETTINGS[setting], generator, classifier, sets, args.precision)
            rows.append({**key, **found})
            files.write_json(args.json, {"command": "python bench/descents.py", "rows": rows}, indent=1)
            print(f"{name}, {setting}: {found['row_steps']} row-steps", end="")
            print("".join(f", {kind} {found[kind]['accuracy']:.3f}" for kind in sets), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
