"""The precisions that kernels, training and benchmarks compute in, each named as PyTorch names its dtype."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtype of every precision. Sums, latents and their velocities are float32 in all of them."""

ALL: tuple[str, ...] = tuple(DTYPES)
"""What the CUDA kernels compute in."""

ON_CPU: tuple[str, ...] = ("float32", "bfloat16")
"""What the CPU kernels compute in. Processors have no float16 arithmetic to gain from; bfloat16 is as fast there."""


def name_of(dtype: torch.dtype) -> str:
    """Returns a dtype's name without its module: `torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")
