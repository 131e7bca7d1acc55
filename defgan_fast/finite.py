"""Finds the tensors that hold NaN or infinity, by name: trained, stored and loaded weights must hold none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Returns what is wrong with the first of some named tensors that is not finite, None where all are.

    Tensors without values of their own (of the meta device, of a compiler's trace, not yet initialised) and integers
    are passed over.

    Returns:
        A clause such as "nan in linear.weight (3 of 2048 values)".
    """
    for name, tensor in tensors:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
        if not plain or not tensor.is_floating_point():
            continue
        usable = torch.isfinite(tensor.detach())
        if not usable.all():
            bad = int((~usable).sum())
            kind = "nan" if torch.isnan(tensor.detach()).any() else "inf"
            return f"{kind} in {name} ({bad} of {tensor.numel()} values)"
    return None


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of nested dictionaries, lists and tuples, each named by the path that leads to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from named_tensors(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from named_tensors(part, f"{name}.{index}" if name else str(index))
