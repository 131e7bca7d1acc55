"""The compiled operators, and which devices they run on. Importing this module loads the extension.

`torch.ops.defgan_fast.project` and `decode` have a kernel for each device, a fake kernel and no derivative: what ties
a reconstruction to its image is in `defgan_fast/gradients.py`. Their C++ halves are `csrc/project_op*.cpp`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators import merge_batches, split_batches
from . import extension

kernels_available: bool = extension.load()
"""Whether the compiled operators are there; the reference path needs none of them."""

cuda_kernels_built: bool = extension.has_cuda()
"""Whether they run on GPUs too."""

OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which on a GPU has the tensor-core instructions that the kernels are written in."""


def project(
    images: Tensor,
    z0: Tensor,
    parameters: Sequence[Tensor],
    plan: str,
    lr_schedule: Sequence[float],
    momentum: float,
    precision: str,
    max_rows: int,
    validate: bool,
    radius: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Projects every image from every starting point; all rows take all steps.

    Args:
        images: [B, C, H, W] float32, bfloat16 or float16.
        z0: [R, k] (shared by all images) or [B, R, k], a floating dtype, on the images' device.
        parameters: the generator's tensors as the plan numbers them, on the images' device.
        plan: the text of a `defgan_fast.plan.Plan`.
        lr_schedule: the learning rate of each step, length L, which may be 0.
        momentum: of the heavy ball.
        precision: one of `precisions.ALL`.
        max_rows: rows (image x restart) in flight at most; 0 keeps working memory under 200 MB.
        validate: whether images must be finite and in the generator's range.
        radius: the norm to which latents are scaled at the start and after every step; 0: they are free. A latent of
            norm zero stays zero.

    Returns:
        latents [B, R, k] and their mean squared errors [B, R], both float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    found: tuple[Tensor, Tensor] = torch.ops.defgan_fast.project(
        images, z0, parameters, plan, lr_schedule, momentum, precision, max_rows, validate, radius
    )
    return found


def project_keeping(
    images: Tensor,
    z0: Tensor,
    parameters: Sequence[Tensor],
    plan: str,
    lr_schedule: Sequence[float],
    momentum: float,
    precision: str,
    max_rows: int,
    validate: bool,
    radius: float,
    keep: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects every image from every starting point, and drops rows on the way; without a wait on a GPU.

    Args:
        keep: pairs (step, rows): after that many steps only the `rows` rows of least float32 error of each image go
            on, with their velocities: NaN comes last, the lowest index first among equals. Where there are no more
            than `rows`, all go on. Steps rise and lie in [0, L), rows are at least 1 and never rise. The other
            arguments are those of `project`.

    Returns:
        latents [B, R, k] and their mean squared errors [B, R], float32, and how many steps each row took, [B, R]
        int64. A dropped row has the latent and the error with which it stopped.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    steps, rows = [step for step, _ in keep], [kept for _, kept in keep]
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.defgan_fast.project_keeping(
        images,
        z0,
        parameters,
        plan,
        lr_schedule,
        momentum,
        precision,
        max_rows,
        validate,
        radius,
        steps,
        rows,
    )
    return found


def nearest(
    images: Tensor,
    candidates: Tensor,
    parameters: Sequence[Tensor],
    plan: str,
    restarts: int,
    draws: Tensor | None = None,
) -> Tensor:
    """Finds the candidates whose images are nearest to each image in mean squared error.

    Candidates are decoded once for each state of the parameters and of the candidates, and kept at 16 bits a pixel.
    Distances are compared in whole numbers of 14 bits a pixel, so an image's indices have the same bits whatever the
    batch, the instruction set and the number of threads.

    Args:
        images: [B, C, H, W] float32, bfloat16 or float16.
        candidates: latents [N, k], a floating dtype, on the images' device; at most 200 MB of decoded pixels.
        parameters: the generator's tensors as the plan numbers them, on the images' device.
        plan: the text of a `defgan_fast.plan.Plan`.
        restarts: R, from 1 to N.
        draws: one number an image, [B] int64, that chooses the half of the candidates that comes before the other
            (`reference.takes_part`); None: all take part alike.

    Returns:
        Indices [B, R] int64, the nearest first, the lowest index first among equals. Candidates whose images are not
        finite come last; an image that is not finite gets 0 to R - 1.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    found: Tensor = torch.ops.defgan_fast.nearest(images, candidates, parameters, plan, restarts, draws)
    return found


def decode(latents: Tensor, parameters: Sequence[Tensor], plan: str, max_rows: int) -> Tensor:
    """Returns the generator's images for latents, [B, k] -> [B, C, H, W] float32; arguments as in `project`."""
    images: Tensor = torch.ops.defgan_fast.decode(latents, parameters, plan, max_rows)
    return images


def _vmap_project(
    op: Any, info: Any, in_dims: tuple[Any, ...], images: Tensor, z0: Tensor, *rest: Any
) -> Any:
    """Makes the images of all of vmap's calls one batch: an image's results have the same bits in any."""
    dims = list(in_dims)
    if dims[1] is not None:
        z0, dims[1] = z0.movedim(dims[1], 0), 0
        if z0.dim() == 3:  # each call has its own points, which its images share
            count = images.movedim(dims[0], 0).shape[1] if dims[0] is not None else len(images)
            z0 = z0[:, None].expand(-1, count, -1, -1)
    merged = merge_batches(info.batch_size, dims, (images, z0, *rest))
    if dims[1] is None and z0.dim() == 2:
        merged[1] = z0
    found = tuple(split_batches(result, info.batch_size) for result in op(*merged))
    return found, (0,) * len(found)


def _vmap_decode(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    merged = merge_batches(info.batch_size, in_dims, arguments)
    return split_batches(torch.ops.defgan_fast.decode(*merged), info.batch_size), 0


def _vmap_nearest(info: Any, in_dims: tuple[Any, ...], images: Tensor, candidates: Tensor, *rest: Any) -> Any:
    if in_dims[1] is not None:
        raise NotImplementedError("candidates must be the same for all of vmap's calls, got batched ones")
    merged = merge_batches(info.batch_size, in_dims, (images, candidates, *rest))
    merged[1] = candidates
    return split_batches(torch.ops.defgan_fast.nearest(*merged), info.batch_size), 0


if kernels_available:
    for op in (torch.ops.defgan_fast.project.default, torch.ops.defgan_fast.project_keeping.default):
        torch.library.register_vmap(op, functools.partial(_vmap_project, op))
    torch.library.register_vmap("defgan_fast::decode", _vmap_decode)
    torch.library.register_vmap("defgan_fast::nearest", _vmap_nearest)


def cuda_kernels_run_on(index: int) -> bool:
    """Returns whether the GPU of that index runs the CUDA kernels of this build."""
    return cuda_kernels_built and torch.cuda.get_device_capability(index) >= OLDEST_CAPABILITY


# torch.compiler.assume_constant_result does no more to a function, but imports the compiler first, which takes 0.8 s.
cuda_kernels_run_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def missing_cuda() -> str | None:
    """Returns why no GPU of this machine runs the CUDA kernels, in one clause; None where one does."""
    if not cuda_kernels_built:
        return extension.status()["without_cuda"]
    if not torch.cuda.is_available():
        return "the kernels are built, but torch sees no GPU"
    if not any(cuda_kernels_run_on(index) for index in range(torch.cuda.device_count())):
        least = ".".join(map(str, OLDEST_CAPABILITY))
        return f"the kernels need a GPU of compute capability {least} or later"
    return None
