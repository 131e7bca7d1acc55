"""The settings of every training by data set, those of what ships, and where results lie.

Where nothing else is said the settings are the paper's. They do not fit the digits: their networks are half as wide,
1,297 images need deformations to speak for handwriting as a whole, and the schedule is one for an hour of one core.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from defgan_fast.training.classifier import ClassifierSettings
from defgan_fast.training.wgan_gp import GanSettings

OUT = Path("out") / "train"
RECONSTRUCTIONS = Path("out") / "reconstructions"
GENERATOR_FILE = "generator.safetensors"
CLASSIFIER_FILE = "classifier.safetensors"
AUTOENCODER_FILE = "autoencoder.safetensors"

GAN: dict[str, GanSettings] = {
    "digits": GanSettings(
        steps=6000,
        batch=32,
        critic_steps=3,
        lr=5e-4,
        lr_schedule="linear",
        latent_size=64,
        latent_floor=0.125,
        width=32,
        critic_width=32,
        augment=1.0,
    ),
    "mnist": GanSettings(),
    "fashion_mnist": GanSettings(),
    "celeba": GanSettings(model="CelebaGenerator"),
}
CLASSIFIER: dict[str, ClassifierSettings] = {
    "digits": ClassifierSettings(epochs=80, augment=1.0, corrupt=1.5),
    "mnist": ClassifierSettings(),
    "fashion_mnist": ClassifierSettings(),
    "celeba": ClassifierSettings(),
}


@dataclass(frozen=True)
class Recipe:
    """How a shipped pair is trained.

    Args:
        gan: the generator's settings.
        classifier: the classifier's settings.
        evaluate_every: steps between measurements of the generator, the best of which is kept; 0 keeps the last.
        evaluate_images: number of validation images of a measurement.
        threads: CPU threads, on which the last bits depend; None leaves PyTorch's own choice.
    """

    gan: GanSettings
    classifier: ClassifierSettings
    evaluate_every: int = 0
    evaluate_images: int = 100
    threads: int | None = None


# This is half an hour to an hour of one core instead of the paper's 200,000 steps. A small critic, and two of its
# steps for each of the generator's, cost a sixth of the paper's.
_SHORT = GanSettings(lr=5e-4, lr_schedule="hold", critic_steps=2, critic_width=32)
SHIPPED: dict[str, Recipe] = {
    "digits": Recipe(GAN["digits"], CLASSIFIER["digits"]),
    # The average of the last step is kept: the error of clean images, by which evaluations would choose, is smallest
    # early, when attacked images are reconstructed worse.
    "mnist": Recipe(replace(_SHORT, steps=8000, latent_floor=0.3), CLASSIFIER["mnist"], threads=1),
    "fashion_mnist": Recipe(
        replace(_SHORT, steps=3000),
        CLASSIFIER["fashion_mnist"],
        evaluate_every=500,
        evaluate_images=20,
        threads=1,
    ),
}
# These words are added to the commands that the package suggests: the paper's 200,000 steps take days on a CPU.
QUICK = {"gan": " --steps 5000 --lr 3e-4 --lr-schedule linear", "classifier": ""}


def folder(job: str, dataset: str) -> Path:
    """Returns where ``train JOB`` puts its results unless it is told otherwise."""
    return OUT / f"{job}-{dataset}"


def generator_path(dataset: str) -> Path:
    """Returns where ``train gan`` puts the generator unless it is told otherwise."""
    return folder("gan", dataset) / GENERATOR_FILE


def classifier_path(dataset: str) -> Path:
    """Returns where ``train classifier`` puts the classifier unless it is told otherwise."""
    return folder("classifier", dataset) / CLASSIFIER_FILE
