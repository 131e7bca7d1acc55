#!/usr/bin/env python3
"""What one generator makes of attacked images, for each rate and number of steps.

    DEFGAN_DATA=... python bench/attacked_images.py --dataset mnist --generator FILE --lr 4 10 --images 30
    DEFGAN_DATA=... python bench/attacked_images.py --dataset fashion_mnist --steps 25 50 100 200 --images 60

The first validation images are attacked by FGSM with epsilon 0.3 against the undefended classifier, and projected
with R = 10. One row each gives the classifier's accuracy on reconstructions of the clean and of the attacked images,
the mean squared distance of the attacked images' reconstructions to the attacked and to the original images, and the
area under the ROC curve of the reconstruction error as a detector. The last line is without defence.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from defgan_fast import Projector, data, weights
from defgan_fast.evaluation import transfer
from defgan_fast.evaluation.metrics import auc
from defgan_fast.evaluation.projection import project


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", default="digits", choices=("digits", "mnist", "fashion_mnist"))
    parser.add_argument("--generator", help="weight file (default: the shipped one)")
    parser.add_argument("--lr", type=float, nargs="+", default=[10.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[200])
    parser.add_argument("--images", type=int, default=30, help="the first so many of the split")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    args = parser.parse_args()

    clean = data.load(args.dataset, split=args.split).first(args.images)
    generator = weights.load_generator(args.generator or args.dataset)
    classifier = weights.load_classifier(args.dataset)
    attacked = transfer.attacked(classifier, clean)
    print("| rate | steps | clean | attacked | to the attacked image | to the original | detector's area |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for lr in args.lr:
        for steps in args.steps:
            defend = partial(project, Projector(generator, steps=steps, lr=lr))
            of_clean = transfer.defend(classifier, clean, defend)
            of_attacked = transfer.defend(classifier, attacked, defend)
            made = of_attacked.reconstructions.images
            distances = [(made - other.images).square().mean().item() for other in (attacked, clean)]
            area = auc(of_clean.reconstructions.errors, of_attacked.reconstructions.errors)
            cells = [
                f"{lr:g}",
                f"{steps}",
                f"{of_clean.accuracy_defended:.3f}",
                f"{of_attacked.accuracy_defended:.3f}",
            ]
            cells += [f"{distance:.4f}" for distance in distances] + [f"{area:.3f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"undefended: {of_clean.accuracy:.3f} clean, {of_attacked.accuracy:.3f} attacked")


if __name__ == "__main__":
    main()
