"""The device that a command line names, checked before any work is done."""

from __future__ import annotations

import torch


def parse(text: str) -> torch.device:
    """Device of ``--device``: "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: no such kind of device, or not on this machine.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {text!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(
                f"--device must be on this machine, got {text!r} with {count} CUDA devices in sight"
            )
    return device
