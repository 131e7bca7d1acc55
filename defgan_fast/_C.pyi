"""The compiled module: everything that is not a tensor. The operators are `torch.ops.defgan_fast.*`."""

from typing import Any

def build_info() -> dict[str, str]:
    """The compiler, the torch it was built for, and whether CUDA takes part ("yes" or "no")."""

def instruction_sets() -> list[str]:
    """The instruction sets that this machine can run, best last."""

def active_instruction_set() -> str:
    """The one in use: `$DEFGAN_CPU_ISA` if set, else the best."""

def machine_limits(isa: str, precision: str, threads: int, seconds: float) -> float:
    """GFLOP/s of a loop of multiply-adds on registers: what no kernel can exceed."""

def flop_per_step(plan: str) -> int:
    """Multiply-add FLOP of one row and one step, forward and backward, border taps counted exactly."""

def describe_plan(plan: str) -> list[dict[str, Any]]:
    """The layers of a plan as the kernels see them."""
