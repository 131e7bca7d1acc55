"""How gradients flow through a projection: operators that tie a reconstruction to its image.

`torch.ops.defgan_fast`:
  straight_through     ties with the identity as derivative (BPDA)
  unrolled             ties with the derivative through all steps, recomputed from a plan's text
  no_gradient          ties with a derivative that raises
Each returns the reconstruction bit for bit, and every projection ends with one, whether or not its image requires a
gradient: who traces a graph with an example that requires none gets the tie all the same. They are pure functions with
a schema, a fake kernel and derivatives in both directions (`operators.py`). They are written in Python because they
hold no arithmetic worth compiling, and serve the reference path where there is no compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .operators import (
    NO_SECOND_DERIVATIVE,
    Derivative,
    define,
    keep,
    merge_batches,
    outside_of_transforms,
    split_batches,
)
from .plan import Plan, interpret
from .reference import Decoder, Descent

NO_GRADIENT_MESSAGE = (
    'this projector was built with gradient="none": choose gradient="straight_through" (identity backward, BPDA) '
    'or gradient="unrolled" (through all steps) to differentiate through it'
)
NO_GRAPH = (
    'gradient="unrolled" of a generator without a plan is no part of a recorded graph: call the projector itself, '
    'or choose gradient="straight_through"'
)


class _Identity(Derivative):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def forward(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()  # the result's tangent must not change with the image's


@define(_Identity)
def straight_through(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Returns the reconstruction, bit for bit, with the identity as its derivative with respect to the image.

    Backward pass differentiable approximation (Athalye, Carlini, Wagner, ICML 2018): G(z*) is close to x, so the
    projection's derivative is taken to be 1.
    """
    return reconstruction.clone()


class _Refused(Derivative):
    """The last argument of the operator says why."""

    @staticmethod
    def setup(ctx: Any, *arguments: Any) -> None:
        ctx.reason = arguments[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        found: Tensor = refused(gradient, ctx.reason)
        return found

    @staticmethod
    def forward(ctx: Any, tangent: Tensor) -> Tensor:
        return _Refused.backward(ctx, tangent)


class _NoSecond(_Refused):
    arguments = 2

    @staticmethod
    def setup(ctx: Any, *arguments: Any) -> None:
        ctx.reason = NO_SECOND_DERIVATIVE


def _like_the_first(first: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(first)


@define(_Refused, fake=_like_the_first)
def refused(gradient: Tensor, reason: str) -> Tensor:
    """Stands in a graph for a derivative that is not there, and raises a RuntimeError when the graph is run."""
    raise RuntimeError(reason)


@define(_Refused)
def no_gradient(images: Tensor, reconstruction: Tensor, reason: str) -> Tensor:
    """Returns the reconstruction, bit for bit, with a derivative that raises `reason` instead of silent zeros."""
    return reconstruction.clone()


class _Unrolled(Derivative):
    @staticmethod
    def setup(ctx: Any, *arguments: Any) -> None:
        images, _, z0, parameters, ctx.plan, ctx.lr_schedule, ctx.momentum, ctx.radius, steps = arguments
        keep(ctx, images, z0, steps, *parameters)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        images, z0, steps, *parameters = ctx.saved_tensors
        found: Tensor = unrolled_gradient(
            gradient, images, z0, parameters, ctx.plan, ctx.lr_schedule, ctx.momentum, ctx.radius, steps
        )
        return found

    @staticmethod
    def forward(ctx: Any, tangent: Tensor) -> Tensor:
        images, z0, steps, *parameters = ctx.saved_tensors
        images = forward_ad.unpack_dual(images).primal  # it was kept with the tangent that is given here
        found: Tensor = unrolled_tangent(
            tangent, images, z0, parameters, ctx.plan, ctx.lr_schedule, ctx.momentum, ctx.radius, steps
        )
        return found


@define(_Unrolled)
def unrolled(
    images: Tensor,
    reconstruction: Tensor,
    z0: Tensor,
    parameters: Sequence[Tensor],
    plan: str,
    lr_schedule: Sequence[float],
    momentum: float,
    radius: float,
    steps: Tensor | None,
) -> Tensor:
    """Returns the reconstruction, bit for bit, with the derivative through all steps of the chosen restart.

    Args:
        images: [B, C, H, W].
        reconstruction: [B, C, H, W].
        z0: the starting point of each image's chosen restart, [B, k].
        parameters: the generator's tensors, as the plan numbers them; constants to the derivative.
        plan: the lowered generator.
        lr_schedule: the learning rate of each step.
        momentum: of the heavy ball.
        radius: the norm to which latents are scaled; 0: they are free.
        steps: how many steps each image's chosen restart took, [B]; None: all of them.
    """
    return reconstruction.clone()


@define(_NoSecond, fake=_like_the_first)
def unrolled_gradient(
    gradient: Tensor,
    images: Tensor,
    z0: Tensor,
    parameters: Sequence[Tensor],
    plan: str,
    lr_schedule: Sequence[float],
    momentum: float,
    radius: float,
    steps: Tensor | None,
) -> Tensor:
    """Returns the gradient of `unrolled` with respect to the images, given that of the reconstruction.

    The descent is recomputed in plain PyTorch, in float64 for float64 images, else in float32.
    """
    dtype, decoder = _interpreted(images, parameters, plan)
    found = reference.unrolled_gradient(
        decoder, images.to(dtype), z0.to(dtype), lr_schedule, momentum, gradient.to(dtype), radius, steps
    )
    return found.to(images.dtype, copy=True)


@define(_NoSecond, fake=_like_the_first)
def unrolled_tangent(
    tangent: Tensor,
    images: Tensor,
    z0: Tensor,
    parameters: Sequence[Tensor],
    plan: str,
    lr_schedule: Sequence[float],
    momentum: float,
    radius: float,
    steps: Tensor | None,
) -> Tensor:
    """Returns the tangent of the reconstruction of `unrolled`, given that of the images."""
    dtype, decoder = _interpreted(images, parameters, plan)
    found = reference.unrolled_tangent(
        decoder, images.to(dtype), z0.to(dtype), lr_schedule, momentum, tangent.to(dtype), radius, steps
    )
    return found.to(images.dtype, copy=True)


def _interpreted(images: Tensor, parameters: Sequence[Tensor], plan: str) -> tuple[torch.dtype, Decoder]:
    """Returns the dtype in which a descent is recomputed, and the plan's decoder in that dtype."""
    lowered = Plan.parse(plan)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    tensors = [p.detach().to(dtype) for p in parameters]
    return dtype, lambda z: interpret(lowered, tensors, z)


class UnrolledDecoder(torch.autograd.Function):
    """`unrolled` for generators without a plan: the decoder is a Python callable, which no operator can take."""

    @staticmethod
    def forward(
        images: Tensor,
        reconstruction: Tensor,
        z0: Tensor,
        decoder: Decoder,
        descent: Descent,
        dtype: torch.dtype,
        steps: Tensor | None,
    ) -> Tensor:
        # A graph records what happens here and nothing of this class, so it must raise where it is differentiated.
        kept: Tensor = no_gradient(images, reconstruction, NO_GRAPH)
        return kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        images, _, z0, *ctx.arguments, steps = inputs
        ctx.set_materialize_grads(False)
        keep(ctx, images, z0, steps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        found = None if gradients[0] is None else _recomputed(ctx, reference.unrolled_gradient, gradients[0])
        return found, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        return None if tangents[0] is None else _recomputed(ctx, reference.unrolled_tangent, tangents[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        tied = UnrolledDecoder.apply(*merge_batches(info.batch_size, in_dims, arguments))
        return split_batches(tied, info.batch_size), 0


def _recomputed(ctx: Any, derivative: Any, given: Tensor) -> Tensor:
    """Returns what `derivative`, a function of `reference`, makes of a gradient or tangent that was given."""
    decoder, descent, dtype = ctx.arguments

    def compute(given: Tensor, images: Tensor, z0: Tensor, steps: Tensor | None) -> Tensor:
        lr_schedule, momentum, radius, _ = descent
        wide = images.to(dtype), z0.to(dtype)
        found: Tensor = derivative(decoder, *wide, lr_schedule, momentum, given.to(dtype), radius, steps)
        return found.to(images.dtype, copy=True)

    return outside_of_transforms(compute, given, *ctx.saved_tensors)
