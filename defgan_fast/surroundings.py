"""What surrounds a projection: a wrapper for several devices, and images in another range than the generator's."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .operators import can_be_read


def check_training_in_parallel(generator: nn.Module) -> None:
    """Checks that DistributedDataParallel, where this call is within one, does not wait for a generator's gradients.

    A generator's parameters are constants to training and never get a gradient. Without this check the second
    iteration would raise an error that does not name them.

    Raises:
        RuntimeError: it would wait.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    wrapper = DistributedDataParallel._get_active_ddp_module() if torch.distributed.is_available() else None
    if wrapper is None or wrapper.find_unused_parameters or wrapper.static_graph:
        return
    awaited = {id(p) for p in wrapper._module_parameters if p.requires_grad}
    if any(id(p) in awaited for p in generator.parameters()):
        raise RuntimeError(
            "generator must have no parameters that DistributedDataParallel waits for, since a projector gives them no "
            "gradient: call projector.requires_grad_(False) before wrapping the model, or pass "
            "find_unused_parameters=True"
        )


def warn_of_another_range(images: Tensor, bounds: tuple[float, float] | None, warned: set[str]) -> None:
    """Warns, once, of images that look as if they were in [0, 1] where the generator's are in [-1, 1].

    Values are legal, and a batch may be so by chance, so that this is no error.

    Args:
        images: [B, C, H, W].
        bounds: the generator's range, None where it is not known.
        warned: of what a projector has warned so far.
    """
    if bounds != (-1.0, 1.0) or "range" in warned or not can_be_read(images) or not images.numel():
        return
    if images.detach().amin() >= 0:
        warned.add("range")
        warnings.warn(
            "images must lie in the generator's range [-1, 1], and none of their values is below 0: if they are in "
            "[0, 1], pass 2 * images - 1",
            stacklevel=5,
        )
