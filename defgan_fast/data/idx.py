"""MNIST and Fashion-MNIST from the official gzip IDX files.

Their SHA-256 is checked at every load, so that a truncated or altered file can never quietly change a result.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Sequence

import numpy as np
import torch

from defgan_fast import files
from defgan_fast.data.dataset import UNIT, Dataset, cache_folder, places

# The first 50,000 training images train, the last 10,000 validate (paper, section 4).
TRAIN_IMAGES = 50_000

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    },
}
MIRRORS: dict[str, tuple[str, ...]] = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    ),
    "fashion_mnist": ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
}
DOWNLOAD_TIMEOUT_S = 20


def load(name: str, root: str | os.PathLike[str] | None, split: str) -> Dataset:
    """Loads one part; see :func:`defgan_fast.data.load`."""
    image_file, label_file = FILES["test" if split == "test" else "train"]
    pixels = _parse_idx(_official_bytes(name, image_file, root), image_file, dimensions=3)
    labels = _parse_idx(_official_bytes(name, label_file, root), label_file, dimensions=1)
    part = {"train": slice(0, TRAIN_IMAGES), "validation": slice(TRAIN_IMAGES, None), "test": slice(None)}
    return as_dataset(pixels[part[split]], labels[part[split]].astype(np.int64))


def _official_bytes(name: str, file: str, root: str | os.PathLike[str] | None) -> bytes:
    """Returns the bytes of one official file from the first place that has it, checksum verified."""
    looked_in = places(name, root)
    for folder in looked_in:
        path = folder / file
        if path.is_file():
            content = path.read_bytes()
            _check(name, file, content, str(path))
            return content
    looked = ", ".join(str(folder) for folder in looked_in)
    if root is not None:
        raise FileNotFoundError(f"no such file: {file} of {name}; looked in {looked}")
    return _download(name, file, looked)


def _check(name: str, file: str, content: bytes, source: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name][file]:
        raise ValueError(
            f"{source} is truncated or altered: expected SHA-256 {SHA256[name][file]} "
            f"of {name}, got {found} ({len(content)} bytes)"
        )


def _download(name: str, file: str, looked: str) -> bytes:
    failures = []
    for mirror in MIRRORS[name]:
        url = mirror + file
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as reply:
                content = reply.read()
            _check(name, file, content, url)
        except (urllib.error.URLError, OSError, ValueError) as error:
            failures.append(f"{url} ({_reason(error)})")
            continue
        files.write_atomically(cache_folder() / name / file, content)
        return content
    raise FileNotFoundError(
        f"no such file: {file} of {name}; looked in {looked}, {', '.join(failures)}; "
        f"put the official files into a folder {name} and set DEFGAN_DATA to the folder that holds it"
    )


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", None) or error).replace("\n", " ")


def _parse_idx(content: bytes, file: str, dimensions: int) -> np.ndarray:
    """Reads IDX: two zero bytes, the element type (8: uint8), the number of dimensions, their sizes, the data."""
    raw = gzip.decompress(content)
    if raw[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{file} is not an IDX file of {dimensions}-dimensional bytes")
    shape: Sequence[int] = np.frombuffer(raw, dtype=">u4", count=dimensions, offset=4).tolist()
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def as_dataset(pixels: np.ndarray, labels: np.ndarray) -> Dataset:
    """Returns uint8 pixels [N, H, W] and labels [N] as a data set of grey images in [0, 1]."""
    images = torch.from_numpy(pixels.astype(np.float32) / np.float32(255)).unsqueeze(1)
    return Dataset(images, torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)), UNIT)
