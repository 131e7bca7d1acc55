"""The data sets: sizes, splits, exact resizing, and what happens when files are missing or altered."""

import gzip

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from defgan_fast import data
from defgan_fast.data import digits, idx


def test_digits_parts_are_disjoint_stratified_and_whole():
    from sklearn.datasets import load_digits

    labels = load_digits().target
    parts = digits.split_indices(labels)
    assert [len(parts[name]) for name in data.SPLITS] == [1297, 200, 300]
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1797))
    for part in parts.values():
        share = np.bincount(labels[part], minlength=10) / len(part)
        assert np.abs(share - np.bincount(labels) / 1797).max() < 0.01
    # Not sorted by class: the demo takes the first hundred.
    assert np.bincount(labels[parts["test"][:100]], minlength=10).min() >= 3


def test_digits_tensors():
    images, labels = data.load("digits", split="validation")
    assert images.shape == (200, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.min() == 0
    assert images.max() == 1
    assert images[:, :, 0].max() < 0.2, "the border added around the digits is nearly black"


def test_digits_data_never_change():
    """The hash is in the cards of the shipped weights: a change would make them wrong."""
    digests = [data.fingerprint(data.load("digits", split=split))[:16] for split in data.SPLITS]
    assert digests == DIGITS_SHA256


DIGITS_SHA256 = ["c1152f75f9becf5b", "ee6e5f30f5a09b86", "744773895aee5253"]


def test_resize_is_catmull_rom_interpolation():
    """Against the same interpolation in float64, written with matrices of the kernel's formula."""
    pixels = np.random.default_rng(1).integers(0, 17, (3, 8, 8))

    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    matrix = np.zeros((28, 10))
    for i in range(28):
        position = (i + 0.5) * 10 / 28 - 0.5
        for j in range(-2, 12):
            matrix[i, min(max(j, 0), 9)] += kernel(position - j)
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1))) / 16
    expected = np.clip(3 * (matrix @ padded @ matrix.T - 0.3), 0, 1) * 255
    assert np.abs(digits.resize(pixels) - expected).max() <= 0.5 + 1e-9


def test_resize_aligns_like_interpolate():
    """A half-pixel shift would pass the test above if its formula shared the mistake."""
    pixels = np.zeros((1, 8, 8), dtype=np.int64)
    pixels[0, 2:6, 1:4] = 16
    padded = F.pad(torch.from_numpy(pixels).double().unsqueeze(1), (1, 1, 1, 1)) / 16
    expected = F.interpolate(padded, size=28, mode="bicubic", align_corners=False)[0, 0]
    # PyTorch's kernel has a = -0.75 where Catmull-Rom has -0.5, hence the tolerance.
    stretched = (3 * (expected - 0.3)).clamp(0, 1).numpy()
    assert np.abs(digits.resize(pixels)[0] / 255 - stretched).max() < 0.15
    centre = (np.indices((28, 28)) * digits.resize(pixels)[0]).sum((1, 2)) / digits.resize(pixels).sum()
    assert centre == pytest.approx([(4.5 + 0.5) * 2.8 - 0.5, (3 + 0.5) * 2.8 - 0.5], abs=0.1)


def test_fingerprint_sees_pixels_and_labels():
    images, labels = data.load("digits", split="validation")
    base = data.fingerprint(data.Dataset(images, labels, (0.0, 1.0)))
    changed = images.clone()
    changed[0, 0, 14, 14] = 1 - changed[0, 0, 14, 14]
    assert data.fingerprint(data.Dataset(changed, labels, (0.0, 1.0))) != base
    assert data.fingerprint(data.Dataset(images, labels.flip(0), (0.0, 1.0))) != base


def test_idx_files_by_root_environment_and_cache(tiny_mnist, tmp_path, monkeypatch):
    images, labels = data.load("mnist", tiny_mnist, "train")
    assert images.shape == (1, 1, 28, 28)
    assert labels.tolist() == [3]
    assert data.load("mnist", tiny_mnist.parent, "validation").labels.tolist() == [7]
    monkeypatch.setenv("DEFGAN_DATA", str(tiny_mnist.parent))
    raw = gzip.decompress((tiny_mnist / f"{idx.FILES['test'][0].file}.gz").read_bytes())[16:]
    test = data.load("mnist", split="test")
    assert test.images.shape == (2, 1, 28, 28)
    assert (test.images * 255).round().byte().numpy().tobytes() == raw


def test_missing_files_name_every_place(tiny_mnist, tmp_path, monkeypatch):
    (tiny_mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte.gz") as caught:
        data.load("mnist", tiny_mnist, "test")
    assert str(tiny_mnist) in str(caught.value)
    monkeypatch.setenv("DEFGAN_DATA", str(tmp_path / "elsewhere"))
    monkeypatch.setitem(idx.MIRRORS, "mnist", ((tmp_path / "mirror").as_uri() + "/",))
    with pytest.raises(FileNotFoundError, match=r"no such file: t10k-images-idx3-ubyte.gz") as caught:
        data.load("mnist", split="test")
    message = str(caught.value)
    for place in ("elsewhere/mnist", "cache/defgan_fast/mnist", "mirror/t10k-images", "DEFGAN_DATA"):
        assert place in message
    assert "\n" not in message


def test_download_goes_to_the_cache(tiny_mnist, tmp_path, monkeypatch):
    monkeypatch.setitem(idx.MIRRORS, "mnist", (tiny_mnist.as_uri() + "/",))
    first = data.load("mnist", split="train")
    monkeypatch.setitem(idx.MIRRORS, "mnist", ())
    assert torch.equal(first.images, data.load("mnist", split="train").images)
    kept = sorted(path.name for path in (tmp_path / "cache" / "defgan_fast" / "mnist").iterdir())
    assert kept == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_file_is_named(tiny_mnist, damage):
    path = tiny_mnist / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[:-100] if damage == "truncated" else content[:50] + b"x" + content[51:])
    with pytest.raises(ValueError, match=r"is truncated or altered: ") as caught:
        data.load("mnist", tiny_mnist, "train")
    assert str(path) in str(caught.value)


def test_bad_arguments():
    with pytest.raises(
        ValueError, match=r"name must be one of digits, mnist, fashion_mnist, celeba, got 'cifar'"
    ):
        data.load("cifar")
    with pytest.raises(ValueError, match=r"split must be one of train, validation, test, got 'all'"):
        data.load("digits", split="all")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_official_files(name):
    """The real files, where they are at hand."""
    import os
    from pathlib import Path

    root = os.environ.get("DEFGAN_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"no {name} in $DEFGAN_DATA")
    sizes = {}
    for split in data.SPLITS:
        images, labels = data.load(name, split=split)
        sizes[split] = len(images)
        assert images.shape[1:] == (1, 28, 28)
        assert len(labels) == len(images)
        assert labels.unique().tolist() == list(range(10))
    assert sizes == {"train": 50_000, "validation": 10_000, "test": 10_000}
