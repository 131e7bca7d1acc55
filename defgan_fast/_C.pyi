"""The compiled module: everything that is not a tensor. The operators are `torch.ops.defgan_fast.*`."""

from typing import Any

def build_info() -> dict[str, str]:
    """The compiler, the torch it was built for, whether CUDA takes part ("yes" or "no"), and its toolkit."""

def instruction_sets() -> list[str]:
    """The instruction sets that this machine can run, best last."""

def active_instruction_set() -> str:
    """The one in use: `$DEFGAN_CPU_ISA` if set, else the best."""

def usable_threads() -> int:
    """The threads that a call would use now: torch's number, but no more than affinity and quota allow."""

def thread_counts() -> dict[str, int]:
    """The threads of this process's calls: `busy` now, the `most` at the same time so far, and their `yields`."""

def machine_limits(isa: str, precision: str, threads: int, seconds: float) -> float:
    """GFLOP/s of a loop of multiply-adds on registers: what no kernel can exceed."""

def flop_per_step(plan: str) -> int:
    """Multiply-add FLOP of one row and one step, forward and backward, border taps counted exactly."""

def cuda_schedule(
    plan: str,
    elements: list[int],
    precision: str,
    *,
    capability: tuple[int, int],
    multiprocessors: int,
    shared_memory: int,
    rows: int,
    max_rows: int = 0,
    mapping: str = "auto",
) -> dict[str, Any]:
    """How a GPU with these properties would carry out a projection; needs no GPU.

    Args:
        plan: the lowered generator.
        elements: how many each of its parameters has.
        precision: "float32", "float16" or "bfloat16".
        capability: compute capability.
        multiprocessors: of the GPU.
        shared_memory: bytes that one block may ask for.
        rows: images x restarts.
        max_rows: rows in flight at most; 0: automatic.
        mapping: "auto", or the one to force: "fused", "layered" or "split".

    Returns:
        `mapping`, `reason`, `rows_in_flight`, `teams`, `blocks_per_team`, `workspace_bytes`.

    Raises:
        ValueError: the plan is malformed, or `mapping` cannot run it on this device.
    """
