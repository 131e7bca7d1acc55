"""Image data sets as tensors: handwritten digits, MNIST, Fashion-MNIST and CelebA, split once and for all.

Every experiment needs the same three parts: a training part, a validation part on which choices are made,
and a test part that only the reported numbers see. One file each says where a data set comes from. A new one is
a file with a function from a root folder and a split to a :class:`Dataset`, and an entry in ``DATASETS``.
"""

from __future__ import annotations

import os

from defgan_fast import arguments
from defgan_fast.data import celeba, digits, idx
from defgan_fast.data.celeba import celeba_pixels
from defgan_fast.data.dataset import SIGNED, SPLITS, UNIT, Dataset, cache_folder, fingerprint, to_range

__all__ = [
    "CLASSES",
    "DATASETS",
    "RANGES",
    "SPLITS",
    "Dataset",
    "cache_folder",
    "celeba_pixels",
    "fingerprint",
    "load",
    "to_range",
]

DATASETS = ("digits", "mnist", "fashion_mnist", "celeba")
CLASSES = {"digits": 10, "mnist": 10, "fashion_mnist": 10, "celeba": 2}
# The ranges are those of the generators' last layers, a sigmoid and a tanh.
RANGES = {"digits": UNIT, "mnist": UNIT, "fashion_mnist": UNIT, "celeba": SIGNED}


def load(name: str, root: str | os.PathLike[str] | None = None, split: str = "train") -> Dataset:
    """Load one part of a data set.

    Args:
        name: "digits" (1,797 images of scikit-learn, resized to 28x28), "mnist", "fashion_mnist" or "celeba".
        root: folder that holds the files, or holds a folder ``name`` that does. Where it is given, nothing
            else is looked at. Without it: ``$DEFGAN_DATA/<name>/``, then the cache folder, then, for the IDX
            files, the official mirrors, from which missing ones are downloaded into the cache folder. MNIST and
            Fashion-MNIST are IDX files, packed by gzip or not, or ``mnist.npz`` as Keras has it, and the root may
            be torchvision's (with ``MNIST/raw`` or ``FashionMNIST/raw``), or that ``.npz`` file itself. The
            digits ignore it. CelebA's folder holds ``list_attr_celeba.txt``, ``list_eval_partition.txt``
            and the aligned JPEGs, themselves or in ``img_align_celeba`` or ``images``.
        split: "train", "validation" or "test". MNIST and Fashion-MNIST: training images 0 to 49,999,
            training images 50,000 to 59,999, test images. Digits: 1,297, 200 and 300 images, every class
            in proportion. CelebA: its own partition.

    Returns:
        ``images`` [N, 1, 28, 28] float32 in [0, 1] and ``labels`` [N] int64. CelebA: [N, 3, 64, 64] in
        [-1, 1], 1 for men; all of its training part takes 8 GB, :func:`celeba_pixels` a quarter of that.

    Raises:
        ValueError: unknown name or split, or a file whose unpacked content is not the official one.
        FileNotFoundError: a file is missing; the message names every place that was looked at.

    Example:
        >>> images, labels = load("digits", split="test")
        >>> images.shape
        torch.Size([300, 1, 28, 28])
    """
    arguments.choice("name", name, DATASETS)
    arguments.choice("split", split, SPLITS)
    if name == "digits":
        return digits.load(split)
    if name == "celeba":
        return celeba.load(root, split)
    return idx.load(name, root, split)
