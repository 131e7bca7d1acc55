"""What an attacker is allowed to do and what he knows: the conditions under which an accuracy holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from defgan_fast import arguments

NORMS = ("linf", "l2")
GRADIENTS = ("transfer", "straight_through", "unrolled", "black_box")
STARTS = ("known", "fresh", "vote")


@dataclass(frozen=True)
class Threat:
    """A threat model.

    Args:
        norm: "linf", the largest change of a pixel, or "l2", the root of the summed squares of all changes.
        epsilon: the largest change in that norm, at least 0; None for an attacker without a budget.
        gradient: "transfer": the attacker knows the bare classifier and not the defence. "straight_through": he
            goes through the defence, whose gradient he takes for the identity (BPDA, Athalye, Carlini, Wagner, ICML
            2018). "unrolled": he has the defence's own gradient; for a projector that is the one through all of its
            steps, for any other module what autograd gives. "black_box": he sees the defended labels alone and
            trains a substitute on them (Papernot et al., AsiaCCS 2017).
        starts: "known": the defence's random numbers are fixed and known to the attacker. "fresh": the defence draws
            new ones at every call; the attacker works with expectations, and the result is judged by one new draw.
            "vote": the same, judged by the majority of several draws.

    Raises:
        ValueError: a word is none of those, or epsilon is negative.
    """

    norm: str = "linf"
    epsilon: float | None = 0.3
    gradient: str = "straight_through"
    starts: str = "known"

    def __post_init__(self) -> None:
        arguments.choice("norm", self.norm, NORMS)
        arguments.choice("gradient", self.gradient, GRADIENTS)
        arguments.choice("starts", self.starts, STARTS)
        if self.epsilon is not None:
            arguments.number("epsilon", self.epsilon, least=0)

    @property
    def random(self) -> bool:
        """Whether the defence draws its random numbers anew at every call."""
        return self.starts != "known"

    @property
    def white_box(self) -> bool:
        """Whether the attacker's gradients are those of the defended classifier."""
        return self.gradient in ("straight_through", "unrolled")

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return asdict(self)
