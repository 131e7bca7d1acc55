"""``defgan-fast train gan`` and ``defgan-fast train classifier``, and where their results lie.

Both leave in their folder the weight file with its card, the checkpoint, and the metrics; ``train gan`` also
grids of samples. ``--resume`` continues an interrupted run, or prolongs a finished one.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from defgan_fast import data, pictures, weights
from defgan_fast.models.classifier import ARCHITECTURES
from defgan_fast.training import loop
from defgan_fast.training.classifier import ClassifierSettings, ClassifierTrainer, accuracy
from defgan_fast.training.wgan_gp import GanSettings, WganGp

OUT = Path("out") / "train"
GENERATOR_FILE = "generator.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"

# Where the settings of the paper do not fit: the digits' networks are half as wide, and 1,297 images need
# deformations to speak for handwriting as a whole.
GAN_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"latent_size": 64, "latent_floor": 0.125, "width": 32, "critic_width": 32, "augment": 1.0},
    "mnist": {},
    "fashion_mnist": {},
}
CLASSIFIER_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 60, "augment": 1.0, "corrupt": 1.0},
    "mnist": {},
    "fashion_mnist": {},
}

# Added to the commands that other parts of the package suggest: the paper's 200,000 steps take days on a CPU.
QUICK = {"gan": " --steps 5000 --lr 3e-4 --lr-schedule linear", "classifier": ""}


def generator_path(dataset: str) -> Path:
    """Where ``train gan`` puts the generator unless ``--out`` says otherwise."""
    return OUT / f"gan-{dataset}" / GENERATOR_FILE


def classifier_path(dataset: str) -> Path:
    """Where ``train classifier`` puts the classifier unless ``--out`` says otherwise."""
    return OUT / f"classifier-{dataset}" / CLASSIFIER_FILE


def add_parser(subparsers: Any) -> None:
    """Register ``train`` with the command line."""
    train = subparsers.add_parser("train", help="train a generator or a classifier")
    jobs = train.add_subparsers(dest="job", required=True, metavar="JOB")

    gan = jobs.add_parser("gan", help="train a generator (WGAN with gradient penalty)")
    _common(gan)
    gan.add_argument("--steps", type=int, help="generator steps (default: 200,000, the paper's)")
    gan.add_argument("--batch", type=int, help="images per batch (default: 50)")
    gan.add_argument("--critic-steps", type=int, help="critic steps per generator step (default: 5)")
    gan.add_argument("--lr", type=float, help="Adam's rate (default: 1e-4)")
    gan.add_argument("--lr-schedule", choices=("constant", "linear"), help="linear: to 0 at the last step")
    gan.add_argument("--penalty", type=float, help="weight of the gradient penalty (default: 10)")
    gan.add_argument("--latent-size", type=int, help="default: 128, digits 64")
    gan.add_argument(
        "--latent-floor", type=float, help="smallest factor of latents (default: 1, digits 0.125)"
    )
    gan.add_argument("--width", type=int, help="generator's width d (default: 64, digits 32)")
    gan.add_argument("--critic-width", type=int, help="critic's width d (default: 64, digits 32)")
    gan.add_argument("--ema", type=float, help="decay of the averaged weights (default: 0.999)")
    gan.add_argument("--augment", type=float, help="strength of deformations (default: 0, digits 1)")
    gan.add_argument("--sample-every", type=int, default=500, help="steps between sample grids; 0: none")
    gan.set_defaults(run=run_gan)

    classifier = jobs.add_parser("classifier", help="train one of the paper's classifiers")
    _common(classifier)
    classifier.add_argument("--arch", choices=ARCHITECTURES, help="architecture (default: F)")
    classifier.add_argument("--epochs", type=int, help="passes over the data (default: 10, digits 60)")
    classifier.add_argument("--batch", type=int, help="images per batch (default: 128)")
    classifier.add_argument("--lr", type=float, help="Adam's rate (default: 1e-3)")
    classifier.add_argument("--augment", type=float, help="strength of deformations (default: 0, digits 1)")
    classifier.add_argument(
        "--corrupt", type=float, help="strength of paling and noise (default: 0, digits 1)"
    )
    classifier.set_defaults(run=run_classifier)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=data.DATASETS, required=True)
    parser.add_argument(
        "--root", help="folder of the data files (default: $DEFGAN_DATA/NAME, cache, download)"
    )
    parser.add_argument("--out", type=Path, help=f"folder for the results (default: {OUT}/JOB-DATASET)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the folder")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps between checkpoints")


def _settings(cls: Any, defaults: dict[str, Any], args: argparse.Namespace) -> Any:
    """The data set's defaults, overridden by what the command line says."""
    given = {f.name: getattr(args, f.name, None) for f in fields(cls)}
    return cls(**{**defaults, **{name: value for name, value in given.items() if value is not None}})


def command(job: str, dataset: str, settings: Any) -> str:
    """The command that repeats a training, every setting spelled out."""
    words = ["defgan-fast", "train", job, "--dataset", dataset]
    for field in fields(settings):
        if field.name != "betas":
            words += [f"--{field.name.replace('_', '-')}", str(getattr(settings, field.name))]
    return shlex.join(words)


def _card(job: str, dataset: str, settings: Any, data_hash: str, device: str) -> dict[str, Any]:
    from defgan_fast._version import __version__

    return {
        "command": command(job, dataset, settings),
        "dataset": dataset,
        "data_sha256": data_hash,
        "seed": settings.seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "defgan_fast": __version__,
        "torch": torch.__version__,
    }


def run_gan(args: argparse.Namespace) -> int:
    """Train a generator; see ``defgan-fast train gan --help``."""
    settings = _settings(GanSettings, GAN_DEFAULTS[args.dataset], args)
    out = args.out or generator_path(args.dataset).parent
    dataset = data.load(args.dataset, args.root, "train")
    data_hash = data.fingerprint(dataset)
    trainer = WganGp(settings, dataset.images, data_hash, args.device)

    def save_samples(step: int) -> None:
        picture = pictures.grid(trainer.samples(), columns=8, scale=3)
        pictures.save_png(picture, out / "samples" / f"step_{step:06d}.png")

    started = time.perf_counter()
    loop.run(
        trainer,
        settings.steps,
        out,
        resume=args.resume,
        checkpoint_every=args.checkpoint_every,
        sample_every=args.sample_every,
        on_sample=save_samples,
        title=f"{args.dataset} generator",
    )
    card = _card("gan", args.dataset, settings, data_hash, args.device)
    card |= {"steps": trainer.step, "seconds_since_start": round(time.perf_counter() - started, 1)}
    weights.save(trainer.average, out / GENERATOR_FILE, card)
    print(f"{trainer.step} steps; generator in {out / GENERATOR_FILE}")
    return 0


def run_classifier(args: argparse.Namespace) -> int:
    """Train a classifier; see ``defgan-fast train classifier --help``."""
    settings = _settings(ClassifierSettings, CLASSIFIER_DEFAULTS[args.dataset], args)
    out = args.out or classifier_path(args.dataset).parent
    dataset = data.load(args.dataset, args.root, "train")
    data_hash = data.fingerprint(dataset)
    trainer = ClassifierTrainer(settings, dataset.images, dataset.labels, data_hash, args.device)
    steps = settings.steps(len(dataset.images))
    loop.run(
        trainer,
        steps,
        out,
        resume=args.resume,
        checkpoint_every=args.checkpoint_every,
        title=f"{args.dataset} classifier {settings.arch}",
    )
    validation = data.load(args.dataset, args.root, "validation")
    model = trainer.model.cpu()
    quality = {"accuracy_validation": accuracy(model, validation.images, validation.labels)}
    card = _card("classifier", args.dataset, settings, data_hash, args.device)
    weights.save(model, out / CLASSIFIER_FILE, {**card, "steps": trainer.step, "quality": quality})
    print(
        f"{trainer.step} steps; accuracy on validation images {quality['accuracy_validation']:.4f}; "
        f"classifier in {out / CLASSIFIER_FILE}"
    )
    return 0
