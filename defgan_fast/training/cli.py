"""``defgan-fast train gan|classifier|weights``, and where their results lie.

The first two leave in their folder the weight file with its card, the checkpoint, and the metrics; ``train gan``
also grids of samples. ``--resume`` continues an interrupted run, or prolongs a finished one. ``train weights``
does both with the data set's defaults and measures the result as a defence: that is how shipped weights are made.
"""

from __future__ import annotations

import argparse
import platform
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from defgan_fast import data, pictures, weights
from defgan_fast import device as devices
from defgan_fast.models.classifier import ARCHITECTURES
from defgan_fast.training import loop, quality
from defgan_fast.training.classifier import ClassifierSettings, ClassifierTrainer, accuracy
from defgan_fast.training.wgan_gp import GanSettings, WganGp

OUT = Path("out") / "train"
GENERATOR_FILE = "generator.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"

# Where the settings of the paper do not fit: the digits' networks are half as wide, 1,297 images need
# deformations to speak for handwriting as a whole, and the schedule is one for an hour of one CPU core.
GAN_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "steps": 6000,
        "batch": 32,
        "critic_steps": 3,
        "lr": 5e-4,
        "lr_schedule": "linear",
        "latent_size": 64,
        "latent_floor": 0.125,
        "width": 32,
        "critic_width": 32,
        "augment": 1.0,
    },
    "mnist": {},
    "fashion_mnist": {},
}
CLASSIFIER_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 80, "augment": 1.0, "corrupt": 1.5},
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
    gan.add_argument("--steps", type=int, help="generator steps (default: 200,000, digits 6,000)")
    gan.add_argument("--stop-at", type=int, help="end at this step, with the schedule of --steps")
    gan.add_argument("--batch", type=int, help="images per batch (default: 50, digits 32)")
    gan.add_argument(
        "--critic-steps", type=int, help="critic steps per generator step (default: 5, digits 3)"
    )
    gan.add_argument("--lr", type=float, help="Adam's rate (default: 1e-4, digits 5e-4)")
    gan.add_argument(
        "--lr-schedule",
        choices=("constant", "linear", "hold"),
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
    gan.add_argument("--sample-every", type=int, default=500, help="steps between sample grids; 0: none")
    gan.set_defaults(run=run_gan)

    classifier = jobs.add_parser("classifier", help="train one of the paper's classifiers")
    _common(classifier)
    classifier.add_argument("--arch", choices=ARCHITECTURES, help="architecture (default: F)")
    classifier.add_argument("--epochs", type=int, help="passes over the data (default: 10, digits 80)")
    classifier.add_argument("--batch", type=int, help="images per batch (default: 128)")
    classifier.add_argument("--lr", type=float, help="Adam's rate (default: 1e-3)")
    classifier.add_argument("--augment", type=float, help="strength of deformations (default: 0, digits 1)")
    classifier.add_argument(
        "--corrupt", type=float, help="strength of paling and noise (default: 0, digits 1.5)"
    )
    classifier.set_defaults(run=run_classifier)

    both = jobs.add_parser("weights", help="train generator and classifier, and measure them as a defence")
    both.add_argument("--dataset", choices=data.DATASETS, default="digits")
    both.add_argument("--root", help="folder of the data files (default: $DEFGAN_DATA/NAME, cache, download)")
    both.add_argument("--work", type=Path, default=OUT, help=f"folder for both trainings (default: {OUT})")
    both.add_argument(
        "--out", type=Path, default=OUT, help="folder for DATASET_generator.safetensors and so on"
    )
    both.add_argument(
        "--images", type=int, default=100, help="images that quality is measured on (default: 100)"
    )
    both.add_argument("--resume", action="store_true", help="continue from the checkpoints in the folder")
    both.set_defaults(run=run_weights)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=data.DATASETS, required=True)
    parser.add_argument(
        "--root", help="folder of the data files (default: $DEFGAN_DATA/NAME, cache, download)"
    )
    parser.add_argument("--out", type=Path, help=f"folder for the results (default: {OUT}/JOB-DATASET)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in the folder")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="steps between checkpoints")


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


def _settings(cls: Any, defaults: dict[str, Any], args: argparse.Namespace) -> Any:
    """The data set's defaults, overridden by what the command line says."""
    given = {f.name: getattr(args, f.name, None) for f in fields(cls)}
    return cls(**{**defaults, **{name: value for name, value in given.items() if value is not None}})


def command(job: str, dataset: str, settings: Any, *more: str) -> str:
    """The command that repeats a training, every setting spelled out, with ``more`` words of its own."""
    words = ["defgan-fast", "train", job, "--dataset", dataset, *more]
    for field in fields(settings):
        if field.name != "betas":
            words += [f"--{field.name.replace('_', '-')}", str(getattr(settings, field.name))]
    words += ["--threads", str(torch.get_num_threads())]
    return shlex.join(words)


def _card(
    job: str, dataset: str, settings: Any, data_hash: str, device: torch.device, *more: str
) -> dict[str, Any]:
    from defgan_fast._version import __version__

    return {
        "command": command(job, dataset, settings, *more),
        "dataset": dataset,
        "data_sha256": data_hash,
        "seed": settings.seed,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "defgan_fast": __version__,
        "torch": torch.__version__,
    }


def run_gan(args: argparse.Namespace) -> int:
    """Train a generator; see ``defgan-fast train gan --help``."""
    settings = _settings(GanSettings, GAN_DEFAULTS[args.dataset], args)
    _use_threads(args.threads)
    device = devices.parse(args.device)
    out = args.out or generator_path(args.dataset).parent
    dataset = data.load(args.dataset, args.root, "train")
    data_hash = data.fingerprint(dataset)
    trainer = WganGp(settings, dataset.images, data_hash, device)

    def save_samples(step: int) -> None:
        picture = pictures.grid(trainer.samples(), columns=8, scale=3)
        pictures.save_png(picture, out / "samples" / f"step_{step:06d}.png")
        weights.save(trainer.average, out / "averages" / f"step_{step:06d}.safetensors", {"steps": step})

    loop.run(
        trainer,
        min(settings.steps, args.stop_at or settings.steps),
        out,
        resume=args.resume,
        checkpoint_every=args.checkpoint_every,
        sample_every=args.sample_every,
        on_sample=save_samples,
        title=f"{args.dataset} generator",
    )
    more = ["--stop-at", str(trainer.step)] if trainer.step < settings.steps else []
    card = _card("gan", args.dataset, settings, data_hash, device, *more)
    weights.save(trainer.average, out / GENERATOR_FILE, {**card, "steps": trainer.step})
    print(f"{trainer.step} steps; generator in {out / GENERATOR_FILE}")
    return 0


def run_classifier(args: argparse.Namespace) -> int:
    """Train a classifier; see ``defgan-fast train classifier --help``."""
    settings = _settings(ClassifierSettings, CLASSIFIER_DEFAULTS[args.dataset], args)
    _use_threads(args.threads)
    device = devices.parse(args.device)
    out = args.out or classifier_path(args.dataset).parent
    dataset = data.load(args.dataset, args.root, "train")
    data_hash = data.fingerprint(dataset)
    trainer = ClassifierTrainer(settings, dataset.images, dataset.labels, data_hash, device)
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
    found = accuracy(model, validation.images, validation.labels)
    card = _card("classifier", args.dataset, settings, data_hash, device)
    card |= {"steps": trainer.step, "quality": {"accuracy_validation": found}}
    weights.save(model, out / CLASSIFIER_FILE, card)
    print(
        f"{trainer.step} steps; accuracy on validation images {found:.4f}; "
        f"classifier in {out / CLASSIFIER_FILE}"
    )
    return 0


def run_weights(args: argparse.Namespace) -> int:
    """Train and measure what ships; see ``defgan-fast train weights --help``."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    for job, run in (("gan", run_gan), ("classifier", run_classifier)):
        words = ["train", job, "--dataset", args.dataset, "--out", str(args.work / f"{job}-{args.dataset}")]
        words += ["--root", args.root] if args.root else []
        run(parser.parse_args([*words, "--resume"] if args.resume else words))

    generator_file = args.work / f"gan-{args.dataset}" / GENERATOR_FILE
    classifier_file = args.work / f"classifier-{args.dataset}" / CLASSIFIER_FILE
    generator, classifier = weights.load_generator(generator_file), weights.load_classifier(classifier_file)
    measured = {}
    for split in ("validation", "test"):
        dataset = data.load(args.dataset, args.root, split)
        part = data.Dataset(dataset.images[: args.images], dataset.labels[: args.images])
        measured[split] = quality.measure(generator, classifier, part)
        print(f"{split}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured[split].items()))
    for kind, file, module in (
        ("generator", generator_file, generator),
        ("classifier", classifier_file, classifier),
    ):
        target = args.out / f"{args.dataset}_{kind}.safetensors"
        weights.save(module, target, {**weights.read_card(file), "quality": measured})
        print(target)
    return 0
