"""The activations that plans know, each with all that Python must know of it. `csrc/plan.h` has the same names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        apply: the function itself, of a tensor and the slope (which all but leaky ReLU ignore).
        modules: the module classes that mean it.
        functions: the functions, and the names of tensor methods, that mean it.
        output_range: the interval of its values where it bounds them.
    """

    apply: Callable[[Tensor, float], Tensor]
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Any, ...] = ()
    output_range: tuple[float, float] | None = None


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda x, slope: x),
    "relu": Activation(
        lambda x, slope: F.relu(x), (nn.ReLU,), (F.relu, torch.relu, torch.relu_, "relu", "relu_")
    ),
    "leaky_relu": Activation(lambda x, slope: F.leaky_relu(x, slope), (nn.LeakyReLU,), (F.leaky_relu,)),
    "sigmoid": Activation(
        lambda x, slope: torch.sigmoid(x),
        (nn.Sigmoid,),
        (F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_"),
        (0.0, 1.0),
    ),
    "tanh": Activation(
        lambda x, slope: torch.tanh(x), (nn.Tanh,), (F.tanh, torch.tanh, "tanh", "tanh_"), (-1.0, 1.0)
    ),
}

OF_MODULE: dict[type[nn.Module], str] = {
    module: name for name, activation in ACTIVATIONS.items() for module in activation.modules
}
"""The name of the activation that a module class means."""

OF_FUNCTION: dict[Any, str] = {
    function: name for name, activation in ACTIVATIONS.items() for function in activation.functions
}
"""The name of the activation that a function, or a tensor method of that name, means."""


def range_of_last(generator: nn.Module) -> tuple[float, float] | None:
    """Returns the interval of a plain stack's pixels where its last layer bounds them, None for any other module."""
    last: nn.Module = generator
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    name = OF_MODULE.get(type(last))
    return None if name is None else ACTIVATIONS[name].output_range
