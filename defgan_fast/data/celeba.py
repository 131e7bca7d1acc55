"""CelebA: a folder of aligned JPEGs and two lists, which has to be fetched by hand.

It has no official checksums; its fingerprint says what a model was trained on.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from defgan_fast import arguments
from defgan_fast.data.dataset import SIGNED, SPLITS, Dataset, places, to_range

ATTRIBUTES = "list_attr_celeba.txt"
PARTITION = "list_eval_partition.txt"
# Where the aligned images may lie, seen from the folder of the two lists.
FOLDERS = ("img_align_celeba", "images", ".")
LABEL = "Male"
# Aligned images are 178 x 218; the largest centred square is halved and more.
SIZE = 64


def load(root: str | os.PathLike[str] | None, split: str) -> Dataset:
    """Loads one part as float32; see :func:`defgan_fast.data.load`."""
    pixels = celeba_pixels(root, split)
    return Dataset(to_range(pixels.images, pixels.value_range), pixels.labels, pixels.value_range)


def celeba_pixels(root: str | os.PathLike[str] | None = None, split: str = "train") -> Dataset:
    """Loads one part of CelebA as uint8 [N, 3, 64, 64], with labels [N] int64, 1 for men and 0 for women.

    Each aligned JPEG is cut to its largest centred square and reduced to 64x64 by area averaging. Arguments and
    errors are those of :func:`defgan_fast.data.load`.

    Raises:
        FileNotFoundError: one of the lists, or an image that they name, is missing.
        ValueError: a list does not parse, or an image is damaged; the message names it.
    """
    arguments.choice("split", split, SPLITS)
    folder = _folder(root)
    wanted = str(SPLITS.index(split))
    names = [words[0] for words in _table(folder / PARTITION, 2) if words[1] == wanted]
    labels = _labels(folder / ATTRIBUTES)
    picture_folders = [folder / place for place in FOLDERS]
    pixels = np.empty((len(names), 3, SIZE, SIZE), dtype=np.uint8)
    for index, name in enumerate(names):
        if name not in labels:
            raise ValueError(f"{folder / ATTRIBUTES} must have a row for {name}, got none")
        pixels[index] = _face(name, picture_folders)
    chosen = torch.tensor([labels[name] for name in names], dtype=torch.int64)
    return Dataset(torch.from_numpy(pixels), chosen, SIGNED)


def _folder(root: str | os.PathLike[str] | None) -> Path:
    looked_in = places("celeba", root)
    for folder in looked_in:
        if (folder / PARTITION).is_file():
            return folder
    raise FileNotFoundError(
        f"no such file: {PARTITION} of celeba; looked in {', '.join(map(str, looked_in))}; put it beside "
        f"{ATTRIBUTES} and the aligned JPEGs (folder {FOLDERS[0]}) into a folder celeba, and set "
        "DEFGAN_DATA to the folder that holds it"
    )


def _table(path: Path, columns: int) -> list[list[str]]:
    """Returns rows of words, each of the same number of columns."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise ValueError(f"{path} must have {columns} columns, got {len(row)} in row {number}")
    return rows


def _labels(path: Path) -> dict[str, int]:
    """Reads the list of attributes: the number of images, the attributes' names, then rows of 1 and -1."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if len(lines) < 2 or LABEL not in lines[1]:
        raise ValueError(f"{path} must name the attribute {LABEL} in its second line")
    column = 1 + lines[1].index(LABEL)
    labels = {}
    for number, row in enumerate(lines[2:], start=3):
        if len(row) != len(lines[1]) + 1:
            raise ValueError(f"{path} must have {len(lines[1]) + 1} columns, got {len(row)} in row {number}")
        labels[row[0]] = int(row[column] == "1")
    return labels


def _face(name: str, folders: Sequence[Path]) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    path = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no such file: {name} of celeba; looked in {', '.join(map(str, folders))}")
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.convert("RGB").resize(
                (SIZE, SIZE), Image.Resampling.BOX, (left, top, left + side, top + side)
            )
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is truncated or not an image ({' '.join(str(error).split())})") from None
    return np.asarray(square).transpose(2, 0, 1)
