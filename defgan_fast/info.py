"""What this installation is and can do: `defgan-fast info`, for bug reports and beside measured numbers.

It answers the questions that come first when something is slow or missing: which versions, which backends,
which instruction set is in use, how the extension was built or why it was not, why CUDA is absent, and how a GPU
would share out the work.
"""

from __future__ import annotations

import os
import platform
import subprocess
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import nn

from ._version import __version__
from .kernels import build, extension, ops
from .plan import latent_size_of, lower

ROWS = (10, 160, 10_000)  # 1, 16 and 1,000 images with 10 restarts
# Where there is no GPU, planning is shown for this one.
H100 = {"capability": (9, 0), "multiprocessors": 132, "shared_memory": 227 * 1024}

_Lowered = tuple[str, list[int]]  # a plan's text, and how many elements each of its parameters has


def environment() -> dict[str, Any]:
    """Everything that `defgan-fast info` prints, as a dict that serialises to JSON.

    Keys: `versions` (defgan_fast, commit, python, torch, numpy), `backends` (by name: whether it is available
    and why not), `extension` (how it was built and with what), `cpu` (model, cores, threads, instruction
    sets), `cuda` (the mapping that is forced, and for each GPU which mapping serves which generator and size).
    """
    module = extension.module()
    status = extension.status()
    built: dict[str, Any] = dict(status)
    if module is not None:
        built |= {"flags": " ".join(build.COMPILE_FLAGS), **module.build_info()}
        if ops.cuda_kernels_built:
            built["nvcc_flags"] = " ".join(build.NVCC_FLAGS)
    return {
        "versions": {
            "defgan_fast": __version__,
            "commit": _commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "backends": {
            "cpu": _available(module is not None, None if module else status["reason"]),
            "cuda": _available(ops.missing_cuda() is None, ops.missing_cuda()),
            "reference": _available(True, None),
        },
        "extension": built,
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_sets": module.instruction_sets() if module else [],
            "active": module.active_instruction_set() if module else None,
        },
        "cuda": {
            "forced_mapping": os.environ.get("DEFGAN_CUDA_MAPPING") or None,
            "devices": _devices(module) if module else [],
        },
    }


def _devices(module: ModuleType) -> list[dict[str, Any]]:
    """Every GPU in sight, or the one that planning is shown for, with the mappings of the shipped generators."""
    found = []
    if ops.cuda_kernels_built and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu: Any = torch.cuda.get_device_properties(index)
            properties = {
                "capability": (gpu.major, gpu.minor),
                "multiprocessors": gpu.multi_processor_count,
                "shared_memory": gpu.shared_memory_per_block_optin,
            }
            found.append({"name": gpu.name, "present": True, **properties})
    if not found:
        found = [{"name": "NVIDIA H100", "present": False, **H100}]
    generators = _generators()
    for device in found:
        properties = {key: device[key] for key in H100}
        device["capability"] = list(device["capability"])
        device["mappings"] = [
            {
                "generator": name,
                "precision": precision,
                "rows": rows,
                **_schedule(module, generator, precision, rows, properties),
            }
            for name, generator in generators.items()
            for precision in ("float16", "float32")
            for rows in ROWS
        ]
    return found


def _schedule(
    module: ModuleType, generator: _Lowered, precision: str, rows: int, device: dict[str, Any]
) -> dict[str, Any]:
    wanted = os.environ.get("DEFGAN_CUDA_MAPPING") or "auto"
    try:
        found = module.cuda_schedule(*generator, precision, rows=rows, mapping=wanted, **device)
    except ValueError as error:
        return {"mapping": None, "reason": str(error)}
    return {key: found[key] for key in ("mapping", "reason")}


def _generators() -> dict[str, _Lowered]:
    """The shipped ones, and the paper's geometry."""
    from . import models, weights

    shipped = {name: weights.load_generator(name) for name in weights.shipped("generator")}
    return {name: _lowered(generator) for name, generator in {"mnist": models.Generator(), **shipped}.items()}


def _lowered(generator: nn.Module) -> _Lowered:
    plan = lower(generator, latent_size_of(generator) or 0)
    return plan.text, [tensor.numel() for tensor in plan.tensors(generator)]


def _available(available: bool, reason: str | None) -> dict[str, Any]:
    return {"available": available, "reason": reason}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    """The commit of the checkout that the package runs from; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def text(found: dict[str, Any]) -> str:
    """Returns what :func:`environment` found as lines of a name and a value."""
    versions, extension, cpu = found["versions"], found["extension"], found["cpu"]
    rows = [(name, value) for name, value in versions.items() if value is not None]
    for name, backend in found["backends"].items():
        state = "available" if backend["available"] else f"absent: {backend['reason']}"
        rows.append((f"backend {name}", state))
    rows.append(("extension", f"built {extension['built']}" if extension["path"] else "absent"))
    rows += [(f"  {name}", value) for name, value in sorted(extension.items()) if name != "built" and value]
    rows.append(("processor", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads in use"))
    if cpu["active"]:
        rows.append(("instruction sets", f"{', '.join(cpu['instruction_sets'])}; in use: {cpu['active']}"))
    for device in found["cuda"]["devices"]:
        rows.append(
            ("GPU", device["name"] if device["present"] else f"none; planned for an {device['name']}:")
        )
        forced = found["cuda"]["forced_mapping"]
        if forced:
            rows.append(("  DEFGAN_CUDA_MAPPING", forced))
        for (name, precision), chosen in groupby(
            device["mappings"], key=lambda m: (m["generator"], m["precision"])
        ):
            planned = ", ".join(f"{m['rows']:,} rows {m['mapping'] or m['reason']}" for m in chosen)
            rows.append((f"  {name} {precision}", planned))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
