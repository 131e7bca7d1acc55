"""The 1,797 handwritten digits that come with scikit-learn, enlarged to 28x28; they need no download."""

from __future__ import annotations

import numpy as np

from defgan_fast.data.dataset import Dataset
from defgan_fast.data.idx import as_dataset

IMAGE_SIZE = 28
# Sizes of the held-out parts; the rest, 1,297 images, is for training.
TEST_IMAGES = 300
VALIDATION_IMAGES = 200
SPLIT_SEED = 0


def resize(pixels: np.ndarray) -> np.ndarray:
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


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the indices of the three parts, each class in proportion; numpy's frozen legacy generator, fixed seed."""
    random = np.random.RandomState(SPLIT_SEED)
    order = random.permutation(len(labels))
    # Sorting a random order by class and dealing it out evenly gives every part its share of each class.
    dealt = order[np.argsort(labels[order], kind="stable")]
    position = (np.arange(len(labels)) + 0.5) / len(labels)
    share = np.floor(position * TEST_IMAGES)
    is_test = np.diff(share, prepend=-1) > 0
    rest = dealt[~is_test]
    position = (np.arange(len(rest)) + 0.5) / len(rest)
    share = np.floor(position * VALIDATION_IMAGES)
    is_validation = np.diff(share, prepend=-1) > 0
    parts = {"train": rest[~is_validation], "validation": rest[is_validation], "test": dealt[is_test]}
    # Within a part, the random order again: the first hundred test images hold all classes.
    rank = np.argsort(order)
    return {name: part[np.argsort(rank[part])] for name, part in parts.items()}


def load(split: str) -> Dataset:
    """Loads one part; see :func:`defgan_fast.data.load`."""
    # scikit-learn takes a second to import and only the digits need it.
    from sklearn.datasets import load_digits

    bundle = load_digits()
    labels = np.asarray(bundle.target, dtype=np.int64)
    chosen = split_indices(labels)[split]
    pixels = resize(np.asarray(bundle.images)[chosen].astype(np.int64))
    return as_dataset(pixels, labels[chosen])
