"""What of a generator a plan depends on beside its weights, so that a change of it is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def tensors_of(generator: nn.Module) -> Iterator[Tensor]:
    """Gives a generator's parameters and buffers, those of a copy that DataParallel made included, which hides them."""
    for module in generator.modules():
        former = getattr(module, "_former_parameters", {})
        for own in (module._parameters, former, module._buffers):
            yield from (tensor for tensor in own.values() if tensor is not None)


def structure_of(generator: nn.Module) -> tuple[Any, ...]:
    """Returns a value that differs where a layer was replaced, set otherwise, or given a hook.

    It holds, for every module, its name, its class, its settings, its hooks, and the shapes of its own parameters and
    buffers. Weights are not part of it: they are read anew in every call. Every call asks, so it takes tens of
    microseconds and no more.
    """
    found: list[Any] = []
    for name, module in generator.named_modules():
        found += (name, type(module), len(module._forward_hooks), len(module._forward_pre_hooks))
        for setting, value in vars(module).items():
            if setting[0] != "_" and setting != "training":
                found += (setting, value if _is_plain(value) else id(value))
        for own in (module._parameters, module._buffers):
            for setting, tensor in own.items():
                found += (setting, None if tensor is None else tensor.shape)
    return tuple(found)


_PLAIN = {bool, int, float, str, type(None)}


def _is_plain(value: Any) -> bool:
    """Returns whether a setting is compared by its value; anything else is compared by its identity."""
    return type(value) in _PLAIN or (type(value) is tuple and _PLAIN.issuperset(map(type, value)))
