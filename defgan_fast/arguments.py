"""The rules of scalar arguments: what is accepted, what it becomes, and what the error says.

Every function takes the argument's name and the value that came, and returns the value as a plain Python object.
Errors are one line that names the argument, what was expected and what came. Whatever has `__index__` is a count
(numpy's integers, for one), whatever is a `numbers.Real` is a number (numpy's floats); a bool is neither.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any


def count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """Returns a count as an int in [least, most].

    Raises:
        TypeError: it is no integer.
        ValueError: it is out of its range.
    """
    integer = _integer(value)
    if integer is None:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if integer < least:
        raise ValueError(f"{name} must be at least {least}, got {integer}")
    if most is not None and integer > most:
        raise ValueError(f"{name} must be at most {most}, got {integer}")
    return integer


def number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """Returns a finite number as a float.

    Args:
        name: of the argument.
        value: what came.
        least: the lower bound if it belongs to the range, else `above`.
        above: see `least`.
        most: the upper bound if it belongs to the range, else `below`.
        below: see `most`.

    Raises:
        TypeError: it is no real number.
        ValueError: it is not finite, or out of its range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    real = float(value)
    fits = (
        math.isfinite(real)
        and (least is None or real >= least)
        and (above is None or real > above)
        and (most is None or real <= most)
        and (below is None or real < below)
    )
    if not fits:
        raise ValueError(f"{name} must {_range(least, above, most, below)}, got {value}")
    return real


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Returns one of some names.

    Raises:
        ValueError: it is none of them.
    """
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def seed(value: Any, name: str = "seed") -> int | None:
    """Returns a seed, which is any int, or None for fresh random numbers.

    Raises:
        TypeError: it is neither.
    """
    if value is None:
        return None
    integer = _integer(value)
    if integer is None:
        raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
    return integer


def _integer(value: Any) -> int | None:
    """Returns the value as an int, None where it is no integer."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if "bool" in str(getattr(value, "dtype", "")):
        return None  # a tensor of one bool has `__index__`
    try:
        return operator.index(value)
    except TypeError:
        return None


def _range(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    """Returns the end of "... must ..." for a range: "lie in [0, 1)", "be above 0", "be finite"."""
    low, high = (above if least is None else least), (below if most is None else most)
    if low is not None and high is not None:
        return f"lie in {'(' if least is None else '['}{low:g}, {high:g}{')' if most is None else ']'}"
    if low is not None:
        return f"be {'above' if least is None else 'at least'} {low:g}"
    if high is not None:
        return f"be {'below' if most is None else 'at most'} {high:g}"
    return "be finite"
