"""Training of MagNet's autoencoders: the mean squared error of denoising (Meng and Chen, 2017, section 4.3).

Each member of the collection has its own seed. An image with Gaussian noise goes in, the image is to come out,
which keeps an autoencoder with room to spare from learning the identity.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from defgan_fast import models
from defgan_fast.training.batches import Batches


@dataclass(frozen=True)
class MagnetSettings:
    """Everything that decides a training run, apart from the data and the number of threads.

    Epochs, rate, batch and noise are MagNet's own for MNIST; code size and width are table 7's.
    """

    epochs: int = 100
    batch: int = 256
    lr: float = 1e-3
    noise: float = 0.1
    code_size: int = 128
    width: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "code_size", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")

    def steps(self, images: int) -> int:
        """Number of batches in all epochs."""
        return self.epochs * max(images // self.batch, 1)


class MagnetTrainer:
    """The training state and one step of it.

    Args:
        settings: see :class:`MagnetSettings`.
        images: [N, C, H, W] float32 in ``value_range``.
        data_hash: fingerprint of the images, kept with checkpoints.
        device: where to train.
        value_range: of the pixels, (0, 1) or (-1, 1).
    """

    def __init__(
        self,
        settings: MagnetSettings,
        images: torch.Tensor,
        data_hash: str,
        device: torch.device | str = "cpu",
        value_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.options = settings
        self.settings: dict[str, Any] = {**asdict(settings), "data": data_hash}
        # More epochs only continue the run.
        del self.settings["epochs"]
        self.device = torch.device(device)
        self.images, self.value_range = images.to(self.device), value_range
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = models.Autoencoder(
                settings.code_size, settings.width, list(images.shape[1:]), signed=value_range[0] < 0
            )
        self.model = models.to_channels_last(model, self.device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=settings.lr)
        self.random = torch.Generator().manual_seed(settings.seed)
        self.batches = Batches(len(images), min(settings.batch, len(images)), self.random)

    def advance(self) -> dict[str, torch.Tensor]:
        """One batch."""
        images = self.images[self.batches.next().to(self.device)]
        noise = torch.randn(images.shape, generator=self.random).to(self.device)
        noisy = (images + self.options.noise * noise).clamp(*self.value_range)
        loss = F.mse_loss(self.model(noisy), images)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.step += 1
        return {"reconstruction_error": loss.detach()}

    def state(self) -> dict[str, Any]:
        """Weights, optimiser, random state and data order."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "random": self.random.get_state(),
            "batches": self.batches.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.random.set_state(state["random"])
        self.batches.restore(state["batches"])
