"""The evaluation of a classifier, with or without a defence, under a threat: attacks, checks, and the headline."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defgan_fast import arguments, attacks, files
from defgan_fast.attacks._budget import check
from defgan_fast.evaluation import checks, tables
from defgan_fast.evaluation.attacked_rows import AttackedRow, Setting, attacked_row
from defgan_fast.evaluation.metrics import interval
from defgan_fast.evaluation.named_attacks import Attack, resolve
from defgan_fast.evaluation.threat import Threat

REPORT = "report.json"
# Copies of each image over which attacks on a randomised defence average.
COPIES = 10
VOTES = 9
GROUP = 64
# The attack that must break everything where it has no budget, on a few images.
UNBOUNDED_STEPS = 20


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to.

    Attributes:
        threat: under which its attacks were made.
        images: [N, C, H, W], those that were attacked.
        labels: [N] int64.
        value_range: (low, high) of the images.
        attacked: a row for each attack, with its images; the first is "clean", the images as they are.
        rows: the same as dicts of numbers and words: attack, threat, images, accuracy, low and high (95%),
            undefended, seconds, settings, counts (whether it enters the minimum), error.
        minimum: accuracy left when each image meets the attack that is worst for it: the headline. None where an
            attack that was asked for could not be made.
        minimum_interval: (low, high) of 95%.
        warnings: a sentence for each sanity check that fired, by its name; see
            :mod:`defgan_fast.evaluation.checks`.
    """

    threat: Threat
    images: Tensor
    labels: Tensor
    value_range: tuple[float, float]
    attacked: tuple[AttackedRow, ...]
    rows: tuple[dict[str, Any], ...]
    minimum: float | None
    minimum_interval: tuple[float, float] | None
    warnings: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Returns all numbers and words, which serialise to JSON."""
        return {
            "threat": self.threat.as_dict(),
            "images": len(self.images),
            "minimum": self.minimum,
            "low": None if self.minimum_interval is None else self.minimum_interval[0],
            "high": None if self.minimum_interval is None else self.minimum_interval[1],
            "rows": list(self.rows),
            "warnings": self.warnings,
        }

    def markdown(self) -> str:
        """Returns a table of the rows, the headline and the checks."""
        return tables.markdown(self.as_dict())


def evaluate(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    defence: nn.Module | None = None,
    attacks: Sequence[str | Attack] | None = None,
    threat: Threat = Threat(),  # noqa: B008
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    held_out: Tensor | None = None,
    substitute: Mapping[str, Any] | None = None,
    eot: int | None = None,
    votes: int = VOTES,
    probe: int = 8,
    beside: Sequence[Evaluation] = (),
    seed: int = 0,
    value_range: tuple[float, float] = (0.0, 1.0),
    group: int = GROUP,
    folder: str | os.PathLike[str] | None = None,
    quiet: bool = True,
) -> Evaluation:
    """Attacks a classifier behind a defence, and says what is left.

    Args:
        classifier: images to logits [N, classes]; put in eval mode. One with its own projector inside, such as a
            vote over reconstructions, is evaluated with ``defence=None``.
        images: [N, C, H, W] floating point, in ``value_range``, on the classifier's device; N at least 1.
        labels: [N] int64, the true classes.
        defence: images to images; None: none.
        attacks: names (see :mod:`defgan_fast.evaluation.named_attacks`) or attacks of your own; None: those that suit
            the norm.
        threat: budget, gradient and randomness.
        settings: of attacks, by name, laid over their own.
        held_out: [M, C, H, W], the attacker's own images, for ``gradient="black_box"``; none of ``images``.
        substitute: further arguments of :func:`defgan_fast.attacks.train_substitute`.
        eot: copies of each image over which attacks average; None: 10 where the threat is random, else 1.
        votes: draws of the majority under ``starts="vote"``.
        probe: the checks of gradients and outputs, and an attack without a budget, see the first so many images; 0
            leaves them out.
        beside: other evaluations of the same images, whose attacks the checks compare with these.
        seed: with an image's pixels it decides all random numbers that the image meets.
        value_range: (low, high) of the pixels.
        group: images attacked at once, which bounds the memory. Where the defence is random it is one by itself.
        folder: where finished groups of each row are kept, so that an interrupted call goes on, and where
            ``report.json`` is written; None keeps nothing.
        quiet: whether to show no progress bars.

    Returns:
        An :class:`Evaluation`.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: a model passes no gradients and ``probe`` is 0, or returns NaN.
        OSError: the folder cannot be written.

    Example:
        >>> result = evaluate(classifier, images, labels, defence=projector, threat=Threat("linf", 0.3))
        >>> print(result.markdown())
    """
    chosen = resolve(attacks, threat, settings)
    check(images, labels, threat.epsilon, value_range, threat.norm)
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got 0")
    if threat.gradient == "black_box" and (held_out is None or len(held_out) == 0):
        raise ValueError("held_out must hold the attacker's own images for gradient 'black_box', got none")
    for other in beside:
        if not torch.equal(other.images, images):
            raise ValueError("beside must hold evaluations of the same images, got one of others")
    setting = Setting(
        classifier,
        defence,
        images.detach(),
        labels,
        threat,
        (COPIES if threat.random else 1) if eot is None else arguments.count("eot", eot),
        arguments.count("votes", votes),
        held_out,
        dict(substitute or {}),
        seed,
        value_range,
        arguments.count("group", group),
        None if folder is None else Path(folder),
        quiet,
    )
    arguments.count("probe", probe, least=0)
    found, blind = checks.model_checks(setting, probe)
    rows = [attacked_row(setting, Attack("clean", _nothing, gradients=False))]
    for attack in chosen:
        if blind is not None and attack.gradients and not attack.latent:
            rows.append(_refused(setting, attack, blind))
        else:
            rows.append(attacked_row(setting, attack))
    if probe and threat.white_box and blind is None:
        rows.append(_unbounded(setting, probe))
    found |= checks.row_checks(rows, [other.attacked for other in beside])
    result = _summary(setting, tuple(rows), found)
    if folder is not None:
        files.write_json(Path(folder) / REPORT, result.as_dict())
    return result


def accuracy_curve(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilons: Sequence[float],
    *,
    threat: Threat = Threat(),  # noqa: B008
    attacks: Sequence[str | Attack] = ("apgd",),
    beside: Sequence[Evaluation] = (),
    **settings: Any,
) -> list[Evaluation]:
    """Evaluates the same images under several budgets, from the least to the largest.

    Args:
        classifier, images, labels, attacks: see :func:`evaluate`.
        epsilons: at least one; each replaces the threat's.
        threat: its norm, gradient and randomness hold for all.
        beside: evaluations that the checks of each compare with, beside those of smaller budgets.
        settings: further arguments of :func:`evaluate`.

    Returns:
        An evaluation for each budget. One whose attacks break fewer images than under a smaller budget has a warning.
    """
    found: list[Evaluation] = []
    for epsilon in sorted(epsilons):
        found.append(
            evaluate(
                classifier,
                images,
                labels,
                threat=replace(threat, epsilon=epsilon),
                attacks=attacks,
                beside=[*beside, *found],
                probe=0,
                **settings,
            )
        )
    return found


def _nothing(model: nn.Module, images: Tensor, *_: Any, **__: Any) -> Tensor:
    return images


def _unbounded(setting: Setting, probe: int) -> AttackedRow:
    """Attacks the first images without a budget, as a check of the gradients."""
    free = replace(
        setting,
        images=setting.images[:probe],
        labels=setting.labels[:probe],
        threat=replace(setting.threat, epsilon=None),
    )
    settings = {"norm": free.threat.norm, "steps": UNBOUNDED_STEPS, "step_rule": "auto", "loss": "margin"}
    return attacked_row(free, Attack("unbounded", attacks.pgd, settings), counts=False)


def _refused(setting: Setting, attack: Attack, reason: str) -> AttackedRow:
    count, device = len(setting.images), setting.images.device
    yes = torch.ones(count, dtype=torch.bool, device=device)
    distances = torch.zeros(count, dtype=torch.float64, device=device)
    return AttackedRow(
        attack,
        setting.threat.as_dict(),
        setting.images,
        yes,
        yes,
        yes,
        distances,
        0.0,
        attack.bounded,
        reason,
    )


def _summary(setting: Setting, rows: tuple[AttackedRow, ...], found: dict[str, str]) -> Evaluation:
    counting = [row for row in rows if row.counts]
    minimum, between = None, None
    if all(row.error is None for row in counting):
        left = torch.stack([row.right for row in counting]).all(0)
        minimum, between = float(left.double().mean()), interval(int(left.sum()), len(left))
    return Evaluation(
        setting.threat,
        setting.images,
        setting.labels,
        setting.value_range,
        rows,
        tuple(_as_dict(row, setting) for row in rows),
        minimum,
        between,
        found,
    )


def _as_dict(row: AttackedRow, setting: Setting) -> dict[str, Any]:
    hits, count = int(row.right.sum()), len(row.right)
    low, high = interval(hits, count)
    ran = row.error is None
    settings = {**row.attack.settings, "eot": setting.eot} if setting.eot > 1 else row.attack.settings
    return {
        "attack": row.attack.name,
        "threat": row.threat,
        "images": count,
        "accuracy": hits / count if ran else None,
        "low": low if ran else None,
        "high": high if ran else None,
        "undefended": float(row.undefended.double().mean()) if ran else None,
        "seconds": round(row.seconds, 3),
        "settings": {name: _plain(value) for name, value in settings.items()},
        "counts": row.counts,
        "error": row.error,
    }


def _plain(value: Any) -> Any:
    """Returns a setting as JSON can hold it."""
    if isinstance(value, bool | int | float | str | None):
        return value
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
