"""Training of classifiers A to F: Adam at 1e-3, batches of 128, 10 epochs, as in the released code.

The images are the data set's own (Defense-GAN-Orig in the paper), their reconstructions (-Rec), or both.
Adversarial training averages the loss over clean images and FGSM examples (the paper's) or PGD examples (Madry et al.,
ICLR 2018; what one would pick today) made against the network as it is at that step. The optional changes of shape,
contrast and noise are for the digits, whose training part is small; averaged weights are a departure from the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from defgan_fast import arguments, models
from defgan_fast.attacks import fgsm, pgd
from defgan_fast.data import Dataset
from defgan_fast.training import averaging
from defgan_fast.training.augment import random_affine, random_corruption
from defgan_fast.training.epochs import EpochTrainer, check_settings, steps_of

SOURCES = ("images", "reconstructions", "both")


@dataclass(frozen=True)
class ClassifierSettings:
    """Everything that decides a training run, apart from the data and the number of threads.

    ``on`` says what the images are: "images", "reconstructions" or "both". ``adversarial`` is FGSM's epsilon (paper:
    0.3 and 0.15), 0 for none; ``adversarial_steps`` above 1 makes it PGD of so many steps from random points. ``ema``
    is the decay of the averaged weights, 0 for the last iterate (the paper's). ``variant``: see
    :class:`defgan_fast.models.Classifier`.
    """

    arch: str = "F"
    variant: str = "paper"
    epochs: int = 10
    batch: int = 128
    lr: float = 1e-3
    augment: float = 0.0
    corrupt: float = 0.0
    adversarial: float = 0.0
    adversarial_steps: int = 1
    ema: float = 0.0
    on: str = "images"
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, ("epochs", "batch", "adversarial_steps"))
        for name in ("augment", "corrupt", "adversarial"):
            arguments.number(name, getattr(self, name), least=0)
        arguments.number("ema", self.ema, least=0, below=1)
        arguments.choice("on", self.on, SOURCES)

    def steps(self, images: int) -> int:
        """Returns the number of batches in all epochs."""
        return steps_of(self, images)


class ClassifierTrainer(EpochTrainer):
    """The training state and one step of it.

    Args:
        settings: see :class:`ClassifierSettings`.
        dataset: images [N, C, H, W] float32 and labels [N] in 0..classes - 1; adversarial examples stay in its
            range.
        data_hash: fingerprint of the data, kept with checkpoints.
        device: where to train.
        classes: number of classes.
    """

    def __init__(
        self,
        settings: ClassifierSettings,
        dataset: Dataset,
        data_hash: str,
        device: torch.device | str = "cpu",
        classes: int = 10,
    ) -> None:
        super().__init__(
            settings,
            dataset,
            data_hash,
            device,
            lambda: models.Classifier(
                settings.arch, list(dataset.images.shape[1:]), classes, settings.variant
            ),
        )
        if settings.adversarial_steps == 1:
            # FGSM was all there was when older checkpoints were written, which have no such setting.
            del self.settings["adversarial_steps"]
        self.labels = dataset.labels.to(self.device)
        self.average = averaging.copy_of(self.model) if settings.ema else None

    @property
    def result(self) -> nn.Module:
        """Is the classifier that the training is for: the average where there is one, else the last iterate."""
        return self.model if self.average is None else self.average

    def advance(self) -> dict[str, torch.Tensor]:
        """Learns from one batch."""
        chosen = self.batches.next().to(self.device)
        images = random_affine(self.images[chosen], self.options.augment, self.random)
        images = random_corruption(images, self.options.corrupt, self.random)
        labels = self.labels[chosen]
        attacked = self._attack(images, labels) if self.options.adversarial else None
        self.model.train()
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        if attacked is not None:
            loss = (loss + F.cross_entropy(self.model(attacked), labels)) / 2
        self.descend(loss)
        if self.average is not None:
            averaging.update(self.average, self.model, self.options.ema, self.step - 1)
        accuracy_train = (logits.argmax(1) == labels).float().mean()
        return {"loss": loss.detach(), "accuracy_train": accuracy_train}

    def state(self) -> dict[str, Any]:
        """Returns the state of every training, and the average."""
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return super().state() | average

    def restore(self, state: dict[str, Any]) -> None:
        """Does the inverse of :meth:`state`."""
        super().restore(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _attack(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Without dropout: the examples are to be those of the network that will be attacked.
        model, epsilon, steps = self.model.eval(), self.options.adversarial, self.options.adversarial_steps
        if steps == 1:
            return fgsm(model, images, labels, epsilon, self.value_range)
        # Other starting points at every step, so that the network meets the whole ball and not one corner of it.
        seed = self.options.seed + self.step
        return pgd(
            model,
            images,
            labels,
            epsilon,
            steps,
            random_start=True,
            seed=seed,
            value_range=self.value_range,
            early_stop=False,
        )
