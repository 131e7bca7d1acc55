"""The card of a trained network: the command that repeats the training, and what its bits depend on."""

from __future__ import annotations

import platform
import shlex
from dataclasses import fields
from typing import Any

import torch

from defgan_fast._version import __version__


def command(job: str, dataset: str, settings: Any, *more: str) -> str:
    """Returns the command that repeats a training, every setting spelled out.

    Args:
        job: of ``defgan-fast train``.
        dataset: its name.
        settings: a dataclass; every field but Adam's betas is an option of that name.
        more: words of the command that are no settings.
    """
    words = ["defgan-fast", "train", job, "--dataset", dataset, *more]
    for field in fields(settings):
        value, flag = getattr(settings, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif field.name != "betas":
            words += [f"--{flag}", str(value)]
    words += ["--threads", str(torch.get_num_threads())]
    return shlex.join(words)


def card(
    job: str, dataset: str, settings: Any, data_hash: str, device: torch.device, *more: str
) -> dict[str, Any]:
    """Returns the card of a training; arguments are those of :func:`command`, the data's fingerprint, the device."""
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
