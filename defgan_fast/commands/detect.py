"""``defgan-fast detect``: finds attacked images by their reconstruction error, with one threshold from clean ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defgan_fast import attacks, files
from defgan_fast.commands import _inputs, options
from defgan_fast.detector import Detector
from defgan_fast.evaluation.detection import detect
from defgan_fast.evaluation.projection import fixed_group

ATTACKS = ("fgsm", "pgd", "evade")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``detect``."""
    _inputs.add_data(parser, 50)
    _inputs.add_projector(parser)
    _inputs.add_model(parser)
    parser.add_argument(
        "--clean",
        type=Path,
        help="clean images for the threshold, as in --images (default: validation images of --dataset)",
    )
    parser.add_argument("--clean-count", type=int, default=100, help="the first so many (default: 100)")
    parser.add_argument("--fpr", type=float, default=0.05, help="false-positive rate (default: 0.05)")
    parser.add_argument(
        "--attacks",
        nargs="+",
        choices=ATTACKS,
        help="measure detection of these attacks on the images, which are then taken for clean ones: fgsm and pgd on"
        " the bare classifier, evade through the defence, knowing the threshold",
    )
    parser.add_argument("--epsilon", type=float, default=0.3, help="of --attacks, l-infinity (default: 0.3)")
    parser.add_argument("--out", type=Path, default=Path("out") / "detect", help="default: out/detect")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fits the threshold, and says which images are attacks; with ``--attacks`` also how many of these it finds."""
    options.check_writable(args.out)
    projector, found = _inputs.projector_of(args), _inputs.images_of(args)
    clean_args = argparse.Namespace(
        **{**vars(args), "images": args.clean, "labels": None, "count": args.clean_count}
    )
    clean = _inputs.images_of(clean_args, "validation")
    detector = Detector(projector).fit(clean.images, fpr=args.fpr)
    scores = torch.cat([detector.score(part) for part in found.images.split(fixed_group(projector))]).cpu()
    threshold = float(detector.threshold)
    called = ~(scores <= threshold)
    report: dict[str, Any] = {
        "threshold": threshold,
        "fpr": args.fpr,
        "clean_images": len(clean.images),
        "images": len(scores),
        "called_attacks": int(called.sum()),
        "detections": [
            {"image": name, "error": error, "attack": attack}
            for name, error, attack in zip(found.names, scores.tolist(), called.tolist(), strict=True)
        ],
    }
    print(f"threshold {threshold:.6f}: {int(called.sum())} of {len(scores)} images are called attacks")
    arrays = {"errors": scores.numpy(), "attack": called.numpy(), "names": np.array(found.names)}
    if args.attacks:
        measured = detect(detector, found.images, _attacked(args, projector, found, threshold))
        report["attacks"] = list(measured.rows)
        for name in args.attacks:
            curve = measured.roc(name)
            arrays |= {f"{name}_false_positive": curve.false_positive.numpy()}
            arrays |= {f"{name}_true_positive": curve.true_positive.numpy()}
        print("\n" + measured.markdown())
    _inputs.write_arrays(args.out / "detection.npz", arrays)
    files.write_json(args.out / "report.json", report)
    print(f"{args.out / 'detection.npz'}\n{args.out / 'report.json'}")
    return 0


def _attacked(
    args: argparse.Namespace, projector: torch.nn.Module, found: _inputs.Inputs, threshold: float
) -> dict[str, torch.Tensor]:
    """Returns attacked images by the name of the attack."""
    labels = found.needed_labels()
    classifier = _inputs.network("classifier", args.model, args.dataset).to(found.images.device)
    defended = torch.nn.Sequential(projector, classifier).eval()
    common: dict[str, Any] = {"value_range": found.value_range}
    images, epsilon, made = found.images, args.epsilon, {}
    for name in args.attacks:
        if name == "fgsm":
            made[name] = attacks.fgsm(classifier, images, labels, epsilon, **common)
        elif name == "pgd":
            made[name] = attacks.pgd(classifier, images, labels, epsilon, 40, early_stop=False, **common)
        else:
            made[name] = attacks.evade(defended, images, labels, epsilon, threshold=threshold, **common)
    return made
