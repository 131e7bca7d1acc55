"""What each kind of torch layer adds to the chain, and what of it is refused.

A handler gets the chain and one call of the traced generator: a module, a function or a tensor method. `MODULES` and
`FUNCTIONS` say which handler is whose.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations
from .chain import Chain
from .layers import Layer, LoweringError, Shape


@dataclass(frozen=True)
class Call:
    """One node of a traced generator, with its input and output on real latents.

    Attributes:
        what: how messages name it, such as "layer 'body.3' (ConvTranspose2d)".
        name: dotted name of the module.
        module: the module, None for a function or a method.
        function: the function or the method's name, None for a module.
        x: the input.
        y: the output.
        arguments: positional arguments; the first one is `x`.
        keywords: named arguments.
    """

    what: str
    name: str
    module: nn.Module | None
    function: Any
    x: Tensor
    y: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def refusal(self, how: str = "") -> LoweringError:
        """Returns the error that this call, `how` it is, is not supported."""
        return LoweringError(f"{self.what}{how and ' '}{how} is not supported")

    def argument(self, name: str, position: int, default: Any) -> Any:
        """Returns an argument of a function, wherever it was given."""
        if name in self.keywords:
            return self.keywords[name]
        return self.arguments[position] if len(self.arguments) > position else default


Handler = Callable[[Chain, Call], None]


def add(chain: Chain, call: Call) -> None:
    """Adds a call to the chain.

    Raises:
        LoweringError: no handler takes it, or its handler refuses it.
    """
    if call.module is None:
        handler = FUNCTIONS.get(call.function)
    elif call.module._forward_hooks or call.module._forward_pre_hooks:
        # Hooks may recompute weights (torch.nn.utils.weight_norm) or change tensors; no kernel runs them.
        raise LoweringError(f"{call.what} has forward hooks, which is not supported")
    else:
        handler = next((MODULES[kind] for kind in type(call.module).__mro__ if kind in MODULES), None)
    if handler is None:
        raise call.refusal()
    handler(chain, call)


def _nothing(chain: Chain, call: Call) -> None:
    """Takes what leaves elements and their order alone; the kernels keep their layout until a layer needs another."""


def _linear(chain: Chain, call: Call) -> None:
    module: Any = call.module
    if call.x.dim() != 2:
        raise call.refusal()
    weight = chain.index(call.name, "weight", module.weight)
    bias = chain.index(call.name, "bias", module.bias)
    chain.append(Layer("linear", chain.shape, (module.out_features, 1, 1), weight=weight, bias=bias))


def _convolution(chain: Chain, call: Call) -> None:
    module: Any = call.module
    if module.groups != 1:
        raise call.refusal(f"with groups={module.groups}")
    if module.dilation != (1, 1):
        raise call.refusal(f"with dilation={module.dilation}")
    if module.padding_mode != "zeros":
        raise call.refusal(f"with padding_mode={module.padding_mode!r}")
    if call.x.dim() != 4:
        raise call.refusal(f"with an input of {call.x.dim()} dimensions")
    chain.lay_out(_map_shape(call.x))
    (kernel_h, kernel_w), (stride_h, stride_w) = module.kernel_size, module.stride
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        padding = ((kernel_h - 1) // 2, (kernel_w - 1) // 2)
    forward = isinstance(module, nn.Conv2d)
    upsample = chain.take_upsampling() if forward else (1, 1)
    chain.append(
        Layer(
            "conv" if forward else "conv_transpose",
            chain.shape,
            _map_shape(call.y),
            (kernel_h, kernel_w),
            (stride_h, stride_w),
            (padding[0], padding[1]),
            upsample,
            weight=chain.index(call.name, "weight", module.weight),
            bias=chain.index(call.name, "bias", module.bias),
        )
    )


def _batch_norm(chain: Chain, call: Call) -> None:
    module: Any = call.module
    if module.running_mean is None or module.training:
        raise call.refusal("without running statistics or in training mode")
    if call.x.dim() == 4:
        chain.lay_out(_map_shape(call.x))
    elif call.x.dim() != 2:
        raise call.refusal(f"on {call.x.dim()} dimensions")
    norm = (
        chain.index(call.name, "running_mean", module.running_mean),
        chain.index(call.name, "running_var", module.running_var),
        chain.index(call.name, "weight", module.weight),
        chain.index(call.name, "bias", module.bias),
    )
    chain.normalise(norm, float(module.eps), per_element=call.x.dim() == 2)


def _activation_module(chain: Chain, call: Call) -> None:
    module: Any = call.module
    _activate(chain, call, activations.OF_MODULE[type(module)], getattr(module, "negative_slope", 0.0))


def _activation_function(chain: Chain, call: Call) -> None:
    name = activations.OF_FUNCTION[call.function]
    _activate(chain, call, name, call.argument("negative_slope", 1, 0.01) if name == "leaky_relu" else 0.0)


def _activate(chain: Chain, call: Call, name: str, slope: float) -> None:
    if not slope >= 0:
        raise LoweringError(
            f"{call.what} with negative_slope={slope} is not supported: it must be at least 0"
        )
    chain.activate(name, float(slope))


def _dropout_module(chain: Chain, call: Call) -> None:
    if call.module is not None and call.module.training:
        raise LoweringError(f"{call.what} is in training mode")


def _dropout_function(chain: Chain, call: Call) -> None:
    if call.argument("training", 2, True):
        raise LoweringError(f"{call.what} is in training mode")


def _upsample_module(chain: Chain, call: Call) -> None:
    module: Any = call.module
    _upsample(chain, call, module.mode)


def _upsample_function(chain: Chain, call: Call) -> None:
    _upsample(chain, call, call.argument("mode", 3, "nearest"))


def _upsample(chain: Chain, call: Call, mode: str) -> None:
    if mode not in ("nearest", "nearest-exact"):
        raise call.refusal(f"with mode={mode!r}")
    if call.x.dim() != 4:
        raise call.refusal()
    before, after = _map_shape(call.x), _map_shape(call.y)
    if after[1] % before[1] or after[2] % before[2]:
        raise call.refusal()
    chain.lay_out(before)
    factors = (after[1] // before[1], after[2] // before[2])
    if factors != (1, 1):
        chain.append(Layer("map", chain.shape, after, upsample=factors))


def _crop(chain: Chain, call: Call) -> None:
    """Takes indexing with slices that keep rows and channels and cut a rectangle out of the map."""
    index, dimensions = call.arguments[1], call.x.dim()
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = index[:at] + (slice(None),) * (dimensions - len(index) + 1) + index[at + 1 :]
    if dimensions != 4 or call.y.dim() != 4 or not all(isinstance(i, slice) for i in index):
        raise call.refusal()
    index += (slice(None),) * (dimensions - len(index))
    ranges = [part.indices(size) for part, size in zip(index, call.x.shape, strict=True)]
    whole = all(r == (0, size, 1) for r, size in zip(ranges[:2], call.x.shape, strict=False))
    if not whole or any(step != 1 for _, _, step in ranges) or call.y.numel() == 0:
        raise call.refusal()
    chain.lay_out(_map_shape(call.x))
    chain.crop(ranges[2][0], ranges[3][0], _map_shape(call.y))


def _map_shape(x: Tensor) -> Shape:
    _, c, h, w = x.shape
    return c, h, w


MODULES: dict[type[nn.Module], Handler] = {
    nn.Linear: _linear,
    nn.ConvTranspose2d: _convolution,
    nn.Conv2d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.Upsample: _upsample_module,
    nn.Flatten: _nothing,
    nn.Unflatten: _nothing,
    nn.Identity: _nothing,
    nn.Dropout: _dropout_module,
    nn.Dropout1d: _dropout_module,
    nn.Dropout2d: _dropout_module,
    **dict.fromkeys(activations.OF_MODULE, _activation_module),
}

FUNCTIONS: dict[Any, Handler] = {
    F.interpolate: _upsample_function,
    F.dropout: _dropout_function,
    operator.getitem: _crop,
    **dict.fromkeys(activations.OF_FUNCTION, _activation_function),
    **dict.fromkeys(
        (torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.unflatten), _nothing
    ),
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous"), _nothing
    ),
}
"""Handlers by function, or by the name of a tensor method."""
