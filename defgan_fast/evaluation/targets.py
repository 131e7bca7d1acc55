"""The models of an evaluation: the one that is judged, the one whose gradient the attacker has, the bare classifier.

All three are made of the same classifier and defence, without a copy of their weights: what differs are settings,
such as the gradient and the seed of a projector. Modules that were passed in are never changed.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from defgan_fast.evaluation.threat import Threat
from defgan_fast.projector import Projector


class StraightThrough(nn.Module):
    """Any defence, with the identity for its gradient."""

    def __init__(self, defence: nn.Module) -> None:
        super().__init__()
        self.defence = defence

    def forward(self, images: Tensor) -> Tensor:
        """Returns the defended images, [N, C, H, W], with the gradient of the images themselves."""
        with torch.no_grad():
            defended = self.defence(images)
        if not (torch.is_grad_enabled() and images.requires_grad):
            return defended
        # The difference of equal numbers is zero, so that the values stay those of the defence.
        return defended + (images - images.detach())


def variant(module: nn.Module, gradient: str | None = None, fresh: bool = False) -> nn.Module:
    """Returns the module with other settings, which shares every weight with it.

    Args:
        module: any; where there is nothing to set it is returned itself.
        gradient: of every projector in it; None leaves them as they are.
        fresh: whether every module in it with an int for a ``seed`` gets None instead.
    """
    settings: dict[str, str | None] = {}
    if gradient is not None and isinstance(module, Projector) and module.gradient != gradient:
        settings["gradient"] = gradient
    if fresh and isinstance(getattr(module, "seed", None), int):
        settings["seed"] = None
    # What is inside a projector is a generator, which has neither.
    inside = {} if isinstance(module, Projector) else dict(module.named_children())
    changed = {name: variant(child, gradient, fresh) for name, child in inside.items()}
    if not settings and all(changed[name] is child for name, child in inside.items()):
        return module
    found = copy.copy(module)
    for name, value in settings.items():
        setattr(found, name, value)
    if changed:
        found._modules = {**module._modules, **changed}
    return found


def projector_in(*modules: nn.Module | None) -> Projector | None:
    """Returns the first projector in the modules, None where there is none."""
    for module in modules:
        for inside in [] if module is None else module.modules():
            if isinstance(inside, Projector):
                return inside
    return None


def bare(classifier: nn.Module) -> nn.Module:
    """Returns a classifier without the projector that stands in front of it or inside of it."""
    if projector_in(classifier) is None:
        return classifier
    if isinstance(classifier, nn.Sequential) and projector_in(classifier[0]) is not None:
        return classifier[1:]
    inside = getattr(classifier, "classifier", None)
    if isinstance(inside, nn.Module) and projector_in(inside) is None:
        return inside
    raise ValueError(
        "classifier must be a bare one with defence=..., or have its own in `classifier`, "
        f"got {type(classifier).__name__} with a projector inside"
    )


def judged(classifier: nn.Module, defence: nn.Module | None, threat: Threat) -> nn.Module:
    """Returns the defended classifier, images to logits, whose answers count."""
    fresh = threat.random
    if defence is None:
        return variant(classifier, fresh=fresh)
    return nn.Sequential(variant(defence, fresh=fresh), variant(classifier, fresh=fresh))


def attackable(classifier: nn.Module, defence: nn.Module | None, threat: Threat) -> nn.Module:
    """Returns the defended classifier with the gradient that a white-box attacker uses, images to logits."""
    fresh, gradient = threat.random, threat.gradient
    classifier = variant(classifier, gradient, fresh)
    if defence is None:
        return classifier
    defence = variant(defence, gradient, fresh)
    if gradient == "straight_through" and not isinstance(defence, Projector):
        defence = StraightThrough(defence)
    return nn.Sequential(defence, classifier)


@contextmanager
def own_randomness(image: Tensor, seed: int, purpose: str) -> Iterator[None]:
    """Gives torch's global random states values of an image's own, and puts them back afterwards.

    A randomised defence draws from these states, so that what an image meets depends on the seed and on its own
    pixels, and not on the images that were attacked before it.
    """
    pixels = image.detach().float().cpu().contiguous().numpy().tobytes()
    digest = hashlib.blake2b(f"{seed} {purpose} ".encode() + pixels, digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    devices = [image.device] if image.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(number)
        for device in devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(number)
        yield


@torch.no_grad()
def classes_of(model: nn.Module, images: Tensor, threat: Threat, votes: int) -> Tensor:
    """Returns the class of each image [N, C, H, W], [N] int64; under "vote" the majority of so many draws.

    Of classes with equally many votes the first one wins.
    """
    if threat.starts != "vote":
        found: Tensor = model(images).argmax(1)
        return found
    copies = images.unsqueeze(1).expand(-1, votes, -1, -1, -1).flatten(0, 1)
    return model(copies).argmax(1).view(len(images), votes).mode(1).values
