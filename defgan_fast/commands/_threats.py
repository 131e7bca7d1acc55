"""The options of ``attack`` and ``evaluate``: the threat, the defence, and settings of attacks."""

from __future__ import annotations

import argparse
import ast
from typing import Any

import torch
from torch import nn

from defgan_fast import data
from defgan_fast.commands import _inputs
from defgan_fast.evaluation import Threat
from defgan_fast.evaluation.threat import GRADIENTS, NORMS, STARTS

# The paper's attacker of the black box has so many images of his own.
HELD_OUT = 150


def add_threat(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a threat and of a defence."""
    _inputs.add_model(parser)
    parser.add_argument("--norm", choices=NORMS, default="linf", help="default: linf")
    parser.add_argument("--epsilon", type=float, help="budget (default: 0.3; l2: 4)")
    parser.add_argument(
        "--gradient", choices=GRADIENTS, default="straight_through", help="default: straight_through"
    )
    parser.add_argument("--starts", choices=STARTS, default="known", help="default: known")
    parser.add_argument(
        "--eot", type=int, help="copies that attacks average over (default: 10 where starts are not known)"
    )
    parser.add_argument("--no-defence", action="store_true", help="attack the bare classifier")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="ATTACK.NAME=VALUE",
        help="a setting of an attack, such as pgd.steps=100; may be repeated",
    )


def threat_of(args: argparse.Namespace) -> Threat:
    """Returns the threat that the options describe."""
    epsilon = args.epsilon
    if epsilon is None:
        epsilon = 0.3 if args.norm == "linf" else 4.0
    return Threat(args.norm, epsilon, args.gradient, args.starts)


def settings_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the settings of attacks by name.

    Raises:
        ValueError: a setting is not of the form ATTACK.NAME=VALUE.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in args.set:
        place, equals, value = text.partition("=")
        attack, dot, name = place.partition(".")
        if not (equals and dot and attack and name):
            raise ValueError(f"--set must be ATTACK.NAME=VALUE, got {text!r}")
        try:
            found.setdefault(attack, {})[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found.setdefault(attack, {})[name] = value  # a word, such as margin
    return found


def common(args: argparse.Namespace, found: _inputs.Inputs) -> dict[str, Any]:
    """Returns the arguments of :func:`evaluation.evaluate` that the options say, apart from images and attacks."""
    defence: nn.Module | None = None if args.no_defence else _inputs.projector_of(args)
    held_out: torch.Tensor | None = None
    if args.gradient == "black_box":
        held_out = (
            data.load(args.dataset, args.root, "validation").first(HELD_OUT).images.to(found.images.device)
        )
        if held_out.shape[1:] != found.images.shape[1:]:
            raise ValueError(
                f"--dataset must have images like those of --images for --gradient black_box, got "
                f"{tuple(held_out.shape[1:])} and {tuple(found.images.shape[1:])}"
            )
    return {
        "defence": defence,
        "threat": threat_of(args),
        "settings": settings_of(args),
        "held_out": held_out,
        "eot": args.eot,
        "seed": args.seed,
        "value_range": found.value_range,
        "folder": args.out,
        "quiet": False,
    }
