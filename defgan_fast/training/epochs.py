"""What the trainings of a single network share: classifiers and autoencoders, for some epochs, with Adam.

The network, its optimiser, the random numbers and the order of the images are the state that a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import nn

from defgan_fast import arguments, models
from defgan_fast.data import Dataset
from defgan_fast.training.batches import Batches


class EpochSettings(Protocol):
    """The settings that every such training has; they are dataclasses."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def seed(self) -> int: ...


def check_settings(settings: EpochSettings, counts: tuple[str, ...]) -> None:
    """Raises ValueError unless the named settings are at least 1 and the rate is above 0."""
    for name in counts:
        arguments.count(name, getattr(settings, name))
    arguments.number("lr", settings.lr, above=0)


def steps_of(settings: EpochSettings, images: int) -> int:
    """Returns the number of batches in all epochs."""
    return settings.epochs * max(images // settings.batch, 1)


class EpochTrainer:
    """The state of a training; its subclasses define a step.

    Args:
        settings: a dataclass with epochs, batch, lr and seed.
        dataset: images [N, C, H, W] float32; adversarial and noisy ones stay in its range.
        data_hash: fingerprint of the data, kept with checkpoints.
        device: where to train.
        make_model: the network with its first weights; called under the settings' seed.
    """

    def __init__(
        self,
        settings: Any,
        dataset: Dataset,
        data_hash: str,
        device: torch.device | str,
        make_model: Callable[[], nn.Module],
    ) -> None:
        self.options, self.value_range = settings, dataset.value_range
        self.settings: dict[str, Any] = {**asdict(settings), "data": data_hash}
        # More epochs only continue the run.
        del self.settings["epochs"]
        self.device = torch.device(device)
        self.images = dataset.images.to(self.device)
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = make_model()
        self.model = models.to_channels_last(model, self.device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        self.random = torch.Generator().manual_seed(settings.seed)
        self.batches = Batches(len(dataset), min(settings.batch, len(dataset)), self.random)

    def descend(self, loss: torch.Tensor) -> None:
        """Makes one step of the optimiser down a loss."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.step += 1

    def state(self) -> dict[str, Any]:
        """Returns weights, optimiser, random state and data order."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "random": self.random.get_state(),
            "batches": self.batches.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Does the inverse of :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.random.set_state(state["random"])
        self.batches.restore(state["batches"])
