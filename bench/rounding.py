#!/usr/bin/env python3
"""How far float32 descents part from float64 ones: the kernels' and PyTorch's own, at several learning rates.

    DEFGAN_DATA=... python bench/rounding.py --dataset mnist --lr 5 10

The shipped generator descends on the first test images from the projector's own starting points. Each row of the
answer is one rate: the median over images and restarts of |loss - loss64| / loss64 after the last step, where loss64
is the loss of `reference.py` in float64. docs/numerics.md says what the answer means.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from defgan_fast import Projector, data, weights


def final_losses(
    generator: nn.Module, images: torch.Tensor, backend: str, args: argparse.Namespace, lr: float
):
    """Losses after the last step, [B, R]."""
    projector = Projector(generator, steps=args.steps, restarts=args.restarts, lr=lr, backend=backend)
    with torch.no_grad():
        return projector.project(images).all_errors.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", default="digits", choices=("digits", "mnist", "fashion_mnist"))
    parser.add_argument("--lr", type=float, nargs="+", default=[5.0, 10.0])
    parser.add_argument("--images", type=int, default=4, help="the first test images")
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    images = data.load(args.dataset, split="test").images[: args.images]
    generator = weights.load_generator(args.dataset)
    exact = copy.deepcopy(generator).double()
    print("| rate | kernels | PyTorch |\n|---|---|---|")
    for lr in args.lr:
        truth = final_losses(exact, images.double(), "reference", args, lr)
        apart = [
            ((final_losses(generator, images, backend, args, lr) - truth).abs() / truth).median().item()
            for backend in ("cpu", "reference")
        ]
        print(f"| {lr:g} | {apart[0]:.1e} | {apart[1]:.1e} |")


if __name__ == "__main__":
    main()
