"""Argument rules: what is accepted becomes a plain int or float, everything else is named in one line."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from defgan_fast import arguments


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_a_count_is_whatever_has_an_index(value: object) -> None:
    found = arguments.count("steps", value)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 3.0, np.float64(3), "3", None, [3]])
def test_no_count(value: object) -> None:
    with pytest.raises(TypeError, match=rf"^steps must be an int, got {type(value).__name__}$"):
        arguments.count("steps", value)


def test_bounds_of_a_count() -> None:
    assert arguments.count("steps", 0, least=0) == 0
    assert arguments.count("steps", 8, most=8) == 8
    with pytest.raises(ValueError, match=r"^steps must be at least 1, got 0$"):
        arguments.count("steps", 0)
    with pytest.raises(ValueError, match=r"^steps must be at least 2, got 1$"):
        arguments.count("steps", np.int32(1), least=2)
    with pytest.raises(ValueError, match=r"^steps must be at most 8, got 9$"):
        arguments.count("steps", 9, most=8)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float16(0.5), np.float64(0.5), Fraction(1, 2)])
def test_a_number_is_whatever_is_real(value: object) -> None:
    found = arguments.number("lr", value)
    assert found == 0.5
    assert type(found) is float


def test_integers_are_numbers() -> None:
    for value in (3, np.int64(3)):
        assert type(arguments.number("lr", value)) is float


@pytest.mark.parametrize("value", [True, np.True_, 1j, "1", None, Decimal(1), torch.tensor(1.0)])
def test_no_number(value: object) -> None:
    with pytest.raises(TypeError, match=rf"^lr must be a number, got {type(value).__name__}$"):
        arguments.number("lr", value)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "expected"),
    [
        ({}, (-1e9, 0), (), "be finite"),
        ({"above": 0}, (1e-9,), (0, -1), "be above 0"),
        ({"least": 0}, (0,), (-1e-9,), "be at least 0"),
        ({"below": 2}, (1.9,), (2,), "be below 2"),
        ({"most": 2}, (2,), (2.1,), "be at most 2"),
        ({"least": 0, "below": 1}, (0, 0.9), (-0.1, 1), r"lie in \[0, 1\)"),
        ({"above": 0, "most": 1}, (0.1, 1), (0, 1.1), r"lie in \(0, 1\]"),
        ({"above": 0, "below": 0.5}, (0.1,), (0, 0.5), r"lie in \(0, 0\.5\)"),
    ],
)
def test_bounds_of_a_number(
    bounds: dict[str, float], inside: tuple[float, ...], outside: tuple[float, ...], expected: str
) -> None:
    for value in inside:
        assert arguments.number("lr", value, **bounds) == value
    for value in (*outside, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^lr must {expected}, got {value}$"):
            arguments.number("lr", value, **bounds)


def test_a_choice() -> None:
    assert arguments.choice("arch", "B", ("A", "B")) == "B"
    for value in ("C", None, 1, ["A"]):
        with pytest.raises(ValueError, match=r"^arch must be one of A, B, got "):
            arguments.choice("arch", value, ("A", "B"))


@pytest.mark.parametrize("value", [0, -1, 2**64, np.int64(9), torch.tensor(9)])
def test_a_seed_is_any_integer(value: object) -> None:
    found = arguments.seed(value)
    assert found == value
    assert type(found) is int


def test_no_seed() -> None:
    assert arguments.seed(None) is None
    for value in (1.5, True, "a"):
        with pytest.raises(TypeError, match=rf"^seed must be an int or None, got {type(value).__name__}$"):
            arguments.seed(value)
