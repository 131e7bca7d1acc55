"""Signs that an evaluation says more of its attacks than of the defence.

They follow "On evaluating adversarial robustness" (Carlini et al., 2019), "Obfuscated gradients give a false sense of
security" (Athalye et al., ICML 2018), and the flags of AutoAttack. A check that fires is no proof of a fault, and none
that is silent proves an evaluation good. Two attacks are compared on the same images, and one is called weaker only
where chance does not explain it: a straight-through gradient can honestly break fewer images than another attack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defgan_fast.attacks._objective import margins
from defgan_fast.evaluation.attacked_rows import AttackedRow, Setting
from defgan_fast.evaluation.targets import own_randomness

# The chance that a comparison of equal attacks fires.
SIGNIFICANCE = 0.01
# Gradients are tiny where a step of the full budget along them would move the margin by less than this share of it.
TINY = 1e-3
# So many images may have a gradient of zeros: a classifier's last ReLUs may be dead for one.
FEW = 0.1
LEFT_BY_UNBOUNDED = 0.05
# The settings that say how long an attack searches.
EFFORT = ("steps", "iterations", "queries", "tries")


def chance(only_first: int, only_second: int) -> float:
    """Returns the chance that the second of two equal attacks breaks so many more images than the first.

    It is McNemar's test in its exact form: of the images that one attack alone breaks, each is the second's with
    probability one half.

    Args:
        only_first: number of images that the first attack alone breaks.
        only_second: number of images that the second attack alone breaks.
    """
    total = only_first + only_second
    return sum(math.comb(total, hits) for hits in range(only_second, total + 1)) / 2**total


def significantly_weaker(first: Tensor, second: Tensor) -> bool:
    """Returns whether the first attack breaks significantly fewer images, [N] bool of broken images each."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return chance(only_first, only_second) < SIGNIFICANCE


def model_checks(setting: Setting, probe: int) -> tuple[dict[str, str], str | None]:
    """Looks at the models themselves with the first images: gradients, outputs, random numbers.

    Args:
        setting: of the evaluation; a substitute is not looked at.
        probe: number of images.

    Returns:
        A sentence for each check that fired, by its name; and why attacks by gradient cannot be made, None where
        they can.
    """
    images, labels = setting.images[:probe], setting.labels[:probe]
    if len(images) == 0:
        return {}, None
    found: dict[str, str] = {}
    with torch.no_grad(), own_randomness(images[:1], setting.seed, "checks"):
        logits, again = setting.judge(images), setting.judge(images)
    if is_softmax(logits):
        found["softmax_output"] = (
            "the model returns probabilities where logits are expected: its cross-entropy is squashed and its "
            "gradients fade; leave the softmax out"
        )
    if not torch.equal(logits, again) and setting.eot == 1:
        found["randomised_without_expectation"] = (
            "the model answers differently when it is asked twice, and the attacks do not average over copies: "
            "use starts='fresh', or eot=10 and more"
        )
    if setting.surrogate is None:
        return found, None
    with own_randomness(images[:1], setting.seed, "checks"):
        gradients = gradient_checks(setting.surrogate, images, labels, setting.threat.norm, setting.epsilon())
    return found | gradients.found, gradients.blind


class Gradients(NamedTuple):
    """What is found of a model's gradients.

    Attributes:
        found: a sentence for each check that fired, by its name.
        blind: why no image has a gradient to follow, None where one has.
    """

    found: dict[str, str]
    blind: str | None


def is_softmax(logits: Tensor) -> bool:
    """Returns whether a model's answers [N, classes] are probabilities: not negative, and of sum 1."""
    flat = logits.detach().double()
    return bool((flat >= 0).all() and torch.allclose(flat.sum(1), torch.ones_like(flat[:, 0]), atol=1e-4))


def gradient_checks(model: nn.Module, images: Tensor, labels: Tensor, norm: str, epsilon: float) -> Gradients:
    """Looks at the gradient of the margin, which does not fade where a classifier is sure, at some images."""
    with torch.enable_grad():
        points = images.detach().clone().requires_grad_()
        margin = margins(model(points), labels)
        gradients = None
        if margin.requires_grad:
            (gradients,) = torch.autograd.grad(margin.sum(), points, allow_unused=True)
    if gradients is None:
        sentence = "the model's output does not depend on its images differentiably"
        return Gradients({"zero_gradients": sentence}, sentence)
    found, flat = {}, gradients.double().flatten(1)
    lost = ~flat.isfinite().all(1)
    if lost.any():
        found["nan_gradients"] = f"{int(lost.sum())} of {len(flat)} gradients are not finite"
    dead = ~(flat != 0).any(1)
    if int(dead.sum()) > FEW * len(flat):
        found["zero_gradients"] = f"{int(dead.sum())} of {len(flat)} gradients are zero"
    # What a step of the full budget would gain if the model were linear.
    reach = epsilon * (flat.abs().sum(1) if norm == "linf" else flat.square().sum(1).sqrt())
    tiny = (reach < TINY * margin.detach().double().abs()) & ~dead & ~lost
    if 2 * int(tiny.sum()) > len(flat):
        found["tiny_gradients"] = (
            f"for {int(tiny.sum())} of {len(flat)} images the gradient promises less than {TINY:g} of the margin "
            "within the whole budget: it is scaled down somewhere"
        )
    blind = "the model passes no gradient to its images that is finite and not zero"
    return Gradients(found, blind if bool((lost | dead).all()) else None)


def row_checks(rows: Sequence[AttackedRow], beside: Sequence[Sequence[AttackedRow]] = ()) -> dict[str, str]:
    """Compares the rows of an evaluation with each other, and with those of others on the same images.

    Args:
        rows: of the evaluation.
        beside: rows of other evaluations of the same classifier and defence.

    Returns:
        A sentence for each check that fired, by its name; of several occasions the first.
    """
    mine = [row for row in rows if row.error is None]
    others = [row for result in beside for row in result if row.error is None]
    found: dict[str, str] = {}
    for name, sentence in (
        *_outside(mine),
        *_unbounded(mine),
        *_weaker_than_black_box(mine, [*mine, *others]),
        *_weaker_with_more_steps(mine),
        *_weaker_with_larger_epsilon([*mine, *others]),
    ):
        found.setdefault(name, sentence)
    return found


def _outside(rows: Sequence[AttackedRow]) -> Iterable[tuple[str, str]]:
    for row in rows:
        outside = int((~row.inside).sum())
        if outside:
            yield (
                "budget_exceeded",
                f"{row.attack.name} leaves the budget for {outside} of {len(row.inside)} images "
                f"(largest distance {float(row.distances.max()):.4g}); they count as not broken",
            )


def _unbounded(rows: Sequence[AttackedRow]) -> Iterable[tuple[str, str]]:
    for row in rows:
        if row.threat["epsilon"] is not None or row.attack.name in ("clean", "noise") or not len(row.right):
            continue
        left = float(row.right.double().mean())
        if left > LEFT_BY_UNBOUNDED:
            yield (
                "unbounded_attack_fails",
                f"{row.attack.name} has no budget and leaves {left:.0%} of the images, at most "
                f"{LEFT_BY_UNBOUNDED:.0%} are expected: the attack does not work on this model",
            )


def _weaker_than_black_box(
    mine: Sequence[AttackedRow], rows: Sequence[AttackedRow]
) -> Iterable[tuple[str, str]]:
    white = [
        row
        for row in mine
        if row.counts
        and row.threat["gradient"] in ("straight_through", "unrolled")
        and row.attack.name != "clean"
    ]
    if not white:
        return
    # Together, since one attack of a few steps may honestly be weaker than a long search without gradients.
    broken = torch.stack([~row.right for row in white]).any(0)
    for row in rows:
        blind = row.threat["gradient"] in ("none", "transfer", "black_box") and row.attack.name != "clean"
        if not blind or not row.counts or not _same(row, white[0], ("norm", "epsilon", "starts")):
            continue
        if significantly_weaker(broken, ~row.right):
            yield (
                "white_box_weaker_than_black_box",
                f"{row.attack.name} ({row.threat['gradient']}) breaks {int((~row.right).sum())} of "
                f"{len(broken)} images, the attacks with the defence's gradient together {int(broken.sum())}: "
                "the gradient is at fault",
            )


def _weaker_with_more_steps(rows: Sequence[AttackedRow]) -> Iterable[tuple[str, str]]:
    for first in rows:
        for second in rows:
            more = _more_effort(first, second)
            if (
                more
                and _same(first, second, tuple(first.threat))
                and significantly_weaker(~second.right, ~first.right)
            ):
                yield (
                    "more_steps_weaker",
                    f"{second.attack.name} makes more steps than {first.attack.name} and breaks "
                    f"{int((~second.right).sum())} images instead of {int((~first.right).sum())}",
                )


def _more_effort(first: AttackedRow, second: AttackedRow) -> bool:
    """Whether the second row is the first one's attack with more steps and all else equal."""
    if first.attack.name == "fgsm" and second.attack.name == "pgd":
        return True  # the same loss, in one step
    a, b = dict(first.attack.settings), dict(second.attack.settings)
    if first.attack.function is not second.attack.function or first.attack.name in ("clean", "unbounded"):
        return False
    different = [name for name in {*a, *b} if not _equal(a.get(name), b.get(name))]
    if len(different) != 1 or different[0] not in EFFORT:
        return False
    name = different[0]
    return a.get(name) is not None and b.get(name) is not None and b[name] > a[name]


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    return type(a) is type(b) and bool(a == b)


def _weaker_with_larger_epsilon(rows: Sequence[AttackedRow]) -> Iterable[tuple[str, str]]:
    bounded = [row for row in rows if row.threat["epsilon"] is not None and row.attack.name != "clean"]
    for small in bounded:
        for large in bounded:
            comparable = (
                small.attack.name == large.attack.name
                and large.threat["epsilon"] > small.threat["epsilon"]
                and _same(small, large, ("norm", "gradient", "starts"))
            )
            if comparable and significantly_weaker(~large.right, ~small.right):
                yield (
                    "larger_epsilon_weaker",
                    f"{large.attack.name} breaks {int((~large.right).sum())} images with epsilon "
                    f"{large.threat['epsilon']:g} and {int((~small.right).sum())} with {small.threat['epsilon']:g}",
                )


def _same(first: AttackedRow, second: AttackedRow, names: Sequence[str]) -> bool:
    return len(first.right) == len(second.right) and all(first.threat[n] == second.threat[n] for n in names)
