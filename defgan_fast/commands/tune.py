"""``defgan-fast tune``: finds the rate, the starting points and the steps that suit a generator."""

from __future__ import annotations

import argparse
from typing import Any

from defgan_fast import Projector
from defgan_fast.commands import _inputs, options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``tune``."""
    _inputs.add_data(parser, 1000)
    parser.set_defaults(dataset=None)
    parser.add_argument(
        "--generator",
        help="module:factory, a function of yours without arguments, or a weight file (default: the one that is "
        "shipped for --dataset)",
    )
    parser.add_argument(
        "--budget", type=int, default=150_000, help="row-steps of all trials (default: %(default)s)"
    )
    parser.add_argument("--latent-size", type=int, help="k, for a generator that does not tell it")
    parser.add_argument("--backend", default="auto", choices=("auto", "cpu", "cuda", "reference"))
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table of trials on stderr, and the settings as Python on stdout."""
    if args.generator is None and args.dataset is None:
        raise ValueError("--generator or --dataset must be given")
    if args.images is None and args.dataset is None:
        raise ValueError("--images or --dataset must be given, which say what the generator should make")
    generator = _inputs.network("generator", args.generator, args.dataset)
    if args.dataset is None and args.value_range is None:
        args.value_range = getattr(generator, "value_range", (0.0, 1.0))
    images = _inputs.images_of(args, split="validation").images
    fixed: dict[str, Any] = {} if args.latent_size is None else {"latent_size": args.latent_size}
    if args.backend != "auto":
        fixed["backend"] = args.backend
    generator = generator.to(options.parse_device(args.device))
    settings = Projector.tune(generator, images, budget=args.budget, seed=args.seed, **fixed)
    words = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    print(f"Projector(generator, {words})")
    return 0
