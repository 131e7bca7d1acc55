"""Projects many images in short calls, so that a progress bar moves and an interruption is heard.

The number of images of a call follows the time that the last call took. A projection has the same bits whatever
else is in its batch, so the results do not depend on how busy the machine is. Two cases have no such promise and get
calls of a fixed number of images: the reference backend, and attacks through the defence, because the last bits of a
classifier depend on its batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from defgan_fast import progress
from defgan_fast.projector import Projector

# The seconds that a call is to take; it may take twice as long before it is noticed.
CALL_SECONDS = 1.0
# A call has at most so many times the images of the one before it, since the first ones also warm up.
GROWTH = 4
# Steps x restarts x parameters x images of one call that take about a second on two cores.
WORK_PER_CALL = 3.5e9
LARGEST_FIXED_GROUP = 64
LARGEST_GROUP = 1024


class Reconstructions(NamedTuple):
    """What the projections of N images came to."""

    images: torch.Tensor  # [N, C, H, W]
    errors: torch.Tensor  # [N] float32, mean squared errors of the chosen restarts


def device_of(projector: Projector) -> torch.device:
    """Returns the device on which a projector wants its images: its generator's, the CPU where that has no weights."""
    parameter = next(projector.generator.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def fixed_group(projector: Projector) -> int:
    """Returns how many images to project at once where the number must not depend on the machine."""
    parameters = sum(parameter.numel() for parameter in projector.generator.parameters())
    work = projector.steps * projector.restarts * max(parameters, 1)
    return min(max(int(WORK_PER_CALL / max(work, 1)), 1), LARGEST_FIXED_GROUP)


def in_groups(projector: Projector, images: torch.Tensor) -> Iterator[tuple[slice, Reconstructions]]:
    """Projects images group by group, without gradients.

    Args:
        projector: any; its generator's device is where the work is done.
        images: [N, C, H, W] in the range of the projector, on any device; N may be 0.

    Yields:
        The rows of a group and what they came to, on the device of ``images``.
    """
    device, size = device_of(projector), min(fixed_group(projector), LARGEST_GROUP)
    adaptive = len(images) > 0 and projector.backend_for(images[:1].to(device)) != "reference"
    start = 0
    while True:
        rows = slice(start, min(start + size, len(images)))
        began = time.perf_counter()
        with torch.no_grad():
            found = projector.project(images[rows].to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        yield rows, Reconstructions(found.images.to(images.device), found.errors.to(images.device))
        start = rows.stop
        if start >= len(images):
            return
        if adaptive:
            size = _next_size(rows.stop - rows.start, seconds)


def project(
    projector: Projector, images: torch.Tensor, on_group: Callable[[int], Any] | None = None
) -> Reconstructions:
    """Projects images [N, C, H, W] in short calls.

    Args:
        projector: any.
        images: in the range of the projector, on any device.
        on_group: called after each group with its number of images.

    Returns:
        All reconstructions and errors, on the device of ``images``.
    """
    parts = []
    for rows, part in in_groups(projector, images):
        parts.append(part)
        if on_group is not None:
            on_group(rows.stop - rows.start)
    return Reconstructions(*(torch.cat(field) for field in zip(*parts, strict=True)))


def project_with_bar(projector: Projector, images: torch.Tensor, title: str) -> Reconstructions:
    """Projects images [N, C, H, W] in short calls, with a progress bar of that title."""
    with progress.bar(len(images), title, "image") as bar:
        return project(projector, images, bar.update)


def _next_size(images: int, seconds: float) -> int:
    """Returns how many images the next call gets after one of ``images`` that took ``seconds``."""
    wanted = int(images * CALL_SECONDS / max(seconds, 1e-6))
    return max(min(wanted, GROWTH * images, LARGEST_GROUP), 1)
