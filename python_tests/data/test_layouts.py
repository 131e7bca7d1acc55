"""MNIST as people have it: packed or not, in torchvision's folders, in Keras' file; and what is not the data."""

import gzip
import http.server
import resource
import threading
import zlib

import numpy as np
import pytest
import torch

from defgan_fast import data
from defgan_fast.data import idx

PARTS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def content(folder, part):
    return gzip.decompress((folder / f"{part}.gz").read_bytes())


def lay_out(folder, target, layout):
    """Writes the files of ``folder`` below ``target`` in another layout; returns the root to load from."""
    arrays = {}
    for part, array in zip(PARTS, ("x_train", "y_train", "x_test", "y_test"), strict=True):
        raw = content(folder, part)
        header, shape = (16, (2, 28, 28)) if "images" in part else (8, (2,))
        arrays[array] = np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
        places = {
            "unpacked": (target / part, raw),
            "dotted": (target / part.replace("-idx", ".idx"), raw),
            "anew": (target / f"{part}.gz", gzip.compress(raw, compresslevel=1, mtime=9)),
            "torchvision": (target / "MNIST" / "raw" / part, raw),
            "torchvision's own folder": (target / "MNIST" / "raw" / f"{part}.gz", gzip.compress(raw)),
            "below the name": (target / "mnist" / part, raw),
        }
        if layout in places:
            path, written = places[layout]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(written)
    if layout.startswith("keras"):
        save = np.savez_compressed if "compressed" in layout else np.savez
        save(target / "mnist.npz", **arrays)
    own = {"torchvision's own folder": target / "MNIST", "keras, the file": target / "mnist.npz"}
    return own.get(layout, target)


LAYOUTS = (
    "unpacked",
    "dotted",
    "anew",
    "torchvision",
    "torchvision's own folder",
    "below the name",
    "keras",
    "keras compressed",
    "keras, the file",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tiny_mnist, tmp_path, layout):
    expected = [data.load("mnist", tiny_mnist, split) for split in data.SPLITS]
    target = tmp_path / "other"
    target.mkdir()
    root = lay_out(tiny_mnist, target, layout)
    for split, part in zip(data.SPLITS, expected, strict=True):
        found = data.load("mnist", root, split)
        assert torch.equal(found.images, part.images)
        assert torch.equal(found.labels, part.labels)


@pytest.mark.parametrize("layout", ["torchvision", "below the name"])
def test_layouts_by_the_environment(tiny_mnist, tmp_path, monkeypatch, layout):
    lay_out(tiny_mnist, tmp_path / "other", layout)
    monkeypatch.setenv("DEFGAN_DATA", str(tmp_path / "other"))
    expected = data.load("mnist", tiny_mnist, "test").images
    assert torch.equal(data.load("mnist", split="test").images, expected)


def test_a_damaged_file_does_not_hide_a_whole_one(tiny_mnist):
    """The folder of an interrupted download beside an older whole one."""
    expected = data.load("mnist", tiny_mnist, "test").images
    (tiny_mnist / PARTS[2]).write_bytes(content(tiny_mnist, PARTS[2]))
    (tiny_mnist / f"{PARTS[2]}.gz").write_bytes(b"half")
    assert torch.equal(data.load("mnist", tiny_mnist, "test").images, expected)


def test_the_files_of_another_data_set_are_named(tiny_mnist, monkeypatch):
    monkeypatch.setitem(idx.SHA256, "fashion_mnist", dict.fromkeys(PARTS, "0" * 64))
    with pytest.raises(
        ValueError, match=r"t10k-images-idx3-ubyte.gz is that of mnist: expected SHA-256 0000"
    ):
        data.load("fashion_mnist", tiny_mnist, "test")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (
            {"x_test": np.zeros((2, 28, 28))},
            r"must hold x_test as uint8 \[2, 28, 28\], got float64 \[2, 28, 28\]",
        ),
        (
            {"x_test": np.zeros((3, 28, 28), np.uint8)},
            r"must hold x_test as uint8 \[2, 28, 28\], got uint8 \[3, 28, 28\]",
        ),
        ({"x_test": np.zeros((2, 28, 28), np.uint8)}, r"truncated or altered: expected SHA-256"),
        (
            {"x_test": np.array([{}], dtype=object)},
            r"must hold x_test as uint8 \[2, 28, 28\], got object \[1\]",
        ),
        ({"images": np.zeros(3)}, r"no array x_test in it"),
        (None, r"no array x_test in it"),
    ],
)
def test_other_arrays(tiny_mnist, tmp_path, arrays, said):
    path = tmp_path / "mnist.npz"
    if arrays is None:
        path.write_bytes(b"PK no archive")
    else:
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=said) as caught:
        data.load("mnist", path, "test")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_unpacked_no_further_than_it_may_be(tiny_mnist):
    """A gigabyte of zeros in a megabyte, which a loader that unpacks first and judges then would hold in memory."""
    packer = zlib.compressobj(9, wbits=31)
    block = bytes(1 << 20)
    packed = b"".join(packer.compress(block) for _ in range(1 << 10)) + packer.flush()
    (tiny_mnist / f"{PARTS[2]}.gz").write_bytes(packed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"truncated or altered: .* \(more than 1584 bytes\)"):
        data.load("mnist", tiny_mnist, "test")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


@pytest.fixture
def mirror(tiny_mnist, monkeypatch):
    """A web server with the packed files, in the place of the official mirrors."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(tiny_mnist))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(idx.MIRRORS, "mnist", (f"http://127.0.0.1:{server.server_port}/",))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_is_used_where_it_cannot_be_kept(tiny_mnist, mirror, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(
        RuntimeWarning, match=r"was downloaded and cannot be kept, .*; set DEFGAN_DATA"
    ) as caught:
        found = data.load("mnist", split="test")
    assert len(caught) == 2
    assert torch.equal(found.images, data.load("mnist", tiny_mnist, "test").images)


def test_a_download_is_used_where_there_is_no_home(tiny_mnist, mirror, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="no folder for caches"):
        found = data.load("mnist", split="test")
    assert torch.equal(found.images, data.load("mnist", tiny_mnist, "test").images)
    assert not (tmp_path / "~").exists()
