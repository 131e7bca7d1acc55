"""The two ways to carry out a projection: by the kernels, from a plan, or in plain PyTorch, with the generator itself.

Both answer the same three questions, so that what surrounds them is written once (`Projector.project`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import gradients, precisions, reference
from .kernels import ops
from .operators import outside_of_transforms
from .plan import Plan, structure_of, tensors_of
from .reference import Descent

_DECODED = 2
_decoded: list[tuple[tuple[object, ...], Tensor]] = []
"""The images of candidates that the reference path has decoded last, with the state that they depend on."""


class Descended(NamedTuple):
    """What a descent ends with.

    Attributes:
        latents: [B, R, k].
        errors: mean squared errors, [B, R].
        steps: how many steps each row took, [B, R] int64; None: all of them.
    """

    latents: Tensor
    errors: Tensor
    steps: Tensor | None


class Path(Protocol):
    """One way to carry out a projection."""

    def descend(self, images: Tensor, start: Tensor, descent: Descent) -> Descended:
        """Projects images [B, C, H, W] from starting points [R, k] or [B, R, k]."""
        ...

    def nearest(self, images: Tensor, candidates: Tensor, restarts: int, draws: Tensor | None) -> Tensor:
        """Returns which candidates [N, k] have the images nearest to each image, [B, R]; see `reference.nearest`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the images of latents, [N, k] -> [N, C, H, W]."""
        ...

    def unrolled(
        self, images: Tensor, reconstruction: Tensor, z0: Tensor, descent: Descent, steps: Tensor | None
    ) -> Tensor:
        """Returns the reconstruction, tied to its image by the gradient through all steps from z0 [B, k].

        Each image's steps are that many [B], or None: all of them.
        """
        ...


class KernelPath:
    """The compiled kernels.

    Args:
        plan: the lowered generator.
        generator: the module whose tensors the plan names.
        precision: one of `precisions.ALL`.
        max_rows: rows in flight at most; None keeps working memory under 200 MB.
        validate: whether the kernels check values.
    """

    def __init__(
        self, plan: Plan, generator: nn.Module, precision: str, max_rows: int | None, validate: bool
    ) -> None:
        self.plan = plan.text
        self.parameters = [p.detach() for p in plan.tensors(generator)]
        self.precision = precision
        self.max_rows = max_rows or 0
        self.validate = validate

    def descend(self, images: Tensor, start: Tensor, descent: Descent) -> Descended:
        lr_schedule, momentum, radius, keep = descent
        arguments = (
            _single(images.detach()),
            _single(start.detach()),
            self.parameters,
            self.plan,
            lr_schedule,
            momentum,
            self.precision,
            self.max_rows,
            self.validate,
            radius,
        )
        if keep:
            return Descended(*ops.project_keeping(*arguments, keep))
        return Descended(*ops.project(*arguments), None)

    def nearest(self, images: Tensor, candidates: Tensor, restarts: int, draws: Tensor | None) -> Tensor:
        images, candidates = _single(images.detach()), _single(candidates)
        return ops.nearest(images, candidates, self.parameters, self.plan, restarts, draws)

    def decode(self, latents: Tensor) -> Tensor:
        return ops.decode(latents, self.parameters, self.plan, self.max_rows)

    def unrolled(
        self, images: Tensor, reconstruction: Tensor, z0: Tensor, descent: Descent, steps: Tensor | None
    ) -> Tensor:
        lr_schedule, momentum, radius, _ = descent
        tied: Tensor = gradients.unrolled(
            images, reconstruction, z0, self.parameters, self.plan, lr_schedule, momentum, radius, steps
        )
        return tied


class ReferencePath:
    """Plain PyTorch.

    Args:
        generator: the module.
        takes_maps: whether its latents are [N, k, 1, 1] and not [N, k].
        precision: "float64", or one of `precisions.ALL`; the generator's layers run in it by autocast where it has
            16 bits, and latents and errors stay float32.
        image_shape: (C, H, W) of the images.
        device: "cpu" or "cuda".
        max_rows: rows in flight at most; None keeps working memory near 200 MB.
        check: raises where the values of images and starting points do not fit; None: they are not looked at.
    """

    def __init__(
        self,
        generator: nn.Module,
        takes_maps: bool,
        precision: str,
        image_shape: Sequence[int],
        device: str,
        max_rows: int | None,
        check: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self.generator = generator
        self.takes_maps = takes_maps
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.layers = precisions.DTYPES.get(precision, self.dtype)
        self.image_shape = tuple(image_shape)
        self.device = device
        self.check = check
        self.max_rows = max_rows or reference.rows_that_fit(image_shape)

    def descend(self, images: Tensor, start: Tensor, descent: Descent) -> Descended:
        lr_schedule, momentum, radius, keep = descent

        def project(images: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if self.check is not None:
                self.check(images, start)
            targets, z0 = images.to(self.dtype), start.to(self.dtype)
            return reference.project_keeping(
                self._decoder, targets, z0, lr_schedule, momentum, keep, self.max_rows, radius
            )

        each = start.expand(len(images), -1, -1) if start.dim() == 2 else start
        return Descended(*outside_of_transforms(project, images.detach(), each.detach()))

    @torch.no_grad()
    def nearest(self, images: Tensor, candidates: Tensor, restarts: int, draws: Tensor | None) -> Tensor:
        known = self._images_of_candidates(candidates)
        return outside_of_transforms(
            lambda images, draws: reference.nearest(images, known, restarts, draws), images.detach(), draws
        )

    def _images_of_candidates(self, candidates: Tensor) -> Tensor:
        """Returns the images of candidates [N, k], which are decoded once for each state of the generator."""
        global _decoded
        tensors = (*tensors_of(self.generator), candidates)
        state = (structure_of(self.generator), self.layers, _content_of(tensors))
        for known, images in _decoded:
            if known == state:
                return images
        with torch.inference_mode(False):
            parts = [self._decoder(part.to(self.dtype)) for part in candidates.split(self.max_rows)]
            images = torch.cat(parts)
        # Threads and forked workers may do so at the same time: a list takes the place of another in one step.
        _decoded = [(state, images), *_decoded][:_DECODED]
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return outside_of_transforms(self._decode, latents)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        if not len(latents):  # many modules refuse an empty batch
            return latents.new_empty(0, *self.image_shape)
        return self._decoder(latents)

    def _decoder(self, latents: Tensor) -> Tensor:
        narrow = self.layers in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device, dtype=self.layers, enabled=narrow):
            return self.outputs(latents).to(self.dtype)

    def outputs(self, latents: Tensor) -> Tensor:
        """Returns what the generator makes of latents [N, k], whatever that is."""
        z = latents.to(dtype_of(self.generator) or latents.dtype)
        found: Tensor = self.generator(z[:, :, None, None] if self.takes_maps else z)
        return found

    def unrolled(
        self, images: Tensor, reconstruction: Tensor, z0: Tensor, descent: Descent, steps: Tensor | None
    ) -> Tensor:
        tied: Tensor = gradients.UnrolledDecoder.apply(
            images, reconstruction, z0, self._decoder, descent, self.dtype, steps
        )
        return tied


def tie(
    gradient: str,
    path: Path,
    images: Tensor,
    reconstruction: Tensor,
    descent: Descent,
    z0: Tensor,
    steps: Tensor | None,
) -> Tensor:
    """Returns reconstructions with the gradient that a projector's `gradient` promises.

    Who records a graph may differentiate it later, so this does not depend on what the images require now.

    Args:
        gradient: "straight_through", "unrolled" or "none".
        path: that has made the reconstructions.
        images: [N, C, H, W].
        reconstruction: [N, C, H, W].
        descent: the settings of the descent.
        z0: where each row began, [N, k].
        steps: how many steps each row took, [N]; None: all of them.
    """
    tied: Tensor
    if gradient == "straight_through":
        tied = gradients.straight_through(images, reconstruction)
    elif gradient == "none":
        tied = gradients.no_gradient(images, reconstruction, gradients.NO_GRADIENT_MESSAGE)
    else:
        tied = path.unrolled(images, reconstruction, z0.detach(), descent, steps)
    return tied


def _single(tensor: Tensor) -> Tensor:
    """Returns a float64 tensor as float32, which the kernels take; any other one as it is."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def dtype_of(generator: nn.Module) -> torch.dtype | None:
    """Returns the dtype of a generator's parameters, None where it has none that are floating point."""
    return next((p.dtype for p in tensors_of(generator) if p.is_floating_point()), None)


def _content_of(tensors: Iterable[Tensor]) -> tuple[object, ...]:
    """Returns a value that differs where a tensor's device, dtype, shape or content does."""
    found: list[object] = []
    for tensor in tensors:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        found += (tensor.device, tensor.dtype, tensor.shape, hashlib.blake2b(content).digest())
    return tuple(found)
