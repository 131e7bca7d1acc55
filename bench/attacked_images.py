#!/usr/bin/env python3
"""What one generator makes of attacked images, for each rate and number of steps.

    DEFGAN_DATA=... python bench/attacked_images.py --dataset mnist --generator FILE --lr 4 10 --images 30
    DEFGAN_DATA=... python bench/attacked_images.py --dataset fashion_mnist --steps 25 50 100 200 --images 60

The first validation images are attacked by FGSM with epsilon 0.3 against the undefended classifier, and projected
with R = 10. One row each gives the classifier's accuracy on reconstructions of the clean and of the attacked images,
the mean squared distance of the attacked images' reconstructions to the attacked and to the original images, and the
area under the ROC curve of the reconstruction error as a detector.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from defgan_fast import Projector, data, weights
from defgan_fast.attacks import fgsm

EPSILON = 0.3
GROUP = 10  # images in one call, so that an interruption is heard


def project(projector: Projector, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstructions [N, C, H, W] and their errors [N]."""
    with torch.no_grad():
        parts = [projector.project(group) for group in images.split(GROUP)]
    return torch.cat([part.images for part in parts]), torch.cat([part.errors for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", default="digits", choices=("digits", "mnist", "fashion_mnist"))
    parser.add_argument("--generator", help="weight file (default: the shipped one)")
    parser.add_argument("--lr", type=float, nargs="+", default=[10.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[200])
    parser.add_argument("--images", type=int, default=30, help="the first so many of the split")
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    args = parser.parse_args()
    from sklearn.metrics import roc_auc_score

    dataset = data.load(args.dataset, split=args.split)
    images, labels = dataset.images[: args.images], dataset.labels[: args.images]
    generator = weights.load_generator(args.generator or args.dataset)
    classifier = weights.load_classifier(args.dataset).eval()
    attacked = fgsm(classifier, images, labels, EPSILON)

    @torch.no_grad()
    def accuracy(x: torch.Tensor) -> float:
        return (classifier(x).argmax(1) == labels).double().mean().item()

    print(f"{len(images)} {args.split} images, undefended: {accuracy(images):.3f} {accuracy(attacked):.3f}")
    print("| rate | steps | clean | attacked | to the attacked image | to the original | detector's area |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for lr in args.lr:
        for steps in args.steps:
            projector = Projector(generator, steps=steps, lr=lr)
            clean, clean_errors = project(projector, images)
            defended, attacked_errors = project(projector, attacked)
            scores = torch.cat((clean_errors, attacked_errors)).numpy()
            area = roc_auc_score([0] * len(images) + [1] * len(images), scores)
            distances = [(defended - other).square().mean().item() for other in (attacked, images)]
            row = [accuracy(clean), accuracy(defended), *distances, float(area)]
            cells = [f"{value:.{4 if 2 <= i <= 3 else 3}f}" for i, value in enumerate(row)]
            print(f"| {lr:g} | {steps} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
