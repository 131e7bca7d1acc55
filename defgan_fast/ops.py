"""The torch ops: loads the compiled ones and registers those that are made of torch itself.

`torch.ops.defgan_fast`:
  project, decode          compiled (`csrc/project_op*.cpp`), one kernel a device; no derivative of their own
  straight_through         ties a reconstruction to its image with an identity backward (BPDA)
  unrolled                 ties it with the gradient through all steps, recomputed (from a plan's text)
  no_gradient              ties it with a backward that raises
  starting_points          the latents of (seed, restart)
All are pure functions with a schema, a fake kernel and an autograd rule, so that torch.compile and torch.export
take them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _extension, lowering, reference

kernels_available: bool = _extension.load()
"""Whether the compiled ops are there; the reference path needs none of them."""

cuda_kernels_built: bool = _extension.has_cuda()
"""Whether they run on GPUs too."""

OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which on a GPU has the tensor-core instructions that the kernels are written in."""


def cuda_kernels_run_on(index: int) -> bool:
    """Whether the GPU of that index runs the CUDA kernels of this build."""
    return cuda_kernels_built and torch.cuda.get_device_capability(index) >= OLDEST_CAPABILITY


# All that torch.compiler.assume_constant_result does to a function, which would import the compiler first: 0.8 s.
cuda_kernels_run_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def missing_cuda() -> str | None:
    """Why no GPU of this machine runs the CUDA kernels, in one clause; None where one does."""
    if not cuda_kernels_built:
        return _extension.status()["without_cuda"]
    if not torch.cuda.is_available():
        return "the kernels are built, but torch sees no GPU"
    if not any(cuda_kernels_run_on(index) for index in range(torch.cuda.device_count())):
        least = ".".join(map(str, OLDEST_CAPABILITY))
        return f"the kernels need a GPU of compute capability {least} or later"
    return None


def starting_points(seed: int, restarts: int, latent_size: int) -> Tensor:
    """The first latents of every restart: N(0, 1/k), row r a function of (seed, r) and k alone, [R, k] float32.

    Philox counts and a Box-Muller transform in float64, so that the points are the same on every machine and
    in every version of torch and numpy, and restart r is the same whatever R is.
    """
    points = np.empty((restarts, latent_size))
    pairs = (latent_size + 1) // 2
    for restart in range(restarts):
        bits = np.random.Philox(key=np.array([seed % 2**64, restart], dtype=np.uint64)).random_raw(2 * pairs)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1)
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        points[restart] = normal[:latent_size] / math.sqrt(latent_size)
    return torch.from_numpy(points).float()


@torch.library.custom_op("defgan_fast::starting_points", mutates_args=())
def _starting_points(seed: int, restarts: int, latent_size: int) -> Tensor:
    return starting_points(seed, restarts, latent_size)


@_starting_points.register_fake
def _(seed: int, restarts: int, latent_size: int) -> Tensor:
    return torch.empty(restarts, latent_size, dtype=torch.float32, device="cpu")


@torch.library.custom_op("defgan_fast::straight_through", mutates_args=())
def straight_through(images: Tensor, reconstruction: Tensor) -> Tensor:
    """The reconstruction, bit for bit, whose gradient with respect to the image is the identity.

    Backward pass differentiable approximation (Athalye, Carlini, Wagner, ICML 2018): G(z*) is close to x, so the
    projection's derivative is taken to be 1.
    """
    return reconstruction.clone()


@torch.library.custom_op("defgan_fast::no_gradient", mutates_args=())
def no_gradient(images: Tensor, reconstruction: Tensor) -> Tensor:
    """The reconstruction, bit for bit, whose backward raises instead of giving silent zeros."""
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
) -> Tensor:
    """The reconstruction, bit for bit, whose gradient goes through the L steps of the chosen restart.

    Args:
        images: [B, C, H, W].
        reconstruction: [B, C, H, W].
        z0: the starting point of each image's chosen restart, [B, k].
        parameters: the generator's tensors, as the plan numbers them.
        plan: the lowered generator.
        lr_schedule: the learning rate of each step.
        momentum: of the heavy ball.
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
) -> Tensor:
    """Backward of `unrolled`: recomputes the descent in plain PyTorch, in float64 for float64 images, else float32."""
    lowered = lowering.parse(plan)
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    tensors = [p.detach().to(dtype) for p in parameters]
    result = reference.unrolled_gradient(
        lambda z: lowering.run(lowered, tensors, z),
        images.to(dtype),
        z0.to(dtype),
        lr_schedule,
        momentum,
        gradient.to(dtype),
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
    images: Tensor, reconstruction: Tensor, z0: Tensor, parameters: Any, plan: str, lr: Any, momentum: float
) -> Tensor:
    return torch.empty_like(reconstruction)


@unrolled_gradient.register_fake
def _(
    gradient: Tensor, images: Tensor, z0: Tensor, parameters: Any, plan: str, lr: Any, momentum: float
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
    images, _, z0, parameters, ctx.plan, ctx.lr_schedule, ctx.momentum = inputs
    ctx.count = len(parameters)
    # Tensors made in inference mode cannot be kept for a backward pass; their copies can.
    kept = (images, z0, *parameters)
    ctx.save_for_backward(*(t.clone() if t.is_inference() else t for t in kept))


def _unrolled_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    images, z0, *parameters = ctx.saved_tensors
    result = unrolled_gradient(gradient, images, z0, parameters, ctx.plan, ctx.lr_schedule, ctx.momentum)
    return result, None, None, [None] * ctx.count, None, None, None


straight_through.register_autograd(_straight_through_backward)
no_gradient.register_autograd(_no_gradient_backward)
unrolled.register_autograd(_unrolled_backward, setup_context=_unrolled_setup)
