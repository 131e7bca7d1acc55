"""The workflow of a generator: data, training with measurements, choice of the average, unit of the latents, card."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defgan_fast import arguments, data, pictures, weights
from defgan_fast.training import distributed, loop
from defgan_fast.training.calibration import calibrate as calibrated
from defgan_fast.training.cards import card as make_card
from defgan_fast.training.recipes import GENERATOR_FILE
from defgan_fast.training.run import Run, Trained
from defgan_fast.training.selection import GeneratorSelection
from defgan_fast.training.wgan_gp import GanSettings, WganGp


@dataclass(frozen=True)
class Measurements:
    """How a generator is measured, while it is trained and for the unit of its latents.

    Args:
        every: steps between measurements, the best of which is kept; 0 for none, which keeps the last average.
        images: number of validation images.
        steps: L of the projections.
        restarts: R of the projections.
        classifier: weight file of the classifier; None takes the shipped one where there is one.
    """

    every: int = 0
    images: int = 100
    steps: int = 200
    restarts: int = 10
    classifier: Path | None = None


def train_gan(
    settings: GanSettings,
    run: Run,
    *,
    measurements: Measurements = Measurements(),
    stop_at: int | None = None,
    sample_every: int = 500,
    calibrate: int = 0,
    compiled: bool = False,
) -> Trained | None:
    """Trains a generator, or one process's share of it.

    Args:
        settings: see :class:`GanSettings`.
        run: data, device and folder.
        measurements: of the generator in training.
        stop_at: ends at this step, with the schedule of all ``settings.steps``.
        sample_every: steps between grids of samples; 0 for none.
        calibrate: number of validation images by which the unit of the latents is chosen at the end; 0 leaves it.
        compiled: whether both passes are compiled.

    Returns:
        What was trained; None in all processes but the first.

    Raises:
        ValueError: the model's images are not in the data set's range, and whatever :func:`loop.run` raises.
    """
    run.use_threads()
    arguments.count("--calibrate", calibrate, least=0)
    dataset = run.load_pixels("train")
    data_hash = data.fingerprint(dataset)
    with distributed.joined(run.device) as device:
        trainer = WganGp(settings, dataset.images, data_hash, device, _compiler(device) if compiled else None)
        if trainer.generator.value_range != dataset.value_range:
            raise ValueError(
                f"model must make images in {list(dataset.value_range)} for {run.dataset}, got {settings.model}"
            )

        def save_samples(step: int) -> None:
            picture = pictures.grid(trainer.samples(), 8, 3, dataset.value_range)
            pictures.save_png(picture, run.out / "samples" / f"step_{step:06d}.png")

        selection = _selection(trainer, run, measurements) if measurements.every else None
        loop.run(
            trainer,
            min(settings.steps, stop_at or settings.steps),
            run.out,
            resume=run.resume,
            checkpoint_every=run.checkpoint_every,
            sample_every=sample_every,
            on_sample=save_samples,
            evaluate_every=measurements.every,
            evaluator=selection,
            title=f"{run.dataset} generator",
        )
        if distributed.rank() > 0:
            return None
        more = ["--stop-at", str(trainer.step)] if trainer.step < settings.steps else []
        more += ["--compile"] if compiled else []
        card = make_card("gan", run.dataset, settings, data_hash, device, *more) | {"steps": trainer.step}
        if distributed.world() > 1:
            card["processes"] = distributed.world()
        return _finish(trainer, run, measurements, selection, calibrate, card)


def _finish(
    trainer: WganGp,
    run: Run,
    measurements: Measurements,
    selection: GeneratorSelection | None,
    calibrate: int,
    card: dict[str, Any],
) -> Trained:
    """Chooses the average and the unit of its latents, and writes the weight file."""
    generator: nn.Module = trainer.average
    summary = []
    if selection is not None and (kept := selection.choose()) is not None:
        words = ["--evaluate-every", str(measurements.every), "--evaluate-images", str(measurements.images)]
        card |= {"command": f"{card['command']} {shlex.join(words)}", "steps": kept["step"]}
        card |= {"quality": {"validation": {"images": measurements.images, **kept}}}
    if calibrate:
        images = run.load("validation").images[:calibrate]
        generator, errors = calibrated(
            generator.cpu().eval(), images, measurements.steps, measurements.restarts
        )
        factor = min(errors, key=lambda key: errors[key])
        found = ", ".join(f"{key:g}: error {error:.5f}" for key, error in errors.items())
        summary.append(f"latents times {found}")
        # These figures are those of the calibrated generator and take the place of older ones.
        measured = {"images": len(images), "reconstruction_error": errors[factor]}
        card |= {"command": f"{card['command']} --calibrate {calibrate}"}
        card |= {"latent_factor": factor, "quality": {"validation": measured}}
    file = run.out / GENERATOR_FILE
    weights.save(generator, file, card)
    summary.append(f"{trainer.step} steps; generator of step {card['steps']} in {file}")
    return Trained(file, card, tuple(summary))


def _compiler(device: torch.device) -> Any:
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return lambda function: torch.compile(function, mode=mode)


def _selection(trainer: WganGp, run: Run, measurements: Measurements) -> GeneratorSelection:
    classifier = None
    if measurements.classifier is not None:
        classifier = weights.load_classifier(measurements.classifier)
    elif run.dataset in weights.shipped("classifier"):
        classifier = weights.load_classifier(run.dataset)
    return GeneratorSelection(
        lambda: trainer.average,
        trainer.samples,
        run.load("validation").first(measurements.images),
        classifier,
        measurements.steps,
        measurements.restarts,
    )
