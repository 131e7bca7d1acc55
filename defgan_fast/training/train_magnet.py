"""The workflow of MagNet's autoencoders: data, training of every member, its error, card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from defgan_fast import arguments, data, weights
from defgan_fast.training import loop
from defgan_fast.training.cards import card as make_card
from defgan_fast.training.magnet import MagnetSettings, MagnetTrainer
from defgan_fast.training.recipes import AUTOENCODER_FILE
from defgan_fast.training.run import Run, Trained

BATCH = 256


def train_magnet(settings: MagnetSettings, run: Run, *, members: int = 1) -> Iterator[Trained]:
    """Trains a collection of autoencoders, one after the other.

    Args:
        settings: those of the first member; the seeds of the others count on from its seed.
        run: data, device and folder, below which each member has a folder of its own.
        members: at least 1.

    Yields:
        Each member when it is trained.
    """
    arguments.count("--members", members)
    run.use_threads()
    train, validation = run.load("train"), run.load("validation")
    data_hash = data.fingerprint(train)
    for member in range(members):
        own = replace(settings, seed=settings.seed + member)
        folder = run.out / f"member-{member}"
        trainer = MagnetTrainer(own, train, data_hash, run.device)
        loop.run(
            trainer,
            own.steps(len(train)),
            folder,
            resume=run.resume,
            checkpoint_every=run.checkpoint_every,
            title=f"{run.dataset} autoencoder {member + 1} of {members}",
        )
        model = trainer.model.cpu().eval()
        with torch.no_grad():
            errors = [(model(part) - part).square().flatten(1) for part in validation.images.split(BATCH)]
        found = float(torch.cat(errors).double().mean())
        card = make_card("magnet", run.dataset, own, data_hash, run.device)
        card |= {"steps": trainer.step, "quality": {"reconstruction_error_validation": found}}
        file = folder / AUTOENCODER_FILE
        weights.save(model, file, card)
        summary = f"{trainer.step} steps; error on validation images {found:.5f}; {file}"
        yield Trained(file, card, (summary,))
