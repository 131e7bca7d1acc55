"""Reconstructions of a whole part of a data set, computed once and kept in memory-mapped files.

Training on reconstructions (Defense-GAN-Rec) and every table of the paper need the same projections, which
take hours. A folder named by a hash of everything that they depend on holds them: generator, settings of the
projection, and data. Work goes on where it was stopped, block by block; a lock that the system releases with
the process makes a second run wait for the first and then find its result. A file's space is reserved before
it is mapped, because a full disk would otherwise kill the process at a store to memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from defgan_fast import files, progress
from defgan_fast.evaluation.projection import Reconstructions, device_of, in_groups
from defgan_fast.projector import Projector

IMAGES = "images.npy"
ERRORS = "errors.npy"
DONE = "done.json"
SETTINGS = "settings.json"
LOCK = "lock"


def cached(
    projector: Projector,
    images: torch.Tensor,
    data_hash: str,
    folder: Path,
    limit: int | None = None,
) -> Reconstructions:
    """Reconstructs ``images``, or takes from the cache what is there.

    Args:
        projector: its generator and settings belong to the key; its seed must be an int.
        images: [N, C, H, W] in the generator's range, on any device.
        data_hash: fingerprint of the images, part of the key.
        folder: of all caches; this one's lies below it.
        limit: only the first so many images now; the rest of the file stays for a later call.

    Returns:
        The first ``limit`` reconstructions and errors on the CPU; both are mapped files, read page by page.

    Raises:
        ValueError: the projector draws fresh starting points at each call, or a file in the cache does not
            have the shape that belongs to its key.
        OSError: the disk is full, before any work is done.
    """
    if projector.seed is None:
        raise ValueError("projector must have a seed to be cached, got seed=None")
    count = len(images) if limit is None else min(limit, len(images))
    settings = _settings(projector, images, data_hash)
    place = folder / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)

    def waiting() -> None:
        print(f"waiting for another process that computes {place}", file=sys.stderr)

    with files.locked(place / LOCK, waiting):
        if not (place / SETTINGS).exists():
            files.write_json(place / SETTINGS, settings)
        pictures = _mapped(place / IMAGES, tuple(images.shape))
        errors = _mapped(place / ERRORS, (len(images),))
        done = _done(place / DONE)
        with progress.bar(count, "reconstructions", "image", initial=min(done, count)) as bar:
            for rows, found in in_groups(projector, images[done:count]) if done < count else ():
                block = slice(done + rows.start, done + rows.stop)
                pictures[block] = found.images.cpu().numpy()
                errors[block] = found.errors.cpu().numpy()
                # The data first: what the record counts must be there after a crash.
                pictures.flush()
                errors.flush()
                files.write_json(place / DONE, {"images": block.stop}, indent=None)
                bar.update(block.stop - block.start)
    return Reconstructions(torch.from_numpy(pictures[:count]), torch.from_numpy(errors[:count]))


def weights_hash(module: nn.Module) -> str:
    """Returns the SHA-256 of the names, shapes and values of a module's state."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _settings(projector: Projector, images: torch.Tensor, data_hash: str) -> dict[str, Any]:
    """Returns everything that the reconstructions depend on."""
    from defgan_fast._version import __version__

    one = images[:1].to(device_of(projector))
    return {
        "generator": weights_hash(projector.generator),
        "generator_class": type(projector.generator).__name__,
        "data": data_hash,
        "shape": list(images.shape),
        "steps": projector.steps,
        "restarts": projector.restarts,
        "lr": projector.lr,
        "momentum": projector.momentum,
        "lr_decay": projector.lr_decay,
        "decay_at": projector.decay_at,
        "seed": projector.seed,
        "starts": projector.starts,
        "start_std": projector.start_std,
        "candidates": _candidates(projector),
        "radius": projector.radius,
        "keep": None if projector.keep is None else [list(pair) for pair in projector.keep],
        "precision": projector.precision_for(one),
        "backend": projector.backend_for(one),
        "defgan_fast": __version__,
    }


def _candidates(projector: Projector) -> int | str | None:
    """Returns how many candidates there are, or a hash of the user's own; None where they are not used."""
    if projector.starts != "nearest":
        return None
    own = projector.candidates
    if not isinstance(own, torch.Tensor):
        return own
    return hashlib.sha256(own.cpu().double().numpy().tobytes()).hexdigest()


def _mapped(path: Path, shape: Sequence[int]) -> np.memmap:
    """Opens a float32 array in a file of its full size, which is made if need be."""
    if not path.exists():
        partial = path.with_suffix(".new")
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=tuple(shape)).flush()
        try:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                with partial.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, max(os.fstat(file.fileno()).st_size, 1))
        except OSError as error:
            partial.unlink()
            reason = f"{os.strerror(error.errno or 0)}, reserving space for"
            raise OSError(error.errno, reason, str(path)) from None
        files.publish(partial, path)
    try:
        # Read-only first: opened for writing, a file that is too short would silently be made longer.
        np.lib.format.open_memmap(path, mode="r")
        array = np.lib.format.open_memmap(path, mode="r+")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is truncated or not an array ({error}); delete its folder") from None
    if array.shape != tuple(shape) or array.dtype != np.float32:
        raise ValueError(f"{path} must be float32 {tuple(shape)}, got {array.dtype} {array.shape}")
    return array


def _done(path: Path) -> int:
    return int(json.loads(path.read_text())["images"]) if path.exists() else 0
