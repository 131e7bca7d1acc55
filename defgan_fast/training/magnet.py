"""Training of MagNet's autoencoders: the mean squared error of denoising (Meng and Chen, 2017, section 4.3).

Each member of the collection has its own seed. An image with Gaussian noise goes in, the image is to come out,
which keeps an autoencoder with room to spare from learning the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from defgan_fast import arguments, models
from defgan_fast.data import Dataset
from defgan_fast.training.epochs import EpochTrainer, check_settings, steps_of


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
        check_settings(self, ("epochs", "batch", "code_size", "width"))
        arguments.number("noise", self.noise, least=0)

    def steps(self, images: int) -> int:
        """Returns the number of batches in all epochs."""
        return steps_of(self, images)


class MagnetTrainer(EpochTrainer):
    """The training state and one step of it.

    Args:
        settings: see :class:`MagnetSettings`.
        dataset: images [N, C, H, W] float32 in [0, 1] or [-1, 1]; their labels are not looked at.
        data_hash: fingerprint of the data, kept with checkpoints.
        device: where to train.
    """

    def __init__(
        self,
        settings: MagnetSettings,
        dataset: Dataset,
        data_hash: str,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(
            settings,
            dataset,
            data_hash,
            device,
            lambda: models.Autoencoder(
                settings.code_size,
                settings.width,
                list(dataset.images.shape[1:]),
                signed=dataset.value_range[0] < 0,
            ),
        )

    def advance(self) -> dict[str, torch.Tensor]:
        """Learns from one batch."""
        images = self.images[self.batches.next().to(self.device)]
        noise = torch.randn(images.shape, generator=self.random).to(self.device)
        noisy = (images + self.options.noise * noise).clamp(*self.value_range)
        loss = F.mse_loss(self.model(noisy), images)
        self.descend(loss)
        return {"reconstruction_error": loss.detach()}
