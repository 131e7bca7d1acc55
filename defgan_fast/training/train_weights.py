"""The workflow of what ships: classifier and generator by their recipe, packed in float16 and measured as a defence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from defgan_fast import data, weights
from defgan_fast.evaluation import quality
from defgan_fast.evaluation.metrics import accuracy
from defgan_fast.training.recipes import OUT, Recipe
from defgan_fast.training.run import Run
from defgan_fast.training.train_classifier import train_classifier
from defgan_fast.training.train_gan import Measurements, train_gan


@dataclass(frozen=True)
class Packing:
    """Where a pair goes, and on how many images it is measured.

    Args:
        out: folder of ``DATASET_generator.safetensors`` and ``DATASET_classifier.safetensors``.
        images: number of validation images.
        images_attacked: number of test images that are attacked.
        images_test: number of clean test images.
        cache: folder of reconstructions.
    """

    out: Path = OUT
    images: int = 100
    images_attacked: int = 100
    images_test: int = 1000
    cache: Path = OUT / "reconstructions"


def train_weights(
    recipe: Recipe,
    dataset: str,
    work: Path,
    packing: Packing,
    *,
    root: str | None = None,
    resume: bool = False,
) -> Iterator[str]:
    """Trains a classifier, then a generator, and packs and measures both.

    Args:
        recipe: settings of both trainings.
        dataset: its name.
        work: folder of both trainings.
        packing: see :class:`Packing`.
        root: folder of the data files.
        resume: whether to continue from checkpoints.

    Yields:
        Lines that say what was done, as it is done.
    """

    def run(job: str) -> Run:
        return Run(dataset, work / f"{job}-{dataset}", root, resume, threads=recipe.threads)

    classifier = train_classifier(recipe.classifier, run("classifier"))
    yield from classifier.summary
    measurements = Measurements(recipe.evaluate_every, recipe.evaluate_images, classifier=classifier.file)
    generator = train_gan(recipe.gan, run("gan"), measurements=measurements)
    if generator is not None:
        yield from generator.summary
        yield from pack(dataset, root, generator.file, classifier.file, packing)


def pack(
    dataset: str, root: str | None, generator_file: Path, classifier_file: Path, packing: Packing
) -> Iterator[str]:
    """Stores a trained pair in float16, measures what was stored, and writes the figures into its cards.

    Yields:
        Lines with the figures and the files.
    """
    generator, classifier = weights.load_generator(generator_file), weights.load_classifier(classifier_file)
    validation = data.load(dataset, root, "validation")

    def on_validation() -> dict[str, float]:
        return quality.measure(
            generator, classifier, validation, count=packing.images, attacked=0, cache=packing.cache
        )

    full = on_validation()
    # The weights are rounded as they will be stored: the figures are to be those of the files.
    for module in (generator, classifier):
        module.load_state_dict({name: value.half() for name, value in module.state_dict().items()})
    test = data.load(dataset, root, "test")
    measured: dict[str, Any] = {
        "validation": on_validation(),
        "test": quality.measure(
            generator,
            classifier,
            test,
            count=packing.images_test,
            attacked=packing.images_attacked,
            cache=packing.cache,
        ),
        "validation_float32": full,
    }
    measured["test"]["accuracy_all"] = accuracy(classifier, test.images, test.labels)
    for split, figures in measured.items():
        yield f"{split}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    for kind, file, module in (
        ("generator", generator_file, generator),
        ("classifier", classifier_file, classifier),
    ):
        target = packing.out / f"{dataset}_{kind}.safetensors"
        card = {**weights.read_card(file), "storage": "float16", "quality": measured}
        weights.save(module, target, card, torch.float16)
        yield str(target)
