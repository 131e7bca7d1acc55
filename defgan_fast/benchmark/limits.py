"""What this machine can do at best: the kernels are measured against it, not against other software alone.

Two limits for each precision. The probe multiplies and adds registers and touches no memory: nothing can be
faster on the same threads. `torch.mm` of large square matrices is what a tuned library reaches with memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch

from ..kernels import extension
from ..precisions import DTYPES, ON_CPU

MATRICES = (256, 512, 1024, 2048)


def machine_limits(
    threads: int, precisions: Iterable[str] = ON_CPU, seconds: float = 0.3
) -> dict[str, dict[str, float | None]]:
    """GFLOP/s by precision: `{"float32": {"probe": ..., "torch.mm": ...}, "bfloat16": ...}`."""
    return {
        precision: {
            "probe": probe(precision, threads, seconds),
            "torch.mm": matrix_product(DTYPES[precision], seconds),
        }
        for precision in precisions
    }


def probe(precision: str, threads: int, seconds: float = 0.3) -> float | None:
    """GFLOP/s of multiply-adds on registers, best of three; None without the compiled module."""
    module: Any = extension.module()
    if module is None:
        return None
    isa = module.active_instruction_set()
    return max(module.machine_limits(isa, precision, threads, seconds) for _ in range(3))


def matrix_product(dtype: torch.dtype, seconds: float) -> float:
    """Median GFLOP/s of `torch.mm` of square matrices, on torch's threads, of the largest size that is affordable.

    Without bfloat16 instructions a product of 2,048 rows can take a minute, so the size grows while the next one, of
    eight times the work, would still take less than `seconds`.
    """
    rates: list[float] = []
    for size in MATRICES:
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        torch.mm(a, b)
        rates = []
        end = time.perf_counter() + (3 * seconds if size == MATRICES[-1] else 0)
        while time.perf_counter() < end or len(rates) < 3:
            start = time.perf_counter()
            torch.mm(a, b)
            rates.append(2e-9 * size**3 / (time.perf_counter() - start))
        if 8 * 2e-9 * size**3 / statistics.median(rates) > seconds:
            break
    return statistics.median(rates)
