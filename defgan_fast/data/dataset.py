"""What a data set is: images, labels, and the range that the images' values have."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from defgan_fast import files

SPLITS = ("train", "validation", "test")
Range = tuple[float, float]
UNIT: Range = (0.0, 1.0)
SIGNED: Range = (-1.0, 1.0)


@dataclass(frozen=True)
class Dataset:
    """Images and their labels, in a fixed order; ``images, labels = dataset`` takes it apart.

    Args:
        images: [N, C, H, W], float32 in ``value_range``, or uint8 pixels that :func:`to_range` brings there.
        labels: [N] int64.
        value_range: (low, high) of the images as floating-point numbers, which is the range of the generators
            and the one in which an attack stays. There is no default: images in [-1, 1] that are taken for
            images in [0, 1] give wrong results without an error.
    """

    images: torch.Tensor
    labels: torch.Tensor
    value_range: Range

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield self.images
        yield self.labels

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int | None) -> Dataset:
        """Returns the first ``count`` images with their labels, all of them where it is None."""
        return Dataset(self.images[:count], self.labels[:count], self.value_range)

    def to(self, device: torch.device | str) -> Dataset:
        """Returns the same data set on a device."""
        return Dataset(self.images.to(device), self.labels.to(device), self.value_range)


def to_range(pixels: torch.Tensor, value_range: Range) -> torch.Tensor:
    """Returns uint8 pixels of any shape as float32 in ``value_range``."""
    low, high = value_range
    return low + pixels.float() / 255 * (high - low)


def fingerprint(dataset: Dataset) -> str:
    """Returns the SHA-256 of the 8-bit pixels and the labels, which records what a model was trained on.

    Floating-point images are brought back to 8 bits from the data set's own range, so that the fingerprint does
    not depend on whether pixels or numbers were loaded.
    """
    pixels = dataset.images
    if pixels.is_floating_point():
        low, high = dataset.value_range
        pixels = ((pixels - low) / (high - low) * 255).round().to(torch.uint8)
    digest = hashlib.sha256(pixels.contiguous().cpu().numpy().tobytes())
    digest.update(dataset.labels.to("cpu", torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Returns the folder of downloads: ``$XDG_CACHE_HOME/defgan_fast``, by default ``~/.cache/defgan_fast``.

    Raises:
        OSError: the user has no home folder.
    """
    return files.caches() / "defgan_fast"


def places(name: str, root: str | os.PathLike[str] | None) -> list[Path]:
    """Returns the folders in which the files of a data set are looked for, in this order."""
    if root is not None:
        return [Path(root), Path(root) / name]
    found = []
    if os.environ.get("DEFGAN_DATA"):
        found.append(Path(os.environ["DEFGAN_DATA"]) / name)
    # A user without a home folder has no cache, but may have data.
    with contextlib.suppress(OSError):
        found.append(cache_folder() / name)
    return found
