"""``defgan-fast train gan|classifier|classifiers|magnet|curve|weights``: options of the trainings.

The trainings leave in their folder the weight file with its card, the checkpoint, and the metrics; ``train gan``
also grids of samples. ``--resume`` continues an interrupted run, or prolongs a finished one. ``train weights``
does what a data set needs, with its recipe, and measures the result as a defence: that is how shipped weights
are made.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from defgan_fast import data, files, precisions
from defgan_fast.commands import options
from defgan_fast.models.classifier import ARCHITECTURES, VARIANTS
from defgan_fast.paper import markdown, table5
from defgan_fast.training import curve, recipes
from defgan_fast.training.classifier import SOURCES
from defgan_fast.training.magnet import MagnetSettings
from defgan_fast.training.recipes import OUT
from defgan_fast.training.run import Run, Trained
from defgan_fast.training.selection import KEEP
from defgan_fast.training.train_classifier import Projections, train_classifier
from defgan_fast.training.train_gan import Measurements, train_gan
from defgan_fast.training.train_magnet import train_magnet
from defgan_fast.training.train_weights import Packing, train_weights
from defgan_fast.training.wgan_gp import GENERATORS, LR_SCHEDULES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the trainings, each with its arguments."""
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for add in (_add_gan, _add_classifier, _add_classifiers, _add_magnet, _add_curve, _add_weights):
        add(jobs)


def _add_gan(jobs: Any) -> None:
    gan = jobs.add_parser("gan", help="train a generator (WGAN with gradient penalty)")
    _common(gan)
    gan.add_argument("--steps", type=int, help="generator steps (default: 200,000, digits 6,000)")
    gan.add_argument("--stop-at", type=int, help="end at this step, with the schedule of --steps")
    gan.add_argument("--batch", type=int, help="images per batch (default: 50, digits 32)")
    gan.add_argument(
        "--critic-steps", type=int, help="critic steps per generator step (default: 5, digits 3)"
    )
    gan.add_argument("--lr", type=float, help="Adam's rate (default: 1e-4, digits 5e-4)")
    gan.add_argument(
        "--lr-schedule",
        choices=LR_SCHEDULES,
        help="linear: to 0 at the last step; hold: the same from half-way on (default: constant, digits linear)",
    )
    gan.add_argument("--penalty", type=float, help="weight of the gradient penalty (default: 10)")
    gan.add_argument("--latent-size", type=int, help="default: 128, digits 64")
    gan.add_argument(
        "--latent-floor", type=float, help="smallest factor of latents (default: 1, digits 0.125)"
    )
    gan.add_argument("--width", type=int, help="generator's width d (default: 64, digits 32)")
    gan.add_argument("--critic-width", type=int, help="critic's width d (default: 64, digits 32)")
    gan.add_argument("--ema", type=float, help="decay of the averaged weights (default: 0.999)")
    gan.add_argument("--augment", type=float, help="strength of deformations (default: 0, digits 1)")
    gan.add_argument("--model", choices=GENERATORS, help="generator's class (default: by data set)")
    gan.add_argument(
        "--batch-norm", action=argparse.BooleanOptionalAction, default=None, help="CelebaGenerator's"
    )
    gan.add_argument("--precision", choices=precisions.ON_CPU, help="of the convolutions (default: float32)")
    gan.add_argument(
        "--accumulate", type=int, help="parts that a batch is computed in, to save memory (default: 1)"
    )
    gan.add_argument(
        "--compile",
        action="store_true",
        help="compile both passes; on a GPU as CUDA graphs, without which small batches wait for launches",
    )
    gan.add_argument("--sample-every", type=int, default=500, help="steps between sample grids; 0: none")
    gan.add_argument(
        "--evaluate-every",
        type=int,
        default=0,
        help="steps between measurements of the reconstruction error on validation images; the best average "
        "is saved, not the last (default: 0, none)",
    )
    gan.add_argument("--evaluate-images", type=int, default=100, help="default: 100")
    gan.add_argument("--evaluate-steps", type=int, default=200, help="L of a measurement (default: 200)")
    gan.add_argument("--evaluate-restarts", type=int, default=10, help="R of a measurement (default: 10)")
    gan.add_argument(
        "--classifier",
        type=Path,
        help="weight file of the measurements' classifier (default: the shipped one)",
    )
    gan.add_argument(
        "--calibrate",
        type=int,
        default=0,
        metavar="N",
        help="at the end, choose the unit of the latents with the least reconstruction error of N validation "
        "images (default: 0, leave it)",
    )
    gan.set_defaults(run=run_gan)


def _add_classifier(jobs: Any) -> None:
    classifier = jobs.add_parser("classifier", help="train one of the paper's classifiers")
    _common(classifier)
    classifier.add_argument("--arch", choices=ARCHITECTURES, help="architecture (default: F)")
    classifier.add_argument(
        "--variant",
        choices=VARIANTS,
        help="networks of the paper's table or of the released code (default: paper)",
    )
    classifier.add_argument("--epochs", type=int, help="passes over the data (default: 10, digits 80)")
    classifier.add_argument("--batch", type=int, help="images per batch (default: 128)")
    classifier.add_argument("--lr", type=float, help="Adam's rate (default: 1e-3)")
    classifier.add_argument("--augment", type=float, help="strength of deformations (default: 0, digits 1)")
    classifier.add_argument(
        "--corrupt", type=float, help="strength of paling and noise (default: 0, digits 1.5)"
    )
    classifier.add_argument("--adversarial", type=float, help="train on FGSM examples of this epsilon, too")
    classifier.add_argument(
        "--adversarial-steps", type=int, help="above 1: on PGD examples of so many steps instead (default: 1)"
    )
    classifier.add_argument(
        "--ema", type=float, help="decay of averaged weights, which are then saved (default: 0, none)"
    )
    classifier.add_argument(
        "--on",
        choices=SOURCES,
        help="train on images (Defense-GAN-Orig), their reconstructions (-Rec), or both (default: images)",
    )
    classifier.add_argument("--generator", type=Path, help="weight file for --on (default: the shipped one)")
    classifier.add_argument("--projection-steps", type=int, default=200, help="L for --on (default: 200)")
    classifier.add_argument("--restarts", type=int, default=10, help="R for --on (default: 10)")
    classifier.add_argument(
        "--cache",
        type=Path,
        default=recipes.RECONSTRUCTIONS,
        help="folder of reconstructions, computed once (default: out/reconstructions)",
    )
    classifier.add_argument(
        "--keep",
        choices=KEEP,
        default=KEEP[0],
        help="weights of the last epoch, or of the one with the highest accuracy on validation images "
        "(default: last)",
    )
    classifier.set_defaults(run=run_classifier)


def _add_classifiers(jobs: Any) -> None:
    parser = jobs.add_parser("classifiers", help="train classifiers A to F and compare them with the paper")
    parser.add_argument("--dataset", choices=tuple(table5.PAPER), nargs="+", default=list(table5.PAPER))
    parser.add_argument("--arch", choices=ARCHITECTURES, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        default="paper",
        help="networks of the paper's table or of the released code (default: paper)",
    )
    parser.add_argument(
        "--keep",
        choices=KEEP,
        default=KEEP[0],
        help=f"epoch of each, as in train classifier (default: {KEEP[0]})",
    )
    parser.add_argument(
        "--ema",
        type=float,
        default=0.0,
        help="decay of averaged weights, as in train classifier; rows of their own (default: 0, none)",
    )
    parser.add_argument("--work", type=Path, default=OUT, help="default: out/train")
    parser.add_argument("--json", type=Path, default=Path("classifiers.json"), help="results, extended")
    parser.add_argument("--markdown", type=Path, help="file whose table is written anew")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    options.add_root(parser)
    parser.set_defaults(run=run_classifiers)


def _add_magnet(jobs: Any) -> None:
    magnet = jobs.add_parser("magnet", help="train a collection of MagNet's autoencoders")
    _common(magnet)
    magnet.add_argument("--members", type=int, default=1, help="autoencoders, with seeds from --seed on")
    magnet.add_argument("--epochs", type=int, help="passes over the data (default: 100)")
    magnet.add_argument("--batch", type=int, help="images per batch (default: 256)")
    magnet.add_argument("--lr", type=float, help="Adam's rate (default: 1e-3)")
    magnet.add_argument("--noise", type=float, help="standard deviation of the noise (default: 0.1)")
    magnet.add_argument("--code-size", type=int, help="default: 128")
    magnet.add_argument("--width", type=int, help="width d (default: 64)")
    magnet.set_defaults(run=run_magnet)


def _add_curve(jobs: Any) -> None:
    plot = jobs.add_parser("curve", help="plot reconstruction error and accuracy against steps")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of train gan")
    plot.add_argument("--names", nargs="+", help="titles (default: the folders' names)")
    plot.add_argument("--out", type=Path, default=Path("curve.png"), help="PNG (default: curve.png)")
    plot.set_defaults(run=run_curve)


def _add_weights(jobs: Any) -> None:
    both = jobs.add_parser("weights", help="train generator and classifier, and measure them as a defence")
    both.add_argument("--dataset", choices=tuple(recipes.SHIPPED), default="digits")
    options.add_root(both)
    both.add_argument("--work", type=Path, default=OUT, help=f"folder for both trainings (default: {OUT})")
    both.add_argument(
        "--out", type=Path, default=OUT, help="folder for DATASET_generator.safetensors and so on"
    )
    both.add_argument("--images", type=int, default=100, help="validation images (default: 100)")
    both.add_argument("--images-attacked", type=int, default=100, help="test images (default: 100)")
    both.add_argument("--images-test", type=int, default=1000, help="clean test images (default: 1000)")
    both.add_argument("--resume", action="store_true", help="continue from the checkpoints in the folder")
    both.set_defaults(run=run_weights)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=data.DATASETS, required=True)
    options.add_root(parser)
    parser.add_argument("--out", type=Path, help=f"folder for the results (default: {OUT}/JOB-DATASET)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the folder")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps between checkpoints")


def _run(args: argparse.Namespace) -> Run:
    """Returns what the options of every training say."""
    return Run(
        args.dataset,
        args.out or recipes.folder(args.job, args.dataset),
        args.root,
        args.resume,
        options.parse_device(args.device),
        args.threads,
        args.checkpoint_every,
    )


def _settings(defaults: Any, args: argparse.Namespace) -> Any:
    """Returns the data set's settings, overridden by what the command line says."""
    given = {field.name: getattr(args, field.name, None) for field in fields(defaults)}
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _tell(trained: Trained | None) -> int:
    """Prints what was done, in the process that did it for all, and returns the exit status."""
    for line in trained.summary if trained else ():
        print(line)
    return 0


def run_gan(args: argparse.Namespace) -> int:
    """Trains a generator; see ``defgan-fast train gan --help``."""
    measurements = Measurements(
        args.evaluate_every,
        args.evaluate_images,
        args.evaluate_steps,
        args.evaluate_restarts,
        args.classifier,
    )
    return _tell(
        train_gan(
            _settings(recipes.GAN[args.dataset], args),
            _run(args),
            measurements=measurements,
            stop_at=args.stop_at,
            sample_every=args.sample_every,
            calibrate=args.calibrate,
            compiled=args.compile,
        )
    )


def run_classifier(args: argparse.Namespace) -> int:
    """Trains a classifier; see ``defgan-fast train classifier --help``."""
    settings = _settings(recipes.CLASSIFIER[args.dataset], args)
    projections = Projections(args.generator, args.projection_steps, args.restarts, args.cache)
    return _tell(train_classifier(settings, _run(args), projections=projections, keep=args.keep))


def run_classifiers(args: argparse.Namespace) -> int:
    """Trains and measures table 5; see ``defgan-fast train classifiers --help``."""
    lines = table5.train_and_measure(
        args.arch,
        args.dataset,
        variant=args.variant,
        ema=args.ema,
        keep=args.keep,
        work=args.work,
        results=args.json,
        root=args.root,
        threads=args.threads,
    )
    for line in lines:
        print(line)
    if args.markdown:
        document = args.markdown.read_text()
        text = markdown.insert(document, line, table5.BEGIN, table5.END)
        files.write_atomically(args.markdown, text.encode())
    return 0


def run_magnet(args: argparse.Namespace) -> int:
    """Trains MagNet's autoencoders; see ``defgan-fast train magnet --help``."""
    for trained in train_magnet(_settings(MagnetSettings(), args), _run(args), members=args.members):
        _tell(trained)
    return 0


def run_curve(args: argparse.Namespace) -> int:
    """Plots; see ``defgan-fast train curve --help``."""
    names = args.names or [run.name for run in args.runs]
    if len(names) != len(args.runs):
        raise ValueError(
            f"--names must have one name for each of the {len(args.runs)} runs, got {len(names)}"
        )
    curve.plot(args.runs, names, args.out)
    print(args.out)
    return 0


def run_weights(args: argparse.Namespace) -> int:
    """Trains and measures what ships; see ``defgan-fast train weights --help``."""
    packing = Packing(
        args.out, args.images, args.images_attacked, args.images_test, args.work / "reconstructions"
    )
    recipe = recipes.SHIPPED[args.dataset]
    lines = train_weights(recipe, args.dataset, args.work, packing, root=args.root, resume=args.resume)
    for line in lines:
        print(line, flush=True)
    return 0
