"""``defgan-fast train gan|classifier|classifiers|magnet|curve|weights``, and where their results lie.

The trainings leave in their folder the weight file with its card, the checkpoint, and the metrics; ``train gan``
also grids of samples. ``--resume`` continues an interrupted run, or prolongs a finished one. ``train weights``
does what a data set needs, with its recipe, and measures the result as a defence: that is how shipped weights
are made.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defgan_fast import data, pictures, weights
from defgan_fast import device as devices
from defgan_fast.evaluation import cache as reconstructions
from defgan_fast.evaluation import quality
from defgan_fast.evaluation.metrics import accuracy
from defgan_fast.models.classifier import ARCHITECTURES, VARIANTS
from defgan_fast.projector import Projector
from defgan_fast.training import curve, distributed, loop, table5
from defgan_fast.training.calibration import calibrate
from defgan_fast.training.classifier import SOURCES, ClassifierSettings, ClassifierTrainer
from defgan_fast.training.magnet import MagnetSettings, MagnetTrainer
from defgan_fast.training.selection import KEEP, ClassifierSelection, GeneratorSelection
from defgan_fast.training.wgan_gp import GENERATORS, PRECISIONS, GanSettings, WganGp

OUT = Path("out") / "train"
GENERATOR_FILE = "generator.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
AUTOENCODER_FILE = "autoencoder.safetensors"

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
    "celeba": {"model": "CelebaGenerator"},
}
CLASSIFIER_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 80, "augment": 1.0, "corrupt": 1.5},
    "mnist": {},
    "fashion_mnist": {},
    "celeba": {},
}
# Words added to `train gan` for what ships: schedules for half an hour to an hour of one core instead of the paper's
# 200,000 steps. A small critic, and two of its steps for each of the generator's, cost a sixth of the paper's.
RECIPE = "--lr 5e-4 --lr-schedule hold --critic-steps 2 --critic-width 32 --threads 1"
RECIPES: dict[str, list[str]] = {
    "digits": [],
    # The average of the last step: the error of clean images, by which --evaluate-every would choose, is smallest
    # early, when attacked images are reconstructed worse.
    "mnist": f"{RECIPE} --steps 8000 --latent-floor 0.3".split(),
    "fashion_mnist": f"{RECIPE} --steps 3000 --evaluate-every 500 --evaluate-images 20".split(),
}
CLASSIFIER_RECIPE = ["--threads", "1"]
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
    gan.add_argument("--model", choices=GENERATORS, help="generator's class (default: by data set)")
    gan.add_argument(
        "--batch-norm", action=argparse.BooleanOptionalAction, default=None, help="CelebaGenerator's"
    )
    gan.add_argument("--precision", choices=tuple(PRECISIONS), help="of the convolutions (default: float32)")
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
        default=Path("out") / "reconstructions",
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

    table5.add_parser(jobs)

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

    plot = jobs.add_parser("curve", help="plot reconstruction error and accuracy against steps")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of train gan")
    plot.add_argument("--names", nargs="+", help="titles (default: the folders' names)")
    plot.add_argument("--out", type=Path, default=Path("curve.png"), help="PNG (default: curve.png)")
    plot.set_defaults(run=run_curve)

    both = jobs.add_parser("weights", help="train generator and classifier, and measure them as a defence")
    both.add_argument("--dataset", choices=tuple(RECIPES), default="digits")
    both.add_argument("--root", help="folder of the data files (default: $DEFGAN_DATA/NAME, cache, download)")
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
        value, flag = getattr(settings, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif field.name != "betas":
            words += [f"--{flag}", str(value)]
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


def _load(args: argparse.Namespace, split: str) -> data.Dataset:
    """Images as they are trained on: CelebA's stay uint8, which saves three quarters of the memory."""
    if args.dataset == "celeba":
        return data.celeba_pixels(args.root, split)
    return data.load(args.dataset, args.root, split)


def run_gan(args: argparse.Namespace) -> int:
    """Train a generator; see ``defgan-fast train gan --help``."""
    settings = _settings(GanSettings, GAN_DEFAULTS[args.dataset], args)
    _use_threads(args.threads)
    if args.calibrate < 0:
        raise ValueError(f"--calibrate must be at least 0, got {args.calibrate}")
    wanted = devices.parse(args.device)
    out = args.out or generator_path(args.dataset).parent
    dataset = _load(args, "train")
    data_hash = data.fingerprint(dataset)
    value_range = dataset.value_range
    with distributed.joined(wanted) as device:
        compiler = _compiler(device) if args.compile else None
        trainer = WganGp(settings, dataset.images, data_hash, device, compiler)
        if trainer.generator.value_range != value_range:
            raise ValueError(
                f"model must make images in {list(value_range)} for {args.dataset}, got {settings.model}"
            )

        def save_samples(step: int) -> None:
            picture = pictures.grid(trainer.samples(), columns=8, scale=3, value_range=value_range)
            pictures.save_png(picture, out / "samples" / f"step_{step:06d}.png")

        selection = _selection(trainer, args) if args.evaluate_every else None
        loop.run(
            trainer,
            min(settings.steps, args.stop_at or settings.steps),
            out,
            resume=args.resume,
            checkpoint_every=args.checkpoint_every,
            sample_every=args.sample_every,
            on_sample=save_samples,
            evaluate_every=args.evaluate_every,
            evaluator=selection,
            title=f"{args.dataset} generator",
        )
        if distributed.rank() > 0:
            return 0
        more = ["--stop-at", str(trainer.step)] if trainer.step < settings.steps else []
        more += ["--compile"] if args.compile else []
        card = _card("gan", args.dataset, settings, data_hash, device, *more) | {"steps": trainer.step}
        if distributed.world() > 1:
            card["processes"] = distributed.world()
        generator: nn.Module = trainer.average
        if selection is not None and (kept := selection.choose()) is not None:
            words = [
                "--evaluate-every",
                str(args.evaluate_every),
                "--evaluate-images",
                str(args.evaluate_images),
            ]
            card |= {"command": f"{card['command']} {shlex.join(words)}", "steps": kept["step"]}
            card |= {"quality": {"validation": {"images": args.evaluate_images, **kept}}}
        if args.calibrate:
            generator, found = _calibrated(generator, args)
            card |= {"command": f"{card['command']} --calibrate {args.calibrate}", **found}
        weights.save(generator, out / GENERATOR_FILE, card)
        print(f"{trainer.step} steps; generator of step {card['steps']} in {out / GENERATOR_FILE}")
    return 0


def _compiler(device: torch.device) -> Any:
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return lambda function: torch.compile(function, mode=mode)


def _calibrated(generator: nn.Module, args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The generator in the unit that suits it, and the card's entries: these figures take the place of older ones."""
    images = data.load(args.dataset, args.root, "validation").images[: args.calibrate]
    generator, errors = calibrate(generator.cpu().eval(), images, args.evaluate_steps, args.evaluate_restarts)
    factor = min(errors, key=lambda key: errors[key])
    print("latents times " + ", ".join(f"{key:g}: error {error:.5f}" for key, error in errors.items()))
    measured = {"images": len(images), "reconstruction_error": errors[factor]}
    return generator, {"latent_factor": factor, "quality": {"validation": measured}}


def _selection(trainer: WganGp, args: argparse.Namespace) -> GeneratorSelection:
    classifier = None
    if args.classifier is not None:
        classifier = weights.load_classifier(args.classifier)
    elif args.dataset in weights.shipped("classifier"):
        classifier = weights.load_classifier(args.dataset)
    part = data.load(args.dataset, args.root, "validation").first(args.evaluate_images)
    return GeneratorSelection(
        lambda: trainer.average,
        trainer.samples,
        part,
        classifier,
        args.evaluate_steps,
        args.evaluate_restarts,
    )


def run_classifier(args: argparse.Namespace) -> int:
    """Train a classifier; see ``defgan-fast train classifier --help``."""
    settings = _settings(ClassifierSettings, CLASSIFIER_DEFAULTS[args.dataset], args)
    _use_threads(args.threads)
    device = devices.parse(args.device)
    out = args.out or classifier_path(args.dataset).parent
    dataset = data.load(args.dataset, args.root, "train")
    data_hash = data.fingerprint(dataset)
    more: list[str] = []
    if settings.on != "images":
        dataset, data_hash, more = _reconstructed(dataset, data_hash, settings.on, args)
    trainer = ClassifierTrainer(settings, dataset, data_hash, device, data.CLASSES[args.dataset])
    steps = settings.steps(len(dataset.images))
    validation = data.load(args.dataset, args.root, "validation")
    selection = ClassifierSelection(lambda: trainer.result, validation, device)
    loop.run(
        trainer,
        steps,
        out,
        resume=args.resume,
        checkpoint_every=args.checkpoint_every,
        evaluate_every=steps // settings.epochs,
        evaluator=selection,
        title=f"{args.dataset} classifier {settings.arch}",
    )
    kept = selection.choose() if args.keep == "best" else None
    if kept is None:
        kept = {"step": trainer.step, **selection.measure()}
    card = _card("classifier", args.dataset, settings, data_hash, device, *more, "--keep", args.keep)
    card |= {"steps": kept["step"], "quality": {"accuracy_validation": kept["accuracy_validation"]}}
    weights.save(trainer.result.cpu(), out / CLASSIFIER_FILE, card)
    print(
        f"{trainer.step} steps; accuracy on validation images {kept['accuracy_validation']:.4f} at step "
        f"{kept['step']}; that classifier in {out / CLASSIFIER_FILE}"
    )
    return 0


def _reconstructed(
    dataset: data.Dataset, data_hash: str, on: str, args: argparse.Namespace
) -> tuple[data.Dataset, str, list[str]]:
    """The training images of ``--on``, their fingerprint, and the words of the command that they depend on."""
    generator = weights.load_generator(args.generator or args.dataset).to(devices.parse(args.device))
    projector = Projector(generator, steps=args.projection_steps, restarts=args.restarts)
    found = reconstructions.cached(projector, dataset.images, data_hash, args.cache)
    images, labels = found.images, dataset.labels
    if on == "both":
        images, labels = torch.cat((dataset.images, images)), torch.cat((labels, labels))
    words = [
        data_hash,
        on,
        reconstructions.weights_hash(generator),
        str(args.projection_steps),
        str(args.restarts),
    ]
    more = ["--projection-steps", str(args.projection_steps), "--restarts", str(args.restarts)]
    more += ["--generator", str(args.generator)] if args.generator else []
    both = data.Dataset(images, labels, dataset.value_range)
    return both, hashlib.sha256(" ".join(words).encode()).hexdigest(), more


def run_magnet(args: argparse.Namespace) -> int:
    """Train MagNet's autoencoders; see ``defgan-fast train magnet --help``."""
    if args.members < 1:
        raise ValueError(f"--members must be at least 1, got {args.members}")
    _use_threads(args.threads)
    device = devices.parse(args.device)
    train, validation = (data.load(args.dataset, args.root, split) for split in ("train", "validation"))
    data_hash = data.fingerprint(train)
    first = _settings(MagnetSettings, {}, args)
    out = args.out or OUT / f"magnet-{args.dataset}"
    for member in range(args.members):
        args.seed = first.seed + member
        settings = _settings(MagnetSettings, {}, args)
        folder = out / f"member-{member}"
        trainer = MagnetTrainer(settings, train, data_hash, device)
        loop.run(
            trainer,
            settings.steps(len(train.images)),
            folder,
            resume=args.resume,
            checkpoint_every=args.checkpoint_every,
            title=f"{args.dataset} autoencoder {member + 1} of {args.members}",
        )
        model = trainer.model.cpu().eval()
        with torch.no_grad():
            errors = torch.cat(
                [(model(part) - part).square().flatten(1) for part in validation.images.split(256)]
            )
        found = float(errors.double().mean())
        card = _card("magnet", args.dataset, settings, data_hash, device)
        card |= {"steps": trainer.step, "quality": {"reconstruction_error_validation": found}}
        weights.save(model, folder / AUTOENCODER_FILE, card)
        print(f"{trainer.step} steps; error on validation images {found:.5f}; {folder / AUTOENCODER_FILE}")
    return 0


def run_curve(args: argparse.Namespace) -> int:
    """Plot; see ``defgan-fast train curve --help``."""
    names = args.names or [run.name for run in args.runs]
    if len(names) != len(args.runs):
        raise ValueError(
            f"--names must have one name for each of the {len(args.runs)} runs, got {len(names)}"
        )
    curve.plot(args.runs, names, args.out)
    print(args.out)
    return 0


def run_weights(args: argparse.Namespace) -> int:
    """Train and measure what ships; see ``defgan-fast train weights --help``."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    folders = {job: args.work / f"{job}-{args.dataset}" for job in ("classifier", "gan")}
    classifier_file, generator_file = folders["classifier"] / CLASSIFIER_FILE, folders["gan"] / GENERATOR_FILE
    recipe = RECIPES[args.dataset]
    gan = [*recipe, "--classifier", str(classifier_file)] if recipe else []
    classifier = CLASSIFIER_RECIPE if recipe else []
    for job, run, words in (("classifier", run_classifier, classifier), ("gan", run_gan, gan)):
        line = ["train", job, "--dataset", args.dataset, "--out", str(folders[job]), *words]
        line += ["--root", args.root] if args.root else []
        run(parser.parse_args([*line, "--resume"] if args.resume else line))
    pack(args, generator_file, classifier_file)
    return 0


def pack(args: argparse.Namespace, generator_file: Path, classifier_file: Path) -> None:
    """Store a trained pair in float16, measure what was stored, and write the figures into its cards."""
    generator, classifier = weights.load_generator(generator_file), weights.load_classifier(classifier_file)
    validation = data.load(args.dataset, args.root, "validation")
    cache = args.work / "reconstructions"
    full = quality.measure(generator, classifier, validation, count=args.images, attacked=0, cache=cache)
    # Rounded as they will be stored: the figures are to be those of the files.
    for module in (generator, classifier):
        module.load_state_dict({name: value.half() for name, value in module.state_dict().items()})
    test = data.load(args.dataset, args.root, "test")
    measured: dict[str, Any] = {
        "validation": quality.measure(
            generator, classifier, validation, count=args.images, attacked=0, cache=cache
        ),
        "test": quality.measure(
            generator, classifier, test, count=args.images_test, attacked=args.images_attacked, cache=cache
        ),
        "validation_float32": full,
    }
    measured["test"]["accuracy_all"] = accuracy(classifier, test.images, test.labels)
    for split, figures in measured.items():
        print(f"{split}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    for kind, file, module in (
        ("generator", generator_file, generator),
        ("classifier", classifier_file, classifier),
    ):
        target = args.out / f"{args.dataset}_{kind}.safetensors"
        card = {**weights.read_card(file), "storage": "float16", "quality": measured}
        weights.save(module, target, card, torch.float16)
        print(target)
