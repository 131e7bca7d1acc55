"""Several processes that train one network together, started by ``torchrun``.

Every process draws the random numbers of the whole batch and computes its own part of it; the gradients are
averaged in one flat all-reduce. So the run is that of one process with the same batch, within rounding, and
checkpoints do not depend on the number of processes. The wrapper ``DistributedDataParallel`` would not do:
it averages what a backward pass leaves, and the critic's gradients do not come from one
(:mod:`defgan_fast.training.critic_gradients`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist


def rank() -> int:
    """Returns the number of this process, 0 where there is one only."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that ``torchrun`` started, and leaves them; does nothing where it was not used.

    Yields the device of this process: on a machine with several GPUs each process takes its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def part(count: int, parts: int) -> list[slice]:
    """Returns this process's share of ``count`` rows, in ``parts`` slices of the same length.

    Raises:
        ValueError: the rows cannot be divided evenly, which would weigh them unequally.
    """
    pieces = world() * parts
    if count % pieces:
        raise ValueError(
            f"batch must be a multiple of processes x accumulate, {world()} x {parts}, got {count}"
        )
    size = count // pieces
    first = rank() * parts
    return [slice((first + i) * size, (first + i + 1) * size) for i in range(parts)]


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replaces each tensor by its mean over the processes, in place."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def any_true(flag: bool, device: torch.device) -> bool:
    """Returns whether ``flag`` is set in any process; all have to ask at the same step."""
    if world() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def wait() -> None:
    """Returns once every process has come here."""
    if world() > 1:
        dist.barrier()
