"""What every training is told besides its settings, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from defgan_fast import arguments, data


@dataclass(frozen=True)
class Run:
    """Where a training gets its data, where it runs and where its results go.

    Args:
        dataset: name of a data set.
        out: folder of the weight file, the checkpoint and the metrics.
        root: folder of the data files; see :func:`defgan_fast.data.load`.
        resume: whether to continue from the checkpoint in ``out`` where there is one.
        device: where to train.
        threads: CPU threads, at least 1; None leaves PyTorch's own choice.
        checkpoint_every: steps between checkpoints, at least 1.
    """

    dataset: str
    out: Path
    root: str | None = None
    resume: bool = False
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (torch.device is immutable)
    threads: int | None = None
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if self.threads is not None:
            arguments.count("threads", self.threads)
        arguments.count("checkpoint_every", self.checkpoint_every)

    def use_threads(self) -> None:
        """Sets PyTorch's number of threads, on which the last bits of a training depend."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def load(self, split: str) -> data.Dataset:
        """Loads one part of the data set."""
        return data.load(self.dataset, self.root, split)

    def load_pixels(self, split: str) -> data.Dataset:
        """Loads one part; CelebA's stays uint8, which saves three quarters of the memory."""
        if self.dataset == "celeba":
            return data.celeba_pixels(self.root, split)
        return self.load(split)


class Trained(NamedTuple):
    """A finished training."""

    file: Path  # the weights
    card: dict[str, Any]
    summary: tuple[str, ...]  # lines that say what was done
