"""How gradients flow through a projection: operators that tie a reconstruction to its image.

`torch.ops.defgan_fast`:
  straight_through     ties with an identity backward (BPDA)
  unrolled             ties with the gradient through all steps, recomputed from a plan's text
  no_gradient          ties with a backward that raises
Each returns the reconstruction bit for bit. They are pure functions with a schema, a fake kernel and an autograd rule,
so that torch.compile and torch.export take them as they are. They are written in Python because they hold no
arithmetic worth compiling, and serve the reference path where there is no compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .plan import Plan, interpret
from .reference import Decoder, Descent


@torch.library.custom_op("defgan_fast::straight_through", mutates_args=())
def straight_through(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Returns the reconstruction, bit for bit, with the identity as its gradient with respect to the image.

    Backward pass differentiable approximation (Athalye, Carlini, Wagner, ICML 2018): G(z*) is close to x, so the
    projection's derivative is taken to be 1.
    """
    return reconstruction.clone()


@torch.library.custom_op("defgan_fast::no_gradient", mutates_args=())
def no_gradient(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Returns the reconstruction, bit for bit, with a backward that raises instead of giving silent zeros."""
    return reconstruction.clone()


@torch.library.custom_op("defgan_fast::unrolled", mutates_args=())
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
    """Returns the reconstruction, bit for bit, with the gradient through all steps of the chosen restart.

    Args:
        images: [B, C, H, W].
        reconstruction: [B, C, H, W].
        z0: the starting point of each image's chosen restart, [B, k].
        parameters: the generator's tensors, as the plan numbers them.
        plan: the lowered generator.
        lr_schedule: the learning rate of each step.
        momentum: of the heavy ball.
        radius: the norm to which latents are scaled; 0: they are free.
        steps: how many steps the chosen restart took, [B] int64; None: all of them.
    """
    return reconstruction.clone()


@torch.library.custom_op("defgan_fast::unrolled_gradient", mutates_args=())
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
    """Returns the gradient of `unrolled` with respect to the images.

    The descent is recomputed in plain PyTorch, in float64 for float64 images, else in float32.
    """
    lowered = Plan.parse(plan)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    tensors = [p.detach().to(dtype) for p in parameters]
    result = reference.unrolled_gradient(
        lambda z: interpret(lowered, tensors, z),
        images.to(dtype),
        z0.to(dtype),
        lr_schedule,
        momentum,
        gradient.to(dtype),
        radius,
        steps,
    )
    return result.to(images.dtype, copy=True)


@straight_through.register_fake
def _(images: Tensor, reconstruction: Tensor) -> Tensor:
    return torch.empty_like(reconstruction)


@no_gradient.register_fake
def _(images: Tensor, reconstruction: Tensor) -> Tensor:
    return torch.empty_like(reconstruction)


@unrolled.register_fake
def _(
    images: Tensor,
    reconstruction: Tensor,
    z0: Tensor,
    parameters: Any,
    plan: str,
    lr: Any,
    momentum: float,
    radius: float,
    steps: Any,
) -> Tensor:
    return torch.empty_like(reconstruction)


@unrolled_gradient.register_fake
def _(
    gradient: Tensor,
    images: Tensor,
    z0: Tensor,
    parameters: Any,
    plan: str,
    lr: Any,
    momentum: float,
    radius: float,
    steps: Any,
) -> Tensor:
    return torch.empty_like(images)


NO_GRADIENT_MESSAGE = (
    'this projector was built with gradient="none": choose gradient="straight_through" (identity backward, BPDA) '
    'or gradient="unrolled" (through all steps) to differentiate through it'
)


def _straight_through_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return gradient, None


def _no_gradient_backward(ctx: Any, gradient: Tensor) -> None:
    raise RuntimeError(NO_GRADIENT_MESSAGE)


def _unrolled_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, _, z0, parameters, ctx.plan, ctx.lr_schedule, ctx.momentum, ctx.radius, steps = inputs
    ctx.count = len(parameters)
    # Tensors made in inference mode cannot be kept for a backward pass; their copies can.
    kept = (images, z0, steps, *parameters)
    ctx.save_for_backward(*(t.clone() if t is not None and t.is_inference() else t for t in kept))


def _unrolled_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    images, z0, steps, *parameters = ctx.saved_tensors
    result = unrolled_gradient(
        gradient, images, z0, parameters, ctx.plan, ctx.lr_schedule, ctx.momentum, ctx.radius, steps
    )
    return result, None, None, [None] * ctx.count, None, None, None, None, None


straight_through.register_autograd(_straight_through_backward)
no_gradient.register_autograd(_no_gradient_backward)
unrolled.register_autograd(_unrolled_backward, setup_context=_unrolled_setup)


class UnrolledDecoder(torch.autograd.Function):
    """`unrolled` for generators without a plan: the decoder is a Python callable, which no operator can take."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        reconstruction: Tensor,
        z0: Tensor,
        decoder: Decoder,
        descent: Descent,
        dtype: torch.dtype,
        steps: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(images, z0, steps)
        ctx.arguments = (decoder, descent, dtype)
        return reconstruction.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        images, z0, steps = ctx.saved_tensors
        decoder, descent, dtype = ctx.arguments
        result = reference.unrolled_gradient(
            decoder,
            images.to(dtype),
            z0.to(dtype),
            descent.lr_schedule,
            descent.momentum,
            gradients[0].to(dtype),
            descent.radius,
            steps,
        )
        return result.to(images.dtype), None, None, None, None, None, None
