"""``defgan-fast tune``: finds the rate, the starting points and the steps that suit a generator."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from defgan_fast import Projector, data
from defgan_fast.commands import options

DATASETS = ("digits", "mnist", "fashion_mnist")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``tune``."""
    parser.add_argument(
        "--generator",
        help="module:factory, a function of yours without arguments, or a weight file (default: the shipped one)",
    )
    parser.add_argument("--dataset", choices=DATASETS, help="take its validation images")
    parser.add_argument("--images", type=Path, help="clean images [N, C, H, W] in a .npy or .pt file instead")
    parser.add_argument(
        "--budget", type=int, default=150_000, help="row-steps of all trials (default: %(default)s)"
    )
    parser.add_argument("--latent-size", type=int, help="k, for a generator that does not tell it")
    parser.add_argument("--backend", default="auto", choices=("auto", "cpu", "cuda", "reference"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: cpu)")
    parser.add_argument("--seed", type=int, default=0)
    options.add_root(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table of trials on stderr, and the settings as Python on stdout."""
    device = options.parse_device(args.device)
    if args.generator is None and args.dataset is None:
        raise ValueError("--generator or --dataset must be given")
    if args.images is None and args.dataset is None:
        raise ValueError("--images or --dataset must be given, which say what the generator should make")
    generator = options.load_generator(args.generator or args.dataset).to(device)
    if args.images is not None:
        images = load_images(args.images)
    else:
        images = data.load(args.dataset, args.root, split="validation").images
    fixed = {} if args.latent_size is None else {"latent_size": args.latent_size}
    if args.backend != "auto":
        fixed["backend"] = args.backend
    settings = Projector.tune(generator, images.to(device), budget=args.budget, seed=args.seed, **fixed)
    words = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    print(f"Projector(generator, {words})")
    return 0


def load_images(path: Path) -> torch.Tensor:
    """Returns the images of a file, as floating-point numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .npy or .pt file of one array or tensor.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"--images must be a .npy or .pt file, got {path} ({error})") from None
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"--images must hold one tensor, got {type(found).__name__}")
    if not found.is_floating_point():
        raise ValueError(
            f"--images must hold floating-point pixels in the generator's range, got {found.dtype}"
        )
    return found.float() if found.dtype == torch.float64 else found
