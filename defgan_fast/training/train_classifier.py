"""The workflow of a classifier: images or reconstructions, training, choice of the epoch, card."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from defgan_fast import arguments, data, weights
from defgan_fast.evaluation.cache import cached, weights_hash
from defgan_fast.projector import Projector
from defgan_fast.training import loop
from defgan_fast.training.cards import card as make_card
from defgan_fast.training.classifier import ClassifierSettings, ClassifierTrainer
from defgan_fast.training.recipes import CLASSIFIER_FILE, RECONSTRUCTIONS
from defgan_fast.training.run import Run, Trained
from defgan_fast.training.selection import KEEP, ClassifierSelection


@dataclass(frozen=True)
class Projections:
    """The reconstructions that a classifier is trained on, where its settings say so.

    Args:
        generator: weight file; None takes the shipped one.
        steps: L.
        restarts: R.
        cache: folder in which they are kept.
    """

    generator: Path | None = None
    steps: int = 200
    restarts: int = 10
    cache: Path = RECONSTRUCTIONS


def train_classifier(
    settings: ClassifierSettings,
    run: Run,
    *,
    projections: Projections = Projections(),
    keep: str = KEEP[0],
) -> Trained:
    """Trains a classifier.

    Args:
        settings: see :class:`ClassifierSettings`.
        run: data, device and folder.
        projections: for ``settings.on`` other than "images".
        keep: "last" keeps the weights of the last epoch, "best" those with the highest accuracy on validation images.

    Raises:
        FileNotFoundError: data or a generator are missing, and whatever :func:`loop.run` raises.
    """
    arguments.choice("keep", keep, KEEP)
    run.use_threads()
    dataset = run.load("train")
    data_hash = data.fingerprint(dataset)
    more: list[str] = []
    if settings.on != "images":
        dataset, data_hash, more = _reconstructed(dataset, data_hash, settings.on, projections, run)
    trainer = ClassifierTrainer(settings, dataset, data_hash, run.device, data.CLASSES[run.dataset])
    steps = settings.steps(len(dataset))
    selection = ClassifierSelection(lambda: trainer.result, run.load("validation"), run.device)
    loop.run(
        trainer,
        steps,
        run.out,
        resume=run.resume,
        checkpoint_every=run.checkpoint_every,
        evaluate_every=steps // settings.epochs,
        evaluator=selection,
        title=f"{run.dataset} classifier {settings.arch}",
    )
    kept = selection.choose() if keep == "best" else None
    if kept is None:
        kept = {"step": trainer.step, **selection.measure()}
    found = kept["accuracy_validation"]
    card = make_card("classifier", run.dataset, settings, data_hash, run.device, *more, "--keep", keep)
    card |= {"steps": kept["step"], "quality": {"accuracy_validation": found}}
    file = run.out / CLASSIFIER_FILE
    weights.save(trainer.result.cpu(), file, card)
    summary = (
        f"{trainer.step} steps; accuracy on validation images {found:.4f} at step {kept['step']}; "
        f"that classifier in {file}"
    )
    return Trained(file, card, (summary,))


def _reconstructed(
    dataset: data.Dataset, data_hash: str, on: str, projections: Projections, run: Run
) -> tuple[data.Dataset, str, list[str]]:
    """Returns the images that are trained on, their fingerprint, and the words of the command that they depend on."""
    steps, restarts = str(projections.steps), str(projections.restarts)
    generator = weights.load_generator(projections.generator or run.dataset).to(run.device)
    projector = Projector(generator, steps=projections.steps, restarts=projections.restarts)
    images, labels = cached(projector, dataset.images, data_hash, projections.cache).images, dataset.labels
    if on == "both":
        images, labels = torch.cat((dataset.images, images)), torch.cat((labels, labels))
    words = " ".join((data_hash, on, weights_hash(generator), steps, restarts))
    more = ["--projection-steps", steps, "--restarts", restarts]
    more += ["--generator", str(projections.generator)] if projections.generator else []
    trained_on = data.Dataset(images, labels, dataset.value_range)
    return trained_on, hashlib.sha256(words.encode()).hexdigest(), more
