"""Operators written in Python whose derivatives hold wherever torch differentiates, or raise.

`torch.library.custom_op` gives operators that torch.func's transforms refuse when nested and that give zeros in forward
mode. These have one autograd kernel that serves backward passes, forward mode and every transform's level alike, and a
rule for vmap. torch.compile, torch.export, torch.jit.trace and make_fx record a call as one node, whether or not
anybody differentiates, so the derivative is part of every graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.utils._python_dispatch import _get_current_dispatch_mode

NAMESPACE = "defgan_fast"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
T = TypeVar("T")

NO_SECOND_DERIVATIVE = (
    'gradient="unrolled" has no second derivative: differentiate once, or choose gradient="straight_through"'
)


def can_be_read(tensor: Tensor) -> bool:
    """Returns whether Python may branch on values: not where a call is compiled, exported, traced or transformed."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or _get_current_dispatch_mode() is not None
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or tensor.is_meta
    )


class Derivative:
    """The derivative of an operator's first arguments; the other ones are constants to it.

    Attributes:
        arguments: how many of the first arguments have a derivative. They have the result's shape.
    """

    arguments: ClassVar[int] = 1

    @staticmethod
    def setup(ctx: Any, *arguments: Any) -> None:
        """Keeps what the other two need of an operator's arguments: tensors by `keep`, anything else in `ctx`."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Returns the gradient of each of the first arguments, given the result's."""
        raise NotImplementedError

    @staticmethod
    def forward(ctx: Any, tangent: Tensor) -> Tensor:
        """Returns the tangent of the result, given that of the first argument that has one."""
        raise NotImplementedError


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Keeps tensors, as `ctx.saved_tensors`, for both directions of differentiation."""
    # Tensors made in inference mode cannot be kept; their copies can.
    tensors = tuple(t.clone() if t is not None and t.is_inference() else t for t in tensors)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def define(
    derivative: type[Derivative], fake: Callable[..., Tensor] | None = None
) -> Callable[[Callable[..., Tensor]], torch._ops.OpOverload]:
    """Makes an operator of a function of tensors whose first dimension is the batch, each row by itself.

    Args:
        derivative: of its first arguments.
        fake: the function's fake kernel; None where the function itself runs on fake tensors.

    Returns:
        A decorator, which returns the operator of the function's name.
    """

    def decorate(function: Callable[..., Tensor]) -> torch._ops.OpOverload:
        name = function.__name__
        _library.define(
            name + torch.library.infer_schema(function, mutates_args=()),
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        operator: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
        _library.impl(name, function, "CompositeExplicitAutograd")
        _library.impl(name, _autograd_kernel(operator, derivative), "Autograd", with_keyset=True)
        if fake is not None:
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        torch.library.register_vmap(f"{NAMESPACE}::{name}", _batching_rule(operator), lib=_library)
        return operator

    return decorate


def _autograd_kernel(operator: torch._ops.OpOverload, derivative: type[Derivative]) -> Callable[..., Tensor]:
    class Tied(torch.autograd.function._SingleLevelFunction):
        """The operator at one level of torch.func's transforms, or at none; the dispatcher takes care of the others."""

        @staticmethod
        def forward(dispatch: tuple[Any, bool, bool], *arguments: Any) -> Any:
            keyset, *modes = dispatch
            # torch turns both directions off in here, which would reach the levels below this one.
            with (
                torch._C._AutoDispatchBelowAutograd(),
                torch.set_grad_enabled(modes[0]),
                _set_fwd_grad_enabled(modes[1]),
            ):
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            ctx.count = len(inputs)
            derivative.setup(ctx, *inputs[1:])

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            if gradients[0] is None:
                return (None,) * ctx.count
            found = derivative.backward(ctx, gradients[0])
            return (None, *(found,) * derivative.arguments, *(None,) * (ctx.count - 1 - derivative.arguments))

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            given = [tangent for tangent in tangents[1 : 1 + derivative.arguments] if tangent is not None]
            if not given:
                return None
            with _set_fwd_grad_enabled(True):  # as in `forward`: for the levels below
                return derivative.forward(ctx, given[0])

    def kernel(keyset: Any, *arguments: Any) -> Tensor:
        with enable_single_level_autograd_function():
            modes = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
            first, others = arguments[: derivative.arguments], arguments[derivative.arguments :]
            tied: Tensor = Tied.apply((keyset, *modes), *first, *map(_constant, others))  # type: ignore[attr-defined]
        return tied

    return kernel


def _constant(argument: Any) -> Any:
    return argument.detach() if isinstance(argument, Tensor) and argument.requires_grad else argument


def _batching_rule(operator: torch._ops.OpOverload) -> Callable[..., tuple[Tensor, int]]:
    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        result = operator(*merge_batches(info.batch_size, in_dims, arguments))
        return split_batches(result, info.batch_size), 0

    return rule


def merge_batches(size: int, in_dims: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Returns an operator's arguments with the dimension that vmap has added made part of the batch.

    Args:
        size: of that dimension.
        in_dims: where each argument has it, None where it has not.
        arguments: tensors [B, ...] become [size * B, ...]; anything else stays as it is.

    Raises:
        NotImplementedError: a list of tensors, the generator's parameters, has that dimension.
    """
    merged = []
    for dim, argument in zip(in_dims, arguments, strict=True):
        if isinstance(argument, Tensor):
            rows = argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            argument = rows.flatten(0, 1)
        elif isinstance(argument, list | tuple) and any(
            isinstance(one, Tensor) and d is not None for one, d in zip(argument, dim or (), strict=False)
        ):
            raise NotImplementedError(
                "the generator's parameters must be the same for all of vmap's calls, got batched ones"
            )
        merged.append(argument)
    return merged


def split_batches(merged: Tensor, size: int) -> Tensor:
    """Returns a result [size * B, ...] of arguments that `merge_batches` has made, as [size, B, ...]."""
    return merged.unflatten(0, (size, len(merged) // size))


class _Outside(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Tensor | None) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: Any, *tensors: Tensor) -> Any:
        result = outside_of_transforms(function, *merge_batches(info.batch_size, in_dims[1:], tensors))
        many = isinstance(result, tuple)
        split = tuple(split_batches(r, info.batch_size) for r in (result if many else (result,)))
        return (split, (0,) * len(split)) if many else (split[0], 0)


def outside_of_transforms(function: Callable[..., T], *tensors: Tensor | None) -> T:
    """Returns `function(*tensors)`, called with the plain tensors beneath torch.func's transforms.

    So the function may use torch.autograd.grad, which a transform refuses. It takes and returns tensors whose first
    dimension is the batch; differentiating through it raises.
    """
    found: T = _Outside.apply(function, *tensors)
    return found
