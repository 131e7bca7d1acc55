"""A data set of four images that stands for MNIST."""

import gzip
import hashlib

import numpy as np
import pytest

from defgan_fast.data import idx


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """Two training and two test images under the official names, with their own checksums."""
    folder = tmp_path / "files" / "mnist"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    checksums, parts = {}, {}
    for split, (images, labels) in idx.FILES.items():
        parts[split] = (images._replace(shape=(2, 28, 28)), labels._replace(shape=(2,)))
        pixels = random.integers(0, 256, (2, 28, 28), dtype=np.uint8)
        contents = {
            images.file: bytes((0, 0, 8, 3)) + np.array((2, 28, 28), ">u4").tobytes() + pixels.tobytes(),
            labels.file: bytes((0, 0, 8, 1)) + np.array((2,), ">u4").tobytes() + bytes((3, 7)),
        }
        for name, content in contents.items():
            (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            checksums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(idx, "FILES", parts)
    monkeypatch.setitem(idx.SHA256, "mnist", checksums)
    monkeypatch.setitem(idx.MIRRORS, "mnist", ())
    monkeypatch.setattr(idx, "TRAIN_IMAGES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DEFGAN_DATA", raising=False)
    return folder
