"""The black-box attack: a substitute is trained on the labels that the target gives, and attacked in its place.

The attacker sees neither weights nor gradients nor probabilities. From a few images of his own he asks the target
for labels, trains a network on them, moves each image a little along that network's Jacobian, asks again, and so
on. Adversarial images of the substitute often fool the target, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defgan_fast import arguments, models
from defgan_fast.attacks._budget import check
from defgan_fast.attacks._meter import Meter, Progress
from defgan_fast.attacks._objective import Objective, check_logits
from defgan_fast.attacks.fgsm import fgsm

# The released code's training of substitutes.
LEARNING_RATE, BATCH = 1e-3, 128
QUERY_BATCH = 64


def black_box(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float = 0.3,
    *,
    held_out: Tensor,
    substitute: str | nn.Module = "E",
    attack: Callable[..., Tensor] = fgsm,
    settings: dict[str, Any] | None = None,
    rounds: int = 6,
    step: float = 0.1,
    epochs: int = 10,
    targeted: bool = False,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> Tensor:
    """The attack of "Practical black-box attacks against machine learning" (Papernot et al., AsiaCCS 2017).

    :func:`train_substitute`, then ``attack`` on the substitute: the Defense-GAN paper's black box is FGSM. To
    attack several groups of images train once and call the attack itself.

    Args:
        model: the target, defence included, images to logits [N, classes]; asked for labels only.
        images: [N, C, H, W] floating point, in ``value_range``; none of them in ``held_out``.
        labels: [N] int64, the true classes; with ``targeted`` the classes to reach.
        epsilon: budget of ``attack``.
        held_out: [M, C, H, W], the attacker's own images; the paper has 150 of the test images.
        substitute: see :func:`train_substitute`.
        attack: an attack of this package, on the substitute.
        settings: more arguments of ``attack``.
        rounds, step, epochs: see :func:`train_substitute`.
        targeted: labels are classes to reach.
        seed: of the substitute's weights and batches, and of ``attack``.
        value_range: (low, high) of the pixels.
        progress: called with (done, total) during the training, in batches and queries.

    Returns:
        [N, C, H, W], detached: what ``attack`` returns. Nothing was asked about these images.

    Raises:
        ValueError: an argument does not fit.

    Example:
        >>> adversarial = black_box(defended, images[150:], labels[150:], 0.3, held_out=images[:150])
    """
    check(images, labels, epsilon, value_range)
    network = train_substitute(
        model,
        held_out,
        substitute=substitute,
        rounds=rounds,
        step=step,
        epochs=epochs,
        seed=seed,
        value_range=value_range,
        progress=progress,
    )
    chosen = {"targeted": targeted, "seed": seed, "value_range": value_range, **(settings or {})}
    return attack(network, images, labels, epsilon, **chosen)


def train_substitute(
    model: nn.Module,
    held_out: Tensor,
    *,
    substitute: str | nn.Module = "E",
    rounds: int = 6,
    step: float = 0.1,
    epochs: int = 10,
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> nn.Module:
    """Trains a network to answer as the target does, by Jacobian-based augmentation.

    Each round trains the network for ``epochs`` (Adam 1e-3, batches of 128, as in the released code) on all images
    so far, then doubles them: every image moves by ``step`` along the sign of the gradient of its label's
    log-probability, and the target is asked for the new one's label. The last round only trains. 150 images and
    6 rounds are 4,800 queries. The labels are the target's own, for the first images too.

    Args:
        model: the target, images to logits [N, classes]; asked for labels only, without gradients.
        held_out: [M, C, H, W] floating point, in ``value_range``, M at least 1.
        substitute: a name of :class:`defgan_fast.models.Classifier`'s architectures, or a module with weights,
            which is trained in place.
        rounds: of training, at least 1.
        step: of the augmentation, in units of the pixels.
        epochs: in each round.
        seed: of the weights and of the batches.
        value_range: (low, high) of the pixels.
        progress: called with (done, total), in batches and queries.

    Returns:
        The substitute, in eval mode, on the device of ``held_out``.

    Raises:
        ValueError: an argument does not fit.

    Example:
        >>> network = train_substitute(defended, images[:150], substitute="E")
        >>> adversarial = fgsm(network, images[150:], labels[150:], 0.3)
    """
    check(held_out, torch.zeros(len(held_out), dtype=torch.int64, device=held_out.device), None, value_range)
    if len(held_out) == 0:
        raise ValueError("held_out must hold at least one image, got 0")
    arguments.count("rounds", rounds)
    arguments.count("epochs", epochs)
    arguments.number("step", step, above=0)
    images = held_out.detach().clone()
    sizes = [len(images) * 2**number for number in range(rounds)]
    batches = sum(epochs * -(-size // BATCH) for size in sizes)
    meter = Meter(progress, batches + sizes[-1])
    devices = [images.device] if images.device.type == "cuda" else []
    # Initial weights and dropout draw from the global states, which are put back afterwards.
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        labels, classes = _labels(model, images, meter)
        network = _network(substitute, images, classes)
        order = torch.Generator().manual_seed(seed)
        for number in range(rounds):
            _train(network, images, labels, epochs, order, meter)
            if number < rounds - 1:
                new = _augmented(network, images, labels, step, value_range)
                new_labels, _ = _labels(model, new, meter)
                images, labels = torch.cat((images, new)), torch.cat((labels, new_labels))
    meter.finish()
    return network.eval()


def _labels(model: nn.Module, images: Tensor, meter: Meter) -> tuple[Tensor, int]:
    """The target's labels [N] and its number of classes."""
    parts = []
    with torch.no_grad():
        for group in images.split(QUERY_BATCH):
            logits = model(group)
            check_logits(logits, torch.zeros(len(group), dtype=torch.int64))
            parts.append(logits.argmax(1))
            meter.advance(len(group))
    return torch.cat(parts), logits.shape[1]


def _network(substitute: str | nn.Module, images: Tensor, classes: int) -> nn.Module:
    if isinstance(substitute, nn.Module):
        return substitute
    return models.Classifier(substitute, list(images.shape[1:]), classes).to(images)


def _train(
    network: nn.Module, images: Tensor, labels: Tensor, epochs: int, order: torch.Generator, meter: Meter
) -> None:
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).to(images.device).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            meter.advance(1)
    optimizer.zero_grad(set_to_none=True)


def _augmented(
    network: nn.Module, images: Tensor, labels: Tensor, step: float, value_range: tuple[float, float]
) -> Tensor:
    """Images moved along the sign of the gradient of their label's log-probability, in the range."""
    network.eval()
    objective = Objective(network, "cross_entropy", targeted=True)
    moved = []
    for group, own in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        gradients = objective.differentiate(group, own).gradients
        assert gradients is not None
        moved.append((group + step * gradients.sign()).clamp(*value_range))
    return torch.cat(moved)
