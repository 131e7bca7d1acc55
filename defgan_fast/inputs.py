"""What a projector asks of images and starting points; each error is one line that names the argument."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .finite import non_finite
from .operators import can_be_read
from .precisions import name_of

# What attacks that meet one unusable image of a batch need to know.
_OTHERWISE = " (with validate=False an image that is not shows it in its own errors)"

_DTYPES = {torch.float32, torch.bfloat16, torch.float16, torch.float64}


def check_images(images: Any, expected: Sequence[int] | None, name: str, device: torch.device | None) -> None:
    """Checks type, dtype, shape and device of images.

    Args:
        images: what came.
        expected: (C, H, W) of the generator's images, None where that is not known yet.
        name: of the generator's class.
        device: the generator's, None where it has no tensors.

    Raises:
        TypeError: images are no tensor of a floating dtype.
        ValueError: shape or device do not fit.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    if images.dtype not in _DTYPES:
        raise TypeError(f"images must have dtype float32, bfloat16 or float16, got {name_of(images.dtype)}")
    if images.dim() != 4:
        raise ValueError(f"images must have shape [B, C, H, W], got {list(images.shape)}")
    if expected is not None:
        check_shape(images, expected, name)
    if device is not None and images.device != device:
        raise ValueError(f"images must be on the generator's device ({device}), got {images.device}")
    if images.is_meta:
        raise ValueError("images must have values, got a tensor of the meta device")


def check_shape(images: Tensor, expected: Sequence[int], name: str) -> None:
    """Checks that images have the shape that the generator of that name returns.

    Raises:
        ValueError: they have another one.
    """
    if tuple(images.shape[1:]) != tuple(expected):
        sizes = ", ".join(map(str, expected))
        raise ValueError(
            f"images must have shape [B, {sizes}], as generator {name} returns them, got {list(images.shape)}"
        )


def check_z0(z0: Any, images: Tensor, latent_size: int | None, restarts: int) -> None:
    """Checks type, dtype, shape and device of starting points.

    [B, k] is what an encoder makes of a batch, and would be taken as B restarts that all images share: it is refused
    unless B is `restarts`.

    Raises:
        TypeError: they are no tensor of a floating dtype.
        ValueError: shape or device do not fit.
    """
    if not isinstance(z0, Tensor):
        raise TypeError(f"z0 must be a torch.Tensor, got {type(z0).__name__}")
    if not z0.dtype.is_floating_point:
        raise TypeError(f"z0 must have a floating dtype, got {name_of(z0.dtype)}")
    if z0.device != images.device:
        raise ValueError(f"z0 must be on the images' device ({images.device}), got {z0.device}")
    k = "k" if latent_size is None else latent_size
    fits = z0.dim() == 2 or (z0.dim() == 3 and z0.shape[0] == images.shape[0])
    if not fits or z0.shape[-2] < 1 or (latent_size is not None and z0.shape[-1] != latent_size):
        raise ValueError(
            f"z0 must have shape [R, {k}] or [{images.shape[0]}, R, {k}] with R at least 1, got {list(z0.shape)}"
        )
    if z0.dim() == 2 and z0.shape[0] == images.shape[0] > 1 and z0.shape[0] != restarts:
        raise ValueError(
            f"z0 must have shape [R, {k}] or [B, R, {k}], got {list(z0.shape)} for {images.shape[0]} images: pass "
            "z0[:, None] for one point an image, z0.expand(B, -1, -1) for points that all images share"
        )


def check_values(images: Tensor, start: Tensor, bounds: tuple[float, float] | None) -> None:
    """Checks that images and starting points are finite, and images within 1% of the generator's range.

    The kernels check the same where they run, in `csrc/project_checks.h`, so that a compiled graph checks, too.

    Raises:
        ValueError: a value does not fit.
    """
    if not torch.isfinite(images).all():
        raise ValueError(f"images must be finite{_OTHERWISE}")
    if not torch.isfinite(start).all():
        raise ValueError("z0 must be finite")
    if bounds is None or images.numel() == 0:
        return
    low, high = images.min().item(), images.max().item()
    slack = 0.01 * (bounds[1] - bounds[0])
    if low < bounds[0] - slack or high > bounds[1] + slack:
        raise ValueError(
            f"images must lie in the generator's range [{bounds[0]:g}, {bounds[1]:g}], got [{low:g}, {high:g}]"
            f"{_OTHERWISE}"
        )


def check_generator(generator: nn.Module) -> None:
    """Checks that a generator's parameters and buffers are finite.

    Raises:
        ValueError: one is not; the message names the first.
    """
    bad = non_finite(itertools.chain(generator.named_parameters(), generator.named_buffers()))
    if bad is not None:
        raise ValueError(f"generator {type(generator).__name__} must have finite weights, got {bad}")


def check_errors(errors: Tensor, generator: nn.Module) -> None:
    """Looks for weights that are not finite, which may have become so since construction, where errors are not.

    A graph that is compiled, and a device that would have to be waited for, are not asked.

    Raises:
        ValueError: see :func:`check_generator`.
    """
    if errors.device.type == "cpu" and can_be_read(errors) and not torch.isfinite(errors).all():
        check_generator(generator)


def check_output(output: Any, name: str) -> Sequence[int]:
    """Checks what a generator returned for two latents.

    Returns:
        (C, H, W) of its images.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape than images of two latents.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"generator {name} must return a tensor, got {type(output).__name__}")
    if output.dim() != 4 or output.shape[0] != 2:
        raise ValueError(
            f"generator {name} must return images [N, C, H, W] for N latents, got {list(output.shape)} for 2"
        )
    return output.shape[1:]
