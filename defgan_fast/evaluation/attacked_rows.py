"""One row of an evaluation: an attack on all images in groups, each of which is kept on disk when it is done.

A row's file is named by a hash of everything that the row depends on. A process that is killed loses the group that
it was at; the next call with the same arguments goes on behind the last group. Groups bound the memory; every image
is attacked and judged by itself, and where the defence draws random numbers, image by image with numbers of its own.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defgan_fast import attacks, files, progress
from defgan_fast.attacks._budget import Budget
from defgan_fast.evaluation import targets
from defgan_fast.evaluation.cache import weights_hash
from defgan_fast.evaluation.named_attacks import Attack
from defgan_fast.evaluation.threat import Threat
from defgan_fast.projector import Projector

# What is kept of each image, by the name of its array.
FIELDS = ("adversarial", "right", "undefended", "inside", "distances")


@dataclass
class Setting:
    """Everything that the rows of one evaluation share; see :func:`defgan_fast.evaluation.evaluate`."""

    classifier: nn.Module
    defence: nn.Module | None
    images: Tensor
    labels: Tensor
    threat: Threat
    eot: int
    votes: int
    held_out: Tensor | None
    substitute: Mapping[str, Any]
    seed: int
    value_range: tuple[float, float]
    group: int
    folder: Path | None
    quiet: bool
    judge: nn.Module = field(init=False)
    bare: nn.Module = field(init=False)
    surrogate: nn.Module | None = field(init=False)
    projector: Projector | None = field(init=False)

    def __post_init__(self) -> None:
        self.judge = targets.judged(self.classifier, self.defence, self.threat).eval()
        self.bare = targets.bare(self.classifier).eval()
        self.projector = targets.projector_in(self.defence, self.classifier)
        # The model whose gradients the attacker has; under "black_box" he has yet to train it.
        self.surrogate = None
        if self.threat.white_box:
            self.surrogate = targets.attackable(self.classifier, self.defence, self.threat).eval()
        elif self.threat.gradient == "transfer":
            self.surrogate = self.bare

    @property
    def undefended(self) -> bool:
        """Whether there is no defence at all, so that the judged classifier is the bare one."""
        return self.defence is None and self.bare is self.classifier

    def gradient_model(self) -> nn.Module:
        """Returns the model whose gradients the attacker has; a substitute is trained when it is first asked for."""
        if self.surrogate is None:
            assert self.held_out is not None
            with targets.own_randomness(self.held_out, self.seed, "substitute"):
                self.surrogate = attacks.train_substitute(
                    self.judge, self.held_out, seed=self.seed, value_range=self.value_range, **self.substitute
                )
        return self.surrogate

    def epsilon(self) -> float:
        """Returns the budget; where there is none, the radius of a ball that holds all images."""
        if self.threat.epsilon is not None:
            return self.threat.epsilon
        span = self.value_range[1] - self.value_range[0]
        return span if self.threat.norm == "linf" else span * math.sqrt(self.images[0].numel())

    def fingerprint(self) -> dict[str, Any]:
        """Returns what rows depend on, apart from the attack."""
        from defgan_fast._version import __version__

        return {
            "classifier": _describe(self.classifier),
            "defence": None if self.defence is None else _describe(self.defence),
            "images": _hash(self.images, self.labels),
            "threat": self.threat.as_dict(),
            "held_out": None if self.held_out is None else _hash(self.held_out),
            "substitute": repr(sorted(self.substitute.items())) if self.held_out is not None else None,
            "eot": self.eot,
            "votes": self.votes,
            "seed": self.seed,
            "value_range": list(self.value_range),
            "defgan_fast": __version__,
        }


@dataclass
class AttackedRow:
    """What an attack came to, for each of N images.

    Attributes:
        attack: with its settings.
        threat: under which the row holds, as a dict.
        adversarial: [N, C, H, W].
        right: [N] bool, whether the defended classifier finds the label, or the image is outside of the budget.
        undefended: [N] bool, the same of the bare classifier.
        inside: [N] bool, whether the image that the attack returned is inside the budget.
        distances: [N] float64 in the threat's norm.
        seconds: that the attack on the defended classifier took.
        counts: whether the row enters the minimum.
        error: why there is no result, for an attack that could not be made.
    """

    attack: Attack
    threat: dict[str, Any]
    adversarial: Tensor
    right: Tensor
    undefended: Tensor
    inside: Tensor
    distances: Tensor
    seconds: float
    counts: bool = True
    error: str | None = None


def attacked_row(setting: Setting, attack: Attack, counts: bool = True) -> AttackedRow:
    """Attacks all images with one attack, or takes from the folder what is there.

    Args:
        setting: of the evaluation; its group is the number of images attacked at once.
        attack: the name "clean" is that of no attack.
        counts: whether the row is to enter the minimum, where its attack is bounded.

    Raises:
        ValueError: the attack refuses its arguments, or returns something else than adversarial images.
        RuntimeError: the model passes no gradients.
        OSError: the folder cannot be written.
    """
    threat = setting.threat.as_dict()
    if not attack.gradients:
        threat["gradient"] = "none"
    if not attack.bounded:
        threat |= {"norm": "l2", "epsilon": None}
    file = (
        None
        if setting.folder is None
        else setting.folder / "rows" / f"{attack.name}-{_key(setting, attack)}.npz"
    )
    done, arrays, seconds = _read(file)
    total = len(setting.images)
    with progress.bar(total, attack.name, "image", initial=done, quiet=setting.quiet) as bar:
        while done < total or not arrays:
            rows = slice(done, min(done + setting.group, total))
            images, labels = setting.images[rows], setting.labels[rows]
            part, took = _group(setting, attack, threat, images, labels)
            arrays = {
                name: np.concatenate([arrays[name], part[name]]) if arrays else part[name] for name in FIELDS
            }
            seconds += took
            bar.update(rows.stop - done)
            done = rows.stop
            if file is not None:
                _write(file, arrays, seconds)
    tensors: dict[str, Any] = {
        name: torch.from_numpy(array).to(setting.images.device) for name, array in arrays.items()
    }
    return AttackedRow(attack, threat, **tensors, seconds=seconds, counts=counts and attack.bounded)


def _group(
    setting: Setting, attack: Attack, threat: dict[str, Any], images: Tensor, labels: Tensor
) -> tuple[dict[str, np.ndarray], float]:
    """Attacks some images; returns the arrays of FIELDS and the seconds that the defended classifier took."""
    began = time.perf_counter()
    if setting.threat.random and len(images):
        parts, chosen = [], []
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            with targets.own_randomness(image, setting.seed, f"attack {attack.name}"):
                parts.append(_attack(setting, attack, image, label, bare=False))
            with targets.own_randomness(image, setting.seed, "judgement"):
                chosen.append(targets.classes_of(setting.judge, parts[-1], setting.threat, setting.votes))
        adversarial, classes = torch.cat(parts), torch.cat(chosen)
    else:
        adversarial = _attack(setting, attack, images, labels, bare=False)
        classes = targets.classes_of(setting.judge, adversarial, setting.threat, setting.votes)
    seconds = time.perf_counter() - began
    budget = Budget(
        threat["norm"], math.inf if threat["epsilon"] is None else threat["epsilon"], setting.value_range
    )
    inside = budget.holds(adversarial, images)
    right = (classes == labels) | ~inside
    undefended = right
    if not setting.undefended:
        beside = _beside(setting, attack, images, labels, adversarial)
        with torch.no_grad():
            undefended = (setting.bare(beside).argmax(1) == labels) | ~budget.holds(beside, images)
    values = (adversarial, right, undefended, inside, budget.distances(adversarial, images))
    return {name: value.cpu().numpy() for name, value in zip(FIELDS, values, strict=True)}, seconds


def _beside(setting: Setting, attack: Attack, images: Tensor, labels: Tensor, adversarial: Tensor) -> Tensor:
    """Returns the images that the bare classifier is judged on.

    The same attack is made on it, but where the attack was one on another model in the first place.
    """
    if attack.name == "clean" or (attack.gradients and not attack.latent and not setting.threat.white_box):
        return adversarial
    return _attack(setting, attack, images, labels, bare=True)


def _attack(setting: Setting, attack: Attack, images: Tensor, labels: Tensor, bare: bool) -> Tensor:
    if attack.name == "clean":
        return images
    settings = {"seed": setting.seed, "value_range": setting.value_range, **attack.settings}
    if setting.eot > 1 and not bare:
        settings.setdefault("eot", setting.eot)
    if bare:
        model = setting.bare
    else:
        model = setting.gradient_model() if attack.gradients and not attack.latent else setting.judge
    if attack.latent:
        settings |= _latent_parts(setting, attack, images)
    epsilon = setting.epsilon() if attack.bounded else None
    adversarial = attack.function(model, images, labels, epsilon, **settings)
    if not isinstance(adversarial, Tensor) or adversarial.shape != images.shape:
        came = tuple(adversarial.shape) if isinstance(adversarial, Tensor) else type(adversarial).__name__
        raise ValueError(f"attack {attack.name!r} must return images {tuple(images.shape)}, got {came}")
    return adversarial.detach()


def _latent_parts(setting: Setting, attack: Attack, images: Tensor) -> dict[str, Any]:
    if setting.projector is None:
        raise ValueError(f"defence must have a Projector inside for attack {attack.name!r}, got none")
    parts: dict[str, Any] = {"generator": setting.projector.generator, "classifier": setting.bare}
    if "latents" not in attack.settings and "inversion_steps" not in attack.settings:
        with torch.no_grad():
            # A projector may be random; the attacker begins from a projection by starting points of his own.
            parts["latents"] = setting.projector.project(images, seed=setting.seed).latents
    return parts


def _describe(module: nn.Module) -> dict[str, Any]:
    """Returns weights and settings of a module, which decide what it does."""
    plain = (bool, int, float, str, tuple, list, type(None))
    settings = []
    for name, inside in module.named_modules():
        values = {
            key: _hash(value) if isinstance(value, Tensor) else value
            for key, value in sorted(vars(inside).items())
            if not key.startswith("_") and isinstance(value, (*plain, Tensor))
        }
        settings.append((name, type(inside).__name__, values))
    return {"weights": weights_hash(module), "settings": repr(settings)}


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(setting: Setting, attack: Attack) -> str:
    settings = {
        name: _hash(value) if isinstance(value, Tensor) else repr(value)
        for name, value in attack.settings.items()
    }
    function = getattr(attack.function, "__qualname__", repr(attack.function))
    everything = {**setting.fingerprint(), "attack": attack.name, "function": function, "settings": settings}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]


def _read(file: Path | None) -> tuple[int, dict[str, np.ndarray], float]:
    """Returns how many images are done, their arrays, and the seconds that they took."""
    if file is None or not file.exists():
        return 0, {}, 0.0
    try:
        with np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in FIELDS}
            return len(arrays["right"]), arrays, float(kept["seconds"])
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())}); delete it") from None


def _write(file: Path, arrays: Mapping[str, np.ndarray], seconds: float) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, seconds=np.float64(seconds), **arrays)  # type: ignore[arg-type]
    files.write_atomically(file, buffer.getvalue())
