"""Small models to attack, and the table of all attacks that the tests of their common promises run over."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from defgan_fast import attacks


class RowByRow(nn.Module):
    """Asks a model about one image at a time, so that an answer has the same bits whatever the batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        if not len(images):
            return self.model(images)
        return torch.cat([self.model(images[i : i + 1]) for i in range(len(images))])


def small_classifier(channels: int = 1, size: int = 8, classes: int = 4, scale: float = 4.0) -> nn.Module:
    """A classifier of random weights whose classes small changes can leave."""
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * size * size, classes)
    )
    torch.random.set_rng_state(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    return model.eval()


def images_and_labels(
    model: nn.Module, count: int = 7, channels: int = 1, size: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1] and the classes that the model sees in them."""
    images = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return images, model(images).argmax(1)


class Case(NamedTuple):
    """An attack with settings that make it quick on the small classifier.

    ``epsilon`` is a budget under which some images of :func:`images_and_labels` break and some do not.
    """

    attack: Callable[..., torch.Tensor]
    norm: str
    epsilon: float
    settings: dict
    gradients: bool = True
    random: bool = False


CASES = {
    "fgsm": Case(attacks.fgsm, "linf", 0.03, {}),
    "fgsm l2": Case(attacks.fgsm, "l2", 0.15, {"norm": "l2"}),
    "rand_fgsm": Case(attacks.rand_fgsm, "linf", 0.03, {"alpha": 0.01}, random=True),
    "pgd": Case(attacks.pgd, "linf", 0.03, {"steps": 5}),
    "pgd random": Case(
        attacks.pgd, "linf", 0.03, {"steps": 4, "random_start": True, "restarts": 2}, random=True
    ),
    "pgd l2": Case(attacks.pgd, "l2", 0.15, {"steps": 5, "norm": "l2", "loss": "margin"}),
    "apgd": Case(attacks.pgd, "linf", 0.03, {"steps": 8, "step_rule": "auto", "loss": "margin"}),
    "apgd l2": Case(
        attacks.pgd,
        "l2",
        0.15,
        {"steps": 8, "step_rule": "auto", "norm": "l2", "random_start": True},
        random=True,
    ),
    "cw": Case(attacks.cw, "l2", 0.15, {"iterations": 20, "learning_rate": 0.05, "search_steps": 3}),
    "cw paper": Case(attacks.cw, "l2", 4.65, {"iterations": 30}),
    "square": Case(attacks.square, "linf", 0.04, {"queries": 25}, gradients=False, random=True),
    "hop_skip_jump": Case(
        attacks.hop_skip_jump, "linf", 0.08, {"steps": 2, "first_probes": 30}, gradients=False, random=True
    ),
    "hop_skip_jump l2": Case(
        attacks.hop_skip_jump,
        "l2",
        0.5,
        {"steps": 2, "first_probes": 30, "norm": "l2"},
        gradients=False,
        random=True,
    ),
    "noise": Case(attacks.noise, "linf", 0.1, {"tries": 4}, gradients=False, random=True),
    "noise l2": Case(attacks.noise, "l2", 0.5, {"tries": 4, "norm": "l2"}, gradients=False, random=True),
}
