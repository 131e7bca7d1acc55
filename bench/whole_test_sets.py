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
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from defgan_fast import Projector, data, weights
from defgan_fast.attacks import fgsm

EPSILON = 0.3


def measure(name: str, steps: list[int], count: int | None, device: torch.device) -> list[dict[str, Any]]:
    """One row for the classifier alone, then one for each number of steps and kind of images."""
    test = data.load(name, split="test")
    images, labels = test.images[:count].to(device), test.labels[:count].to(device)
    classifier = weights.load_classifier(name).eval().to(device)
    generator = weights.load_generator(name).eval().to(device)

    @torch.no_grad()
    def accuracy(x: torch.Tensor) -> float:
        return (classifier(x).argmax(1) == labels).double().mean().item()

    attacked = fgsm(classifier, images, labels, EPSILON, test.value_range)
    rows: list[dict[str, Any]] = [
        {
            "dataset": name,
            "images": len(images),
            "classifier_clean": accuracy(images),
            "classifier_attacked": accuracy(attacked),
        }
    ]
    print(json.dumps(rows[0]), flush=True)
    for number in steps:
        projector = Projector(generator, steps=number, restarts=10)  # its default seed
        for kind, given in (("clean", images), ("fgsm", attacked)):
            start = time.perf_counter()
            with torch.no_grad():
                found = projector.project(given)
            error = found.errors.mean().item()  # waits for the device
            seconds = time.perf_counter() - start
            rows.append(
                {
                    "dataset": name,
                    "steps": number,
                    "images_are": kind,
                    "accuracy": accuracy(found.images),
                    "mean_error": error,
                    "seconds": seconds,
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
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "precision": "float16" if device.type == "cuda" else "float32",  # what "auto" means
        "restarts": 10,
        "epsilon": EPSILON,
        "rows": [],
    }
    for name in args.dataset or ["digits"]:
        result["rows"] += measure(name, args.steps, args.images, device)
        if args.json:
            partial = args.json.with_name(args.json.name + ".partial")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(args.json)


if __name__ == "__main__":
    main()
