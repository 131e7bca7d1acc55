#!/usr/bin/env python3
"""Whole test sets through the shipped networks: accuracy on reconstructions, clean and attacked.

    DEFGAN_DATA=... python bench/whole_test_sets.py --dataset mnist --dataset fashion_mnist --json FILE

The attack is FGSM with epsilon 0.3 against the undefended classifier (paper, section 5.1). 10,000 images of MNIST take
seconds on a GPU and hours on two cores of a CPU: --images says how many of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from defgan_fast import Projector, data, files, weights
from defgan_fast.evaluation import transfer
from defgan_fast.evaluation.metrics import accuracy
from defgan_fast.evaluation.projection import project

RESTARTS = 10


def measure(name: str, steps: list[int], count: int | None, device: torch.device) -> list[dict[str, Any]]:
    """Returns one row for the classifier alone, then one for each number of steps and kind of images."""
    test = data.load(name, split="test").first(count).to(device)
    classifier = weights.load_classifier(name).to(device)
    generator = weights.load_generator(name).to(device)
    attacked = transfer.attacked(classifier, test)
    rows: list[dict[str, Any]] = [
        {
            "dataset": name,
            "images": len(test),
            "classifier_clean": accuracy(classifier, test.images, test.labels),
            "classifier_attacked": accuracy(classifier, attacked.images, attacked.labels),
        }
    ]
    print(json.dumps(rows[0]), flush=True)
    for number in steps:
        projector = Projector(generator, steps=number, restarts=RESTARTS)  # its default seed
        for kind, given in (("clean", test), ("fgsm", attacked)):
            found = transfer.defend(classifier, given, partial(project, projector))
            rows.append(
                {
                    "dataset": name,
                    "steps": number,
                    "images_are": kind,
                    "accuracy": found.accuracy_defended,
                    "mean_error": found.reconstructions.errors.mean().item(),
                    "seconds": found.seconds,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", action="append", choices=("digits", "mnist", "fashion_mnist"))
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--images", type=int, help="the first ones; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "precision": "float16" if device.type == "cuda" else "float32",  # what "auto" means
        "restarts": RESTARTS,
        "epsilon": transfer.EPSILON,
        "rows": [],
    }
    for name in args.dataset or ["digits"]:
        result["rows"] += measure(name, args.steps, args.images, device)
        if args.json:
            files.write_json(args.json, result, indent=1)


if __name__ == "__main__":
    main()
