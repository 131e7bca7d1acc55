"""What this installation is and can do: `defgan-fast info`, for bug reports and beside measured numbers.

It answers the questions that come first when something is slow or missing: which versions, which backends,
which instruction set is in use, how the extension was built or why it was not, and why CUDA is absent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from . import _build, _extension
from ._version import __version__


def environment() -> dict[str, Any]:
    """Everything that `defgan-fast info` prints, as a dict that serialises to JSON.

    Keys: `versions` (defgan_fast, commit, python, torch, numpy), `backends` (by name: whether it is available
    and why not), `extension` (how it was built and with what), `cpu` (model, cores, threads, instruction
    sets).
    """
    module = _extension.module()
    status = _extension.status()
    extension: dict[str, Any] = dict(status)
    if module is not None:
        extension |= {"flags": " ".join(_build.COMPILE_FLAGS), **module.build_info()}
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
            "cuda": _cuda(extension),
            "reference": _available(True, None),
        },
        "extension": extension,
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_sets": module.instruction_sets() if module else [],
            "active": module.active_instruction_set() if module else None,
        },
    }


def cuda_decision() -> _build.Decision:
    """Whether a build made here and now would have the CUDA kernels, and why."""
    from torch.utils.cpp_extension import CUDA_HOME  # slow to import, and only this command needs it

    csrc = _extension.sources()
    return _build.decide_cuda(
        torch.__version__,
        torch.version.cuda,
        CUDA_HOME,
        _build.nvcc_version(CUDA_HOME) if CUDA_HOME else None,
        len(_build.cuda_source_files(csrc)) if csrc else 0,
    )


def _available(available: bool, reason: str | None) -> dict[str, Any]:
    return {"available": available, "reason": reason}


def _cuda(extension: dict[str, Any]) -> dict[str, Any]:
    if extension.get("cuda") != "yes":
        return _available(False, cuda_decision().reason)
    if not torch.cuda.is_available():
        return _available(False, "the kernels are built, but torch sees no GPU")
    return _available(True, None)


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


def _text(found: dict[str, Any]) -> str:
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
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers `defgan-fast info`."""
    parser = subparsers.add_parser("info", help="versions, backends, and how the extension was built")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    found = environment()
    print(json.dumps(found, indent=2) if args.json else _text(found))
    return 0
