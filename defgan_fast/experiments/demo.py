"""``defgan-fast demo``: attack a classifier, defend it by projection, and attack the defence itself.

On the first test images of a data set it measures accuracy clean and under FGSM, each with and without
Defense-GAN, then under PGD through the straight-through gradient of the whole defence, and how well the
reconstruction error tells attacked from clean images. It leaves a picture and a report. The numbers depend on
nothing but the weights and the options: a second run prints the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

from defgan_fast import data, files, pictures, progress, weights
from defgan_fast import device as devices
from defgan_fast.attacks import fgsm, pgd
from defgan_fast.training import cli as training
from defgan_fast.training.classifier import accuracy, predict

if TYPE_CHECKING:
    from defgan_fast.projector import Projector

EPSILON = 0.3
ADAPTIVE_STEPS = 10
# Every step of the adaptive attack is a whole projection, four times as long for a generator twice as wide.
IMAGES_ADAPTIVE = {"digits": 20, "mnist": 5, "fashion_mnist": 5}
# Steps x restarts x parameters x images of one call, about a second on two cores: short enough for a progress
# bar that moves and an interruption that is heard. Not measured as it goes: the classifier's last bits depend
# on its batch, and the numbers must not depend on how busy the machine is.
WORK_PER_CALL = 3.5e9
LARGEST_GROUP = 64
COLUMNS = 12
NAME_WIDTH = 36
GOOD, BAD, INK, PAPER = (0, 125, 60), (200, 30, 30), (40, 40, 40), (250, 250, 248)


class Reconstructions(NamedTuple):
    """What the projections of a set of images came to."""

    images: torch.Tensor  # [N, C, H, W]
    errors: torch.Tensor  # [N] float32


def add_parser(subparsers: Any) -> None:
    """Register ``demo`` with the command line."""
    parser = subparsers.add_parser("demo", help="defend real images against FGSM and an adaptive attack")
    parser.add_argument("--dataset", choices=tuple(IMAGES_ADAPTIVE), default="digits")
    parser.add_argument(
        "--root", help="folder of the data files (default: $DEFGAN_DATA/NAME, cache, download)"
    )
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
    """Run the demonstration; see ``defgan-fast demo --help``."""
    # The compiled op is loaded only once it is known to be needed.
    from defgan_fast.projector import Projector

    adaptive = IMAGES_ADAPTIVE[args.dataset] if args.images_adaptive is None else args.images_adaptive
    for name, value in (("images", args.images), ("images-adaptive", adaptive)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    device = devices.parse(args.device)
    _check_writable(args.out)
    generator = _weights("generator", args.dataset, args.generator).to(device)
    classifier = _weights("classifier", args.dataset, args.classifier).to(device)
    dataset = data.load(args.dataset, args.root, "test").first(args.images).to(device)
    images, labels = dataset
    adaptive = min(adaptive, len(images))
    projector = Projector(
        generator, steps=args.steps, restarts=args.restarts, seed=args.seed, backend=args.backend
    )

    attacked = fgsm(classifier, images, labels, EPSILON, dataset.value_range)
    total = 2 * len(images) + adaptive * (ADAPTIVE_STEPS + 2)  # PGD looks at its last point, too
    with progress.bar(total, "projections", "image") as bar:
        started = time.perf_counter()
        work = _Work(projector, bar)
        clean_defended = work.project(images)
        attacked_defended = work.project(attacked)
        seconds = (time.perf_counter() - started) / (2 * len(images))
        broken = work.attack(classifier, images[:adaptive], labels[:adaptive])
        broken_defended = work.project(broken)

    report = {
        "dataset": args.dataset,
        "images": len(images),
        "images_adaptive": adaptive,
        "steps": args.steps,
        "restarts": args.restarts,
        "backend": projector.backend_for(images),
        "precision": projector.precision_for(images),
        "accuracy_clean": accuracy(classifier, images, labels),
        "accuracy_clean_defended": accuracy(classifier, clean_defended.images, labels),
        "accuracy_attacked": accuracy(classifier, attacked, labels),
        "accuracy_attacked_defended": accuracy(classifier, attacked_defended.images, labels),
        "accuracy_adaptive_defended": accuracy(classifier, broken_defended.images, labels[:adaptive]),
        "auc_detection": _auc(clean_defended.errors, attacked_defended.errors),
        "seconds_per_image": round(seconds, 4),
    }
    rows = {
        "original": images[:COLUMNS],
        "FGSM": attacked[:COLUMNS],
        "reconstruction": attacked_defended.images[:COLUMNS],
    }
    pictures.save_png(_draw(rows, classifier, labels), args.out / "demo.png")
    files.write_atomically(args.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    print(_table(report))
    print(f"\n{args.out / 'demo.png'}\n{args.out / 'report.json'}")
    return 0


class _Work:
    """Cuts projections and attacks into short calls of a fixed number of images, and moves the bar."""

    def __init__(self, projector: Projector, bar: tqdm) -> None:
        self.projector, self.bar = projector, bar
        parameters = sum(p.numel() for p in projector.generator.parameters())
        work = projector.steps * projector.restarts * parameters
        self.group = min(max(int(WORK_PER_CALL / work), 1), LARGEST_GROUP)

    def project(self, images: torch.Tensor) -> Reconstructions:
        """Project [N, C, H, W]."""
        parts = []
        for group in images.split(self.group):
            with torch.no_grad():
                result = self.projector.project(group)
            parts.append(Reconstructions(result.images, result.errors))
            self.bar.update(len(group))
        return Reconstructions(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def attack(self, classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """PGD through projector and classifier, [N, C, H, W] -> the same."""
        defended = nn.Sequential(self.projector, classifier).eval()
        parts = []
        for group, truth in zip(images.split(self.group), labels.split(self.group), strict=True):

            def moved(done: int, total: int, before: int = self.bar.n) -> None:
                self.bar.update(before + done - self.bar.n)

            parts.append(pgd(defended, group, truth, EPSILON, ADAPTIVE_STEPS, progress=moved))
        return torch.cat(parts)


def _check_writable(folder: Path) -> None:
    """Fail before the work and not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--out must be a folder that can be written, got {folder} ({error.strerror})"
        ) from None


def _weights(kind: str, dataset: str, given: Path | None) -> nn.Module:
    """The generator or classifier: the file that was asked for, the shipped one, or the one trained here."""
    load = weights.load_generator if kind == "generator" else weights.load_classifier
    if given is not None:
        return load(given)
    if dataset in weights.shipped(kind):
        return load(dataset)
    trained = training.generator_path(dataset) if kind == "generator" else training.classifier_path(dataset)
    if trained.is_file():
        return load(trained)
    job = "gan" if kind == "generator" else "classifier"
    raise FileNotFoundError(
        f"no {kind} for {dataset} at hand (none is shipped, no such file: {trained}); train one with: "
        f"defgan-fast train {job} --dataset {dataset}{training.QUICK[job]}, or give one with --{kind} FILE"
    )


def _auc(clean: torch.Tensor, attacked: torch.Tensor) -> float:
    """Area under the ROC curve of the reconstruction error as a detector (paper, section 4.1.3)."""
    from sklearn.metrics import roc_auc_score

    truth = [0] * len(clean) + [1] * len(attacked)
    return float(roc_auc_score(truth, torch.cat((clean, attacked)).double().cpu().numpy()))


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
            f"FGSM, epsilon {EPSILON}",
            report["images"],
            report["accuracy_attacked"],
            report["accuracy_attacked_defended"],
        ),
        row(
            f"PGD through the defence, {ADAPTIVE_STEPS} steps",
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


def _draw(rows: dict[str, torch.Tensor], classifier: nn.Module, labels: torch.Tensor) -> Image.Image:
    """Rows of images; under each the class that the classifier sees, red where it is wrong."""
    scale, gap, margin = 3, 10, 150
    font, small = ImageFont.load_default(size=18), ImageFont.load_default(size=15)
    first = next(iter(rows.values()))
    cell_w, cell_h = first.shape[3] * scale, first.shape[2] * scale
    line = cell_h + 24 + gap
    canvas = Image.new("RGB", (margin + len(first) * (cell_w + gap) + gap, gap + len(rows) * line), PAPER)
    draw = ImageDraw.Draw(canvas)
    for r, (name, images) in enumerate(rows.items()):
        top = gap + r * line
        draw.text((margin - 14, top + cell_h // 2), name, INK, font, anchor="rm")
        seen = predict(classifier.eval(), images).tolist()
        for c, pixels in enumerate(pictures.to_pixels(images)):
            left = margin + c * (cell_w + gap)
            picture = Image.fromarray(pixels.contiguous().numpy())
            canvas.paste(picture.resize((cell_w, cell_h), Image.Resampling.NEAREST), (left, top))
            colour = GOOD if seen[c] == int(labels[c]) else BAD
            draw.text((left + cell_w // 2, top + cell_h + 12), str(seen[c]), colour, small, anchor="mm")
    return canvas
