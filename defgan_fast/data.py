"""Image data sets as tensors: handwritten digits, MNIST, Fashion-MNIST and CelebA, split once and for all.

Every experiment needs the same three parts: a training part, a validation part on which choices are made,
and a test part that only the reported numbers see. The digits come with scikit-learn and need no download;
MNIST and Fashion-MNIST are read from the official gzip IDX files, whose SHA-256 is checked at every load, so
that a truncated or altered file can never quietly change a result. CelebA is a folder of JPEGs that has to be
fetched by hand; it has no official checksums, and its fingerprint says what a model was trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

DATASETS = ("digits", "mnist", "fashion_mnist", "celeba")
SPLITS = ("train", "validation", "test")
IMAGE_SIZE = 28
CLASSES = {"digits": 10, "mnist": 10, "fashion_mnist": 10, "celeba": 2}
# Of the pixels as tensors: the range of the generators' last layers, a sigmoid and a tanh.
RANGES = {"digits": (0.0, 1.0), "mnist": (0.0, 1.0), "fashion_mnist": (0.0, 1.0), "celeba": (-1.0, 1.0)}

# Sizes of the digits' held-out parts; the rest, 1,297 images, is for training.
DIGITS_TEST = 300
DIGITS_VALIDATION = 200
DIGITS_SPLIT_SEED = 0

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

CELEBA_ATTRIBUTES = "list_attr_celeba.txt"
CELEBA_PARTITION = "list_eval_partition.txt"
# Where the aligned images may lie, seen from the folder of the two lists.
CELEBA_FOLDERS = ("img_align_celeba", "images", ".")
CELEBA_LABEL = "Male"
# Aligned images are 178 x 218; the largest centred square is halved and more.
CELEBA_SIZE = 64


class Dataset(NamedTuple):
    """Images and their labels, in a fixed order."""

    images: torch.Tensor  # [N, C, H, W] float32, in the range of the data set
    labels: torch.Tensor  # [N] int64


def load(name: str, root: str | os.PathLike[str] | None = None, split: str = "train") -> Dataset:
    """Load one part of a data set.

    Args:
        name: "digits" (1,797 images of scikit-learn, resized to 28x28), "mnist", "fashion_mnist" or "celeba".
        root: folder that holds the files, or holds a folder ``name`` that does. Where it is given, nothing
            else is looked at. Without it: ``$DEFGAN_DATA/<name>/``, then the cache folder, then, for the IDX
            files, the official mirrors, from which missing ones are downloaded into the cache folder. The
            digits ignore it. CelebA's folder holds ``list_attr_celeba.txt``, ``list_eval_partition.txt``
            and the aligned JPEGs, themselves or in ``img_align_celeba`` or ``images``.
        split: "train", "validation" or "test". MNIST and Fashion-MNIST: training images 0 to 49,999,
            training images 50,000 to 59,999, test images. Digits: 1,297, 200 and 300 images, every class
            in proportion. CelebA: its own partition.

    Returns:
        ``images`` [N, 1, 28, 28] float32 in [0, 1] and ``labels`` [N] int64. CelebA: [N, 3, 64, 64] in
        [-1, 1], 1 for men; all of its training part takes 8 GB, :func:`celeba_pixels` a quarter of that.

    Raises:
        ValueError: unknown name or split, or a file whose checksum is not the official one.
        FileNotFoundError: a file is missing; the message names every place that was looked at.

    Example:
        >>> images, labels = load("digits", split="test")
        >>> images.shape
        torch.Size([300, 1, 28, 28])
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if name == "digits":
        return _load_digits(split)
    if name == "celeba":
        pixels, labels = celeba_pixels(root, split)
        return Dataset(to_range(pixels, RANGES[name]), labels)
    return _load_idx(name, root, split)


def to_range(pixels: torch.Tensor, value_range: tuple[float, float]) -> torch.Tensor:
    """uint8 pixels of any shape to float32 in ``value_range``."""
    low, high = value_range
    return low + pixels.float() / 255 * (high - low)


def fingerprint(dataset: Dataset, value_range: tuple[float, float] = (0.0, 1.0)) -> str:
    """SHA-256 of the 8-bit pixels and labels of ``dataset``, to record what a model was trained on.

    Args:
        dataset: images uint8, or floating point in ``value_range``.
        value_range: (low, high).
    """
    pixels = dataset.images
    if pixels.is_floating_point():
        low, high = value_range
        pixels = ((pixels - low) / (high - low) * 255).round().to(torch.uint8)
    digest = hashlib.sha256(pixels.contiguous().numpy().tobytes())
    digest.update(dataset.labels.to(torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Folder for downloaded files: ``$XDG_CACHE_HOME/defgan_fast``, by default ``~/.cache/defgan_fast``."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "defgan_fast"


# --- digits ---------------------------------------------------------------------------------------------


def resize_digits(pixels: np.ndarray) -> np.ndarray:
    """Enlarge the 8x8 digits to 28x28 by cubic interpolation, exactly.

    The digits touch the border of their 8x8 pixels, so one black pixel is put around them first, which
    leaves them 22 of 28 pixels, much as in MNIST. Pixel centres of the 10x10 and the 28x28 grid are aligned
    as by PyTorch's ``align_corners=False``; the kernel is Catmull-Rom.

    Each of the 8x8 pixels counts the black pixels of a 4x4 block of the scanned, two-valued image. Stretching
    the contrast around one half, 0.3 to 0 and 0.633 to 1, brings back strokes with sharp edges, as they were
    scanned; without it a grey value of 0.3 is ordinary handwriting, and a perturbation of that size is not
    an attack but another image.

    Every sample position is a multiple of 1/28, so that the weights are integers over 2 * 28^3 and the
    computation is done in integers: the result, rounded to 8 bits like any stored image, has the same bits
    on every machine, and so has its hash.

    Args:
        pixels: [N, 8, 8] integers in 0..16.

    Returns:
        [N, 28, 28] uint8.
    """
    unit, padded_size = IMAGE_SIZE, 10
    weights = np.zeros((IMAGE_SIZE, padded_size), dtype=np.int64)
    for row in range(IMAGE_SIZE):
        # (row + 1/2) * 10 / 28 - 1/2, in units of 1/28
        base, t = divmod(padded_size * row + padded_size // 2 - unit // 2, unit)
        taps = (
            -(t**3) + 2 * unit * t**2 - unit**2 * t,
            3 * t**3 - 5 * unit * t**2 + 2 * unit**3,
            -3 * t**3 + 4 * unit * t**2 + unit**2 * t,
            t**3 - unit * t**2,
        )
        for offset, tap in enumerate(taps, start=base - 1):
            weights[row, min(max(offset, 0), padded_size - 1)] += tap
    padded = np.pad(pixels.astype(np.int64), ((0, 0), (1, 1), (1, 1)))
    scale = (2 * unit**3) ** 2 * 16
    sums = np.einsum("ij,njk,lk->nil", weights, padded, weights)
    stretched, unit_value = 30 * sums - 9 * scale, 10 * scale  # 3 * (value - 0.3) as a fraction
    rounded = (stretched * 255 * 2 + unit_value) // (2 * unit_value)
    return np.clip(rounded, 0, 255).astype(np.uint8)


def split_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the three parts, each class in proportion; numpy's frozen legacy generator, fixed seed."""
    random = np.random.RandomState(DIGITS_SPLIT_SEED)
    order = random.permutation(len(labels))
    # Sorting a random order by class and dealing it out evenly gives every part its share of each class.
    dealt = order[np.argsort(labels[order], kind="stable")]
    position = (np.arange(len(labels)) + 0.5) / len(labels)
    share = np.floor(position * DIGITS_TEST)
    is_test = np.diff(share, prepend=-1) > 0
    rest = dealt[~is_test]
    position = (np.arange(len(rest)) + 0.5) / len(rest)
    share = np.floor(position * DIGITS_VALIDATION)
    is_validation = np.diff(share, prepend=-1) > 0
    parts = {"train": rest[~is_validation], "validation": rest[is_validation], "test": dealt[is_test]}
    # Within a part, the random order again: the first hundred test images hold all classes.
    rank = np.argsort(order)
    return {name: part[np.argsort(rank[part])] for name, part in parts.items()}


def _load_digits(split: str) -> Dataset:
    # scikit-learn takes a second to import and only the digits need it.
    from sklearn.datasets import load_digits

    bundle = load_digits()
    labels = np.asarray(bundle.target, dtype=np.int64)
    chosen = split_digits(labels)[split]
    pixels = resize_digits(np.asarray(bundle.images)[chosen].astype(np.int64))
    return _as_dataset(pixels, labels[chosen])


# --- MNIST and Fashion-MNIST -------------------------------------------------------------------------------


def _load_idx(name: str, root: str | os.PathLike[str] | None, split: str) -> Dataset:
    image_file, label_file = FILES["test" if split == "test" else "train"]
    pixels = _parse_idx(_official_bytes(name, image_file, root), image_file, dimensions=3)
    labels = _parse_idx(_official_bytes(name, label_file, root), label_file, dimensions=1)
    part = {"train": slice(0, TRAIN_IMAGES), "validation": slice(TRAIN_IMAGES, None), "test": slice(None)}
    return _as_dataset(pixels[part[split]], labels[part[split]].astype(np.int64))


def _places(name: str, root: str | os.PathLike[str] | None) -> list[Path]:
    if root is not None:
        return [Path(root), Path(root) / name]
    places = []
    if os.environ.get("DEFGAN_DATA"):
        places.append(Path(os.environ["DEFGAN_DATA"]) / name)
    places.append(cache_folder() / name)
    return places


def _official_bytes(name: str, file: str, root: str | os.PathLike[str] | None) -> bytes:
    """The bytes of one official file, from the first place that has it, checksum verified."""
    places = _places(name, root)
    for folder in places:
        path = folder / file
        if path.is_file():
            content = path.read_bytes()
            _check(name, file, content, str(path))
            return content
    looked = ", ".join(str(folder) for folder in places)
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
        _store(cache_folder() / name / file, content)
        return content
    raise FileNotFoundError(
        f"no such file: {file} of {name}; looked in {looked}, {', '.join(failures)}; "
        f"put the official files into a folder {name} and set DEFGAN_DATA to the folder that holds it"
    )


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", None) or error).replace("\n", " ")


def _store(path: Path, content: bytes) -> None:
    """Write whole or not at all: another process may read the cache at this moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as temporary:
        temporary.write(content)
    os.replace(temporary.name, path)


def _parse_idx(content: bytes, file: str, dimensions: int) -> np.ndarray:
    """IDX: two zero bytes, the element type (8: uint8), the number of dimensions, their sizes, the data."""
    raw = gzip.decompress(content)
    if raw[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{file} is not an IDX file of {dimensions}-dimensional bytes")
    shape: Sequence[int] = np.frombuffer(raw, dtype=">u4", count=dimensions, offset=4).tolist()
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _as_dataset(pixels: np.ndarray, labels: np.ndarray) -> Dataset:
    images = torch.from_numpy(pixels.astype(np.float32) / np.float32(255)).unsqueeze(1)
    return Dataset(images, torch.from_numpy(np.ascontiguousarray(labels, dtype=np.int64)))


# --- CelebA ------------------------------------------------------------------------------------------------


def celeba_pixels(root: str | os.PathLike[str] | None = None, split: str = "train") -> Dataset:
    """One part of CelebA as uint8 [N, 3, 64, 64], with labels [N] int64, 1 for men and 0 for women.

    Each aligned JPEG is cut to its largest centred square and reduced to 64x64 by area averaging. Arguments
    and errors as for :func:`load`.

    Raises:
        FileNotFoundError: one of the lists, or an image that they name, is missing.
        ValueError: a list does not parse, or an image is damaged; the message names it.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    folder = _celeba_folder(root)
    wanted = str(SPLITS.index(split))
    names = [words[0] for words in _table(folder / CELEBA_PARTITION, 2) if words[1] == wanted]
    labels = _celeba_labels(folder / CELEBA_ATTRIBUTES)
    places = [folder / place for place in CELEBA_FOLDERS]
    pixels = np.empty((len(names), 3, CELEBA_SIZE, CELEBA_SIZE), dtype=np.uint8)
    for index, name in enumerate(names):
        if name not in labels:
            raise ValueError(f"{folder / CELEBA_ATTRIBUTES} must have a row for {name}, got none")
        pixels[index] = _face(name, places)
    chosen = torch.tensor([labels[name] for name in names], dtype=torch.int64)
    return Dataset(torch.from_numpy(pixels), chosen)


def _celeba_folder(root: str | os.PathLike[str] | None) -> Path:
    places = _places("celeba", root)
    for folder in places:
        if (folder / CELEBA_PARTITION).is_file():
            return folder
    raise FileNotFoundError(
        f"no such file: {CELEBA_PARTITION} of celeba; looked in {', '.join(map(str, places))}; put it beside "
        f"{CELEBA_ATTRIBUTES} and the aligned JPEGs (folder {CELEBA_FOLDERS[0]}) into a folder celeba, and set "
        "DEFGAN_DATA to the folder that holds it"
    )


def _table(path: Path, columns: int) -> list[list[str]]:
    """Rows of words, each of the same number of columns."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != columns:
            raise ValueError(f"{path} must have {columns} columns, got {len(row)} in row {number}")
    return rows


def _celeba_labels(path: Path) -> dict[str, int]:
    """The list begins with the number of images and the names of the attributes; values are 1 and -1."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if len(lines) < 2 or CELEBA_LABEL not in lines[1]:
        raise ValueError(f"{path} must name the attribute {CELEBA_LABEL} in its second line")
    column = 1 + lines[1].index(CELEBA_LABEL)
    labels = {}
    for number, row in enumerate(lines[2:], start=3):
        if len(row) != len(lines[1]) + 1:
            raise ValueError(f"{path} must have {len(lines[1]) + 1} columns, got {len(row)} in row {number}")
        labels[row[0]] = int(row[column] == "1")
    return labels


def _face(name: str, places: Sequence[Path]) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no such file: {name} of celeba; looked in {', '.join(map(str, places))}")
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.convert("RGB").resize(
                (CELEBA_SIZE, CELEBA_SIZE), Image.Resampling.BOX, (left, top, left + side, top + side)
            )
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is truncated or not an image ({' '.join(str(error).split())})") from None
    return np.asarray(square).transpose(2, 0, 1)
