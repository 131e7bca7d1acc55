"""``defgan-fast attack``: adversarial images of a classifier, with or without the defence in front of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from defgan_fast import evaluation, pictures
from defgan_fast.commands import _inputs, _threats, options
from defgan_fast.evaluation import report
from defgan_fast.evaluation.named_attacks import NAMES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``attack``."""
    parser.add_argument("--attack", choices=NAMES, default="pgd", help="default: pgd")
    _inputs.add_data(parser, 20)
    _inputs.add_projector(parser)
    _threats.add_threat(parser)
    parser.add_argument("--out", type=Path, default=Path("out") / "attack", help="default: out/attack")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Attacks, and writes ``adversarial.npz``, a picture and the report."""
    options.check_writable(args.out)
    found = _inputs.images_of(args)
    labels = found.needed_labels()
    classifier = _inputs.network("classifier", args.model, args.dataset).to(found.images.device)
    arguments = _threats.common(args, found)
    result = evaluation.evaluate(classifier, found.images, labels, attacks=(args.attack,), **arguments)
    row = result.attacked[1]
    if row.error is None:
        arrays = {
            "images": row.adversarial.cpu().numpy(),
            "labels": labels.cpu().numpy(),
            "broken": (~row.right).cpu().numpy(),
            "distances": row.distances.cpu().numpy(),
            "names": np.array(found.names),
        }
        _inputs.write_arrays(args.out / "adversarial.npz", arrays)
    picture = report.picture(result, classifier, arguments["defence"])
    pictures.save_png(picture, args.out / "attacked.png")
    print(result.markdown())
    made = ["report.json", "attacked.png"] + ["adversarial.npz"] * (row.error is None)
    print("\n".join(str(args.out / name) for name in made))
    return 0
