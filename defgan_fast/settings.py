"""The settings of a projector: their rules and their types, and whether one has changed since it was checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, precisions, reference
from .plan import tensors_of
from .precisions import name_of

_STARTS = ("random", "nearest")
_PRECISIONS = ("auto", *precisions.ALL)
_GRADIENTS = ("straight_through", "unrolled", "none")
_BACKENDS = ("auto", "cpu", "cuda", "reference")

# Sizes beyond every use; what follows from them must not be allocated before somebody notices a slip.
MOST_STEPS = 1_000_000
MOST_RESTARTS = 65_536
MOST_ROWS = 2**31 - 1
MOST_CANDIDATES = 2**20
LARGEST_RADIUS = 1e18  # squares of larger norms leave float32


FAST: dict[str, Any] = {"starts": "nearest", "radius": "auto", "restarts": 2, "steps": 25}
"""What `Projector.fast` sets; `docs/descents.md` has the measurements by which it was chosen."""


class Settings(nn.Module):
    """A module that holds the settings of a projector as attributes; `Projector` says what each means."""

    generator: nn.Module
    steps: int
    restarts: int
    lr: float
    momentum: float
    lr_decay: float
    decay_at: float
    seed: int | None
    starts: str
    start_std: float | None
    candidates: int | Tensor
    radius: float | str | None
    keep: Sequence[tuple[int, int]] | None
    precision: str
    gradient: str
    backend: str
    max_rows: int | None
    validate: bool | None

    def _set(self, **given: Any) -> None:
        """Sets all settings and checks them; the generator is there."""
        for name, value in given.items():
            setattr(self, name, value)
        self._checked_candidates: int | Tensor | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        """Checks all settings, which may have been changed since they were checked last, and gives them their types."""
        count, number, choice = arguments.count, arguments.number, arguments.choice
        self.starts = choice("starts", self.starts, _STARTS)
        self.steps = count("steps", self.steps, int(self.starts == "random"), MOST_STEPS)
        self.restarts = count("restarts", self.restarts, most=MOST_RESTARTS)
        self.lr = number("lr", self.lr, above=0)
        self.momentum = number("momentum", self.momentum, least=0, below=1)
        self.lr_decay = number("lr_decay", self.lr_decay, above=0)
        self.decay_at = number("decay_at", self.decay_at, least=0, most=1)
        self.seed = arguments.seed(self.seed)
        self.start_std = None if self.start_std is None else number("start_std", self.start_std, above=0)
        self.radius = _checked_radius(self.radius)
        self.keep = _checked_keep(self.keep, self.steps, self.restarts)
        self.precision = choice("precision", self.precision, _PRECISIONS)
        self.gradient = choice("gradient", self.gradient, _GRADIENTS)
        self.backend = choice("backend", self.backend, _BACKENDS)
        self.max_rows = None if self.max_rows is None else count("max_rows", self.max_rows, most=MOST_ROWS)
        self._check_candidates()
        self._checked = self._all_settings()

    def _check_candidates(self) -> None:
        """Keeps latents of the user's own on the generator's device, and as descents begin at them: scaled."""
        if self.candidates is not self._checked_candidates:
            self.candidates = _checked_candidates(self.candidates)
        # Not a buffer: the module's dtype is not theirs, and they are not state.
        self._own_candidates: Tensor | None = None
        if isinstance(self.candidates, Tensor):
            if not self._is_meta():  # they would be lost there, and follow the images later
                self.candidates = self.candidates.to(self._device() or self.candidates.device)
            radius = self._radius(self.candidates.shape[1])
            self._own_candidates = reference.on_sphere(self.candidates, radius)
        self._checked_candidates = self.candidates

    def _all_settings(self) -> tuple[Any, ...]:
        """Returns a value that differs where a setting has changed."""
        own: Any = self.candidates
        if isinstance(own, Tensor):
            own = id(own), None if own.is_inference() else own._version
        return (
            *(self.steps, self.restarts, self.lr, self.momentum, self.lr_decay, self.decay_at, self.seed),
            *(self.starts, self.start_std, own, self.radius, self.keep, self.precision, self.gradient),
            *(self.backend, self.max_rows),
        )

    def _radius(self, latent_size: int) -> float:
        """Returns the norm of latents, 0 where it is free; "auto" is sqrt(k), near which draws of N(0, I) lie."""
        if self.radius is None:
            return 0.0
        return math.sqrt(latent_size) if isinstance(self.radius, str) else self.radius

    def _descent(self, latent_size: int) -> reference.Descent:
        rates = reference.learning_rates(self.steps, self.lr, self.lr_decay, self.decay_at)
        keep = tuple((step, rows) for step, rows in self.keep or ())
        return reference.Descent(rates, self.momentum, self._radius(latent_size), keep)

    def _device(self) -> torch.device | None:
        return next((tensor.device for tensor in tensors_of(self.generator)), None)

    def _is_meta(self) -> bool:
        device = self._device()
        return device is not None and device.type == "meta"

    def extra_repr(self) -> str:
        own = self.candidates
        beyond: dict[str, Any] = {}
        if self.starts == "nearest":
            shown = f"<{len(own)} latents>" if isinstance(own, Tensor) else own
            beyond = {"starts": "'nearest'", "candidates": shown}
        beyond |= {"start_std": self.start_std, "radius": self.radius, "keep": self.keep}
        words = [f"{name}={value}" for name, value in beyond.items() if value is not None]
        return ", ".join(
            (
                f"steps={self.steps}, restarts={self.restarts}, lr={self.lr}, momentum={self.momentum}",
                *(f"seed={self.seed}", *words, f"precision={self.precision!r}"),
                f"gradient={self.gradient!r}, backend={self.backend!r}",
            )
        )


def _checked_candidates(value: Any) -> int | Tensor:
    """Returns a count of candidates, or a copy of latents [N, k] of the caller's own.

    Raises:
        TypeError: it is neither.
        ValueError: the count is below 1, or the latents' shape or values do not fit.
    """
    if not isinstance(value, Tensor) or value.dim() == 0:
        return arguments.count("candidates", value, most=MOST_CANDIDATES)
    if not value.dtype.is_floating_point:
        raise TypeError(f"candidates must have a floating dtype, got {name_of(value.dtype)}")
    if value.dim() != 2 or value.shape[0] < 1:
        raise ValueError(
            f"candidates must be a count or latents [N, k] with N at least 1, got shape {list(value.shape)}"
        )
    if not torch.isfinite(value).all():
        raise ValueError("candidates must be finite")
    with torch.inference_mode(False):
        return value.detach().clone()


def _checked_radius(value: Any) -> float | str | None:
    """Returns a radius as None, "auto" or a float.

    Raises:
        TypeError, ValueError: it is none of these, or not above 0.
    """
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if isinstance(value, str):
        raise ValueError(f'radius must be None, "auto" or a number, got {value!r}')
    return arguments.number("radius", value, above=0, most=LARGEST_RADIUS)


def _checked_keep(value: Any, steps: int, restarts: int) -> tuple[tuple[int, int], ...] | None:
    """Returns the pairs (step, rows) after which only some rows of each image go on, None where all do.

    Raises:
        TypeError: it is no sequence of pairs of ints.
        ValueError: steps do not ascend below `steps`, or rows do not descend below `restarts`.
    """
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"keep must be None or pairs (step, rows), got {type(value).__name__}")
    pairs: list[tuple[int, int]] = []
    last_step, last_rows = -1, restarts
    for pair in value:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"keep must hold pairs (step, rows), got {pair!r}")
        step = arguments.count("keep's steps", pair[0], least=0)
        rows = arguments.count("keep's rows", pair[1])
        if not last_step < step < steps:
            raise ValueError(f"keep's steps must ascend and lie below steps ({steps}), got {value!r}")
        if rows >= last_rows:
            raise ValueError(f"keep's rows must descend and lie below restarts ({restarts}), got {value!r}")
        pairs.append((step, rows))
        last_step, last_rows = step, rows
    return tuple(pairs) or None
