"""The attacks of an evaluation by name, with the settings that each has unless it is told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from defgan_fast import arguments, attacks
from defgan_fast.evaluation.threat import Threat


class Attack(NamedTuple):
    """An attack with its settings; a function of your own may be evaluated like those with a name.

    Attributes:
        name: of its row.
        function: ``(model, images, labels, epsilon, **settings)`` to adversarial images, as in
            :mod:`defgan_fast.attacks`.
        settings: further arguments of the function.
        gradients: whether it asks for gradients, so that it is made against the model that the threat's gradient
            names; the others ask the defended classifier itself.
        latent: whether it searches in the generator's latent space: it then gets ``generator`` and ``classifier``,
            and the latents of the images' projections where the generator has a projector.
        bounded: whether the function gets the threat's epsilon; without it any distance counts, and the attack does
            not enter the minimum.
    """

    name: str
    function: Callable[..., Tensor]
    settings: Mapping[str, Any] = {}
    gradients: bool = True
    latent: bool = False
    bounded: bool = True


LINF_ONLY = ("rand_fgsm", "square")
L2_ONLY = ("latent_lagrange",)
NAMES = (
    "noise",
    "fgsm",
    "rand_fgsm",
    "pgd",
    "apgd",
    "cw",
    "square",
    "hop_skip_jump",
    "latent",
    "latent_lagrange",
)
DEFAULT = {"linf": ("noise", "fgsm", "pgd", "apgd", "square"), "l2": ("noise", "fgsm", "pgd", "apgd", "cw")}


def resolve(
    chosen: Sequence[str | Attack] | None, threat: Threat, settings: Mapping[str, Mapping[str, Any]] | None
) -> list[Attack]:
    """Returns attacks for names, with the settings given by name laid over their own.

    Raises:
        ValueError: a name is unknown or comes twice, or an attack does not exist under the threat.
    """
    settings = dict(settings or {})
    found = [
        _named(each, threat) if isinstance(each, str) else each
        for each in (DEFAULT[threat.norm] if chosen is None else chosen)
    ]
    names = [each.name for each in found]
    if len(set(names)) != len(names) or "clean" in names:
        raise ValueError(f"attacks must have different names, none of them 'clean', got {', '.join(names)}")
    for name in settings:
        arguments.choice("settings", name, names)
    for each in found:
        if each.latent and threat.gradient == "black_box":
            raise ValueError(f"attacks must need labels alone under gradient 'black_box', got {each.name!r}")
    return [
        each._replace(settings={**each.settings, **settings.get(each.name, {})})
        if each.name in settings
        else each
        for each in found
    ]


def _named(name: str, threat: Threat) -> Attack:
    arguments.choice("attacks", name, NAMES)
    if threat.norm == "l2" and name in LINF_ONLY:
        raise ValueError(f"attacks must exist in the norm 'l2', got {name!r}, which is for 'linf'")
    if threat.norm == "linf" and name in L2_ONLY:
        raise ValueError(f"attacks must exist in the norm 'linf', got {name!r}, which is for 'l2'")
    norm: dict[str, Any] = {"norm": threat.norm}
    # An attack on another model must go on where that model is fooled already.
    goes_on = {} if threat.white_box else {"early_stop": False}
    if name == "noise":
        return Attack(name, attacks.noise, {**norm, "tries": 20}, gradients=False)
    if name == "fgsm":
        return Attack(name, attacks.fgsm, norm)
    if name == "rand_fgsm":
        return Attack(name, attacks.rand_fgsm)
    if name == "pgd":
        return Attack(name, attacks.pgd, {**norm, "steps": 40, **goes_on})
    if name == "apgd":
        return Attack(
            name, attacks.pgd, {**norm, "steps": 40, "step_rule": "auto", "loss": "margin", **goes_on}
        )
    if name == "square":
        return Attack(name, attacks.square, {"queries": 200}, gradients=False)
    if name == "hop_skip_jump":
        return Attack(name, attacks.hop_skip_jump, {**norm, "steps": 3}, gradients=False)
    if name == "latent":
        return Attack(name, attacks.latent_cw, {**norm, "iterations": 500, "search_steps": 2}, latent=True)
    if name == "latent_lagrange":
        return Attack(name, attacks.latent_lagrange, {"iterations": 1000, "noises": 10}, latent=True)
    if threat.norm == "l2":
        search = {"iterations": 100, "learning_rate": 0.05, "initial_c": 1.0, "search_steps": 4}
        return Attack(name, attacks.cw, search)
    # The paper's recipe, which knows no budget.
    return Attack(name, attacks.cw, {}, bounded=False)
