"""``defgan-fast demo``: attack a classifier, defend it by projection, and attack the defence itself.

On the first test images of a data set it measures accuracy clean and under FGSM, each with and without
Defense-GAN, then under PGD through the straight-through gradient of the whole defence, and how well the
reconstruction error tells attacked from clean images. It leaves a picture and a report. The numbers depend on
nothing but the weights and the options: a second run prints the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defgan_fast import data, files, pictures
from defgan_fast.commands import options
from defgan_fast.evaluation import demonstration, transfer
from defgan_fast.evaluation.metrics import predict
from defgan_fast.projector import Projector

# Every step of the adaptive attack is a whole projection, four times as long for a generator twice as wide.
IMAGES_ADAPTIVE = {"digits": 20, "mnist": 5, "fashion_mnist": 5}
COLUMNS = 12
NAME_WIDTH = 36


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``demo``."""
    parser.add_argument("--dataset", choices=tuple(IMAGES_ADAPTIVE), default="digits")
    options.add_root(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("out") / "demo", help="folder for picture and report"
    )
    parser.add_argument("--generator", type=Path, help="weight file (default: shipped, else trained here)")
    parser.add_argument("--classifier", type=Path, help="weight file (default: shipped, else trained here)")
    parser.add_argument("--images", type=int, default=100, help="number of test images (default: 100)")
    parser.add_argument(
        "--images-adaptive", type=int, help="images for the adaptive attack (default: 20; 5 for MNIST sets)"
    )
    parser.add_argument("--steps", type=int, default=200, help="L, steps of a projection (default: 200)")
    parser.add_argument("--restarts", type=int, default=10, help="R, starting points (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the starting points (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda", "reference"), default="auto")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the demonstration; see ``defgan-fast demo --help``."""
    adaptive = IMAGES_ADAPTIVE[args.dataset] if args.images_adaptive is None else args.images_adaptive
    for name, value in (("images", args.images), ("images-adaptive", adaptive)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    device = options.parse_device(args.device)
    options.check_writable(args.out)
    generator = options.load_network("generator", args.dataset, args.generator).to(device)
    classifier = options.load_network("classifier", args.dataset, args.classifier).to(device)
    dataset = data.load(args.dataset, args.root, "test").first(args.images).to(device)
    projector = Projector(
        generator, steps=args.steps, restarts=args.restarts, seed=args.seed, backend=args.backend
    )
    found = demonstration.demonstrate(projector, classifier, dataset, adaptive)
    report = {"dataset": args.dataset, **found.figures}
    rows = {
        "original": dataset.images[:COLUMNS],
        "FGSM": found.attacked[:COLUMNS],
        "reconstruction": found.reconstructions[:COLUMNS],
    }
    picture = pictures.labelled_rows(rows, _captions(rows, classifier, dataset.labels), dataset.value_range)
    pictures.save_png(picture, args.out / "demo.png")
    files.write_json(args.out / "report.json", report)
    print(_table(report))
    print(f"\n{args.out / 'demo.png'}\n{args.out / 'report.json'}")
    return 0


def _table(report: dict[str, Any]) -> str:
    def row(name: str, images: int, undefended: float | None, defended: float) -> str:
        left = f"{undefended:>12.3f}" if undefended is not None else f"{'':>12}"
        return f"{name:<{NAME_WIDTH}}{images:>7}{left}{defended:>10.3f}"

    lines = [
        f"Defense-GAN on {report['dataset']}: L = {report['steps']}, R = {report['restarts']}",
        "",
        f"{'accuracy':<{NAME_WIDTH}}{'images':>7}{'undefended':>12}{'defended':>10}",
        row("clean", report["images"], report["accuracy_clean"], report["accuracy_clean_defended"]),
        row(
            f"FGSM, epsilon {transfer.EPSILON}",
            report["images"],
            report["accuracy_attacked"],
            report["accuracy_attacked_defended"],
        ),
        row(
            f"PGD through the defence, {demonstration.ADAPTIVE_STEPS} steps",
            report["images_adaptive"],
            None,
            report["accuracy_adaptive_defended"],
        ),
        "",
        f"detection of FGSM by reconstruction error: AUC {report['auc_detection']:.3f}",
        f"{report['seconds_per_image']:.3f} seconds per image; backend {report['backend']}, "
        f"{report['precision']}",
    ]
    return "\n".join(lines)


def _captions(
    rows: dict[str, torch.Tensor], classifier: nn.Module, labels: torch.Tensor
) -> dict[str, list[tuple[str, bool]]]:
    """Returns the class that the classifier sees in each image, and whether it is the right one."""
    classifier.eval()
    return {
        name: [
            (str(seen), seen == int(truth))
            for seen, truth in zip(predict(classifier, images).tolist(), labels, strict=False)
        ]
        for name, images in rows.items()
    }
