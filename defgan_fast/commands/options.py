"""What several commands share: options for data, devices and networks, and checks before any work is done."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from defgan_fast import weights
from defgan_fast.training import recipes


def add_root(parser: argparse.ArgumentParser) -> None:
    """Adds ``--root``."""
    parser.add_argument(
        "--root", help="folder of the data files (default: $DEFGAN_DATA/NAME, cache, download)"
    )


def parse_device(text: str) -> torch.device:
    """Returns the device of ``--device``: "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: there is no such kind of device, or it is not on this machine.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {text!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(
                f"--device must be on this machine, got {text!r} with {count} CUDA devices in sight"
            )
    return device


def check_writable(folder: Path) -> None:
    """Fails before the work and not after it.

    Raises:
        OSError: the folder of ``--out`` cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--out must be a folder that can be written, got {folder} ({error.strerror})"
        ) from None


def load_network(kind: str, dataset: str, given: Path | None) -> nn.Module:
    """Loads a generator or classifier: the file that was asked for, the shipped one, or the one trained here.

    Args:
        kind: "generator" or "classifier".
        dataset: name of the data set.
        given: the file that was asked for, or None.

    Raises:
        FileNotFoundError: there is none; the message has the command that trains one.
    """
    load = weights.load_generator if kind == "generator" else weights.load_classifier
    if given is not None:
        return load(given)
    if dataset in weights.shipped(kind):
        return load(dataset)
    trained = recipes.generator_path(dataset) if kind == "generator" else recipes.classifier_path(dataset)
    if trained.is_file():
        return load(trained)
    job = "gan" if kind == "generator" else "classifier"
    raise FileNotFoundError(
        f"no {kind} for {dataset} at hand (none is shipped, no such file: {trained}); train one with: "
        f"defgan-fast train {job} --dataset {dataset}{recipes.QUICK[job]}, or give one with --{kind} FILE"
    )
