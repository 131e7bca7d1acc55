"""MNIST and Fashion-MNIST in the forms in which people have them: IDX files, packed or not, and Keras' ``.npz``.

The SHA-256 of the unpacked content is checked at every load, so that a truncated or altered file can never quietly
change a result; how it was packed does not matter. A file is unpacked up to the length that it must have, and no
further.
"""

from __future__ import annotations

import hashlib
import io
import os
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from defgan_fast import files
from defgan_fast.data.dataset import UNIT, Dataset, cache_folder, places

# The first 50,000 training images train, the last 10,000 validate (paper, section 4).
TRAIN_IMAGES = 50_000


class Official(NamedTuple):
    """One of the four parts that a data set is published in.

    Attributes:
        file: name of the unpacked IDX file.
        array: name of the same content in Keras' ``.npz``.
        shape: of the unsigned bytes that it holds.
    """

    file: str
    array: str
    shape: tuple[int, ...]

    @property
    def header(self) -> bytes:
        """Is what an IDX file begins with: two zero bytes, 8 for uint8, the number of dimensions, their sizes."""
        return bytes((0, 0, 8, len(self.shape))) + np.array(self.shape, ">u4").tobytes()

    @property
    def length(self) -> int:
        """Is the number of bytes of the unpacked file."""
        return len(self.header) + int(np.prod(self.shape))


FILES = {
    "train": (
        Official("train-images-idx3-ubyte", "x_train", (60_000, 28, 28)),
        Official("train-labels-idx1-ubyte", "y_train", (60_000,)),
    ),
    "test": (
        Official("t10k-images-idx3-ubyte", "x_test", (10_000, 28, 28)),
        Official("t10k-labels-idx1-ubyte", "y_test", (10_000,)),
    ),
}
# Of the unpacked content of the official files.
SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
MIRRORS: dict[str, tuple[str, ...]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "fashion_mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
}
# The folders that torchvision's data sets have below their root.
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
DOWNLOAD_TIMEOUT_S = 20


def load(name: str, root: str | os.PathLike[str] | None, split: str) -> Dataset:
    """Loads one part; see :func:`defgan_fast.data.load`."""
    pixels, labels = (
        _official_array(name, part, root) for part in FILES["test" if split == "test" else "train"]
    )
    part = {"train": slice(0, TRAIN_IMAGES), "validation": slice(TRAIN_IMAGES, None), "test": slice(None)}
    return as_dataset(pixels[part[split]], labels[part[split]].astype(np.int64))


def _official_array(name: str, part: Official, root: str | os.PathLike[str] | None) -> np.ndarray:
    """Returns one part's bytes [N, ...] from the first place that has the official content.

    Raises:
        ValueError: there are files of its name, and none has the official content.
        FileNotFoundError: there are none; the message names the places.
    """
    damaged = None
    for path in _candidates(name, part, root):
        try:
            return _checked(name, part, _unpacked(path, part), str(path))
        except ValueError as error:
            damaged = damaged or error
    if damaged is not None:
        raise damaged
    looked = ", ".join(str(folder) for folder in _folders(name, root))
    if root is not None:
        raise FileNotFoundError(
            f"no such file: {part.file}.gz (or unpacked, or {name}.npz) of {name}; looked in {looked}"
        )
    return _download(name, part, looked)


def _folders(name: str, root: str | os.PathLike[str] | None) -> list[Path]:
    """Returns where files may lie: our own folders, torchvision's root, and ``raw`` in its folder."""
    found = places(name, root)
    bases = [Path(root)] if root is not None else [place.parent for place in found]
    theirs = TORCHVISION[name]
    return [*found, *(base / folder for base in bases for folder in ("raw", theirs, f"{theirs}/raw"))]


def _candidates(name: str, part: Official, root: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Yields the files that are there under a name that the part may have."""
    if root is not None and Path(root).suffix == ".npz":
        yield Path(root)
        return
    dotted = part.file.replace("-idx", ".idx")
    names = (f"{part.file}.gz", part.file, f"{dotted}.gz", dotted, f"{name}.npz")
    for folder in _folders(name, root):
        for file in names:
            if (folder / file).is_file():
                yield folder / file


def _unpacked(path: Path, part: Official) -> bytes:
    """Returns the content of a file as an unpacked IDX file has it, at most a byte more than the part's length.

    Raises:
        ValueError: it cannot be unpacked.
    """
    if path.suffix == ".npz":
        return _idx_of_array(path, part)
    with path.open("rb") as file:
        if path.suffix != ".gz":
            return file.read(part.length + 1)
        return _gunzip(file.read(), part, str(path))


def _gunzip(packed: bytes, part: Official, source: str) -> bytes:
    """Returns at most a byte more than the part's length of what a gzip file holds."""
    decompressor = zlib.decompressobj(wbits=31)
    try:
        return decompressor.decompress(packed, part.length + 1)
    except zlib.error as error:
        raise ValueError(f"{source} is truncated or altered: it is no gzip file ({error})") from None


def _idx_of_array(path: Path, part: Official) -> bytes:
    """Returns one array of a ``.npz`` as an IDX file has it."""
    member = f"{part.array}.npy"
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            # The header of an array takes less than a kilobyte.
            array = io.BytesIO(file.read(part.length + 1024))
        version = np.lib.format.read_magic(array)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(array)
    except Exception as error:  # zipfile and numpy raise half a dozen types, depending on what is damaged
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is truncated or altered: no array {part.array} in it ({reason})") from None
    if shape != part.shape or dtype != np.uint8 or fortran:
        raise ValueError(
            f"{path} must hold {part.array} as uint8 {list(part.shape)}, got {dtype} {list(shape)}"
            f"{' in Fortran order' if fortran else ''}"
        )
    return part.header + array.read()


def _checked(name: str, part: Official, content: bytes, source: str) -> np.ndarray:
    """Returns the array of an unpacked IDX file whose content is the official one.

    Raises:
        ValueError: it is not.
    """
    found, expected = hashlib.sha256(content).hexdigest(), SHA256[name][part.file]
    if found != expected:
        size = len(content) if len(content) <= part.length else f"more than {part.length}"
        other = next((key for key in SHA256 if SHA256[key][part.file] == found), None)
        raise ValueError(
            f"{source} is {f'that of {other}' if other else 'truncated or altered'}: expected SHA-256 {expected} "
            f"of the unpacked {part.file} of {name}, got {found} ({size} bytes)"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=len(part.header)).reshape(part.shape)


def _download(name: str, part: Official, looked: str) -> np.ndarray:
    """Fetches a part from the first mirror that has it, and leaves the file in the cache where that can be written."""
    file, failures = f"{part.file}.gz", []
    for mirror in MIRRORS[name]:
        url = mirror + file
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as reply:
                packed = reply.read(part.length + 4096)  # what cannot be packed grows by a little
            array = _checked(name, part, _gunzip(packed, part, url), url)
        except (urllib.error.URLError, OSError, ValueError) as error:
            failures.append(f"{url} ({_reason(error)})")
            continue
        try:
            files.write_atomically(cache_folder() / name / file, packed)
        except OSError as error:
            warnings.warn(
                f"{file} of {name} was downloaded and cannot be kept, so that every load downloads it again "
                f"({_reason(error)}); set DEFGAN_DATA or XDG_CACHE_HOME to a folder that can be written",
                RuntimeWarning,
                stacklevel=5,
            )
        return array
    raise FileNotFoundError(
        f"no such file: {file} of {name}; looked in {looked}, {', '.join(failures)}; "
        f"put the official files into a folder {name} and set DEFGAN_DATA to the folder that holds it"
    )


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "reason", None) or error).split())


def as_dataset(pixels: np.ndarray, labels: np.ndarray) -> Dataset:
    """Returns uint8 pixels [N, H, W] and labels [N] as a data set of grey images in [0, 1]."""
    images = torch.from_numpy(pixels.astype(np.float32) / np.float32(255)).unsqueeze(1)
    return Dataset(images, torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)), UNIT)
