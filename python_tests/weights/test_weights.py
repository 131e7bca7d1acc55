"""Weight files: what comes back is what went in, and damaged or foreign files are named."""

import os

import pytest
import torch
from safetensors.torch import save_file

from defgan_fast import models, weights


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "g.safetensors"
    weights.save(models.Generator(5, 4), path, {"seed": 3, "command": "train"})
    return path


def test_round_trip(tmp_path):
    model = models.CelebaGenerator(5, 4, batch_norm=True)
    model.layers[1].running_mean.add_(1)
    path = tmp_path / "g.safetensors"
    weights.save(model, path, {"seed": 3})
    loaded = weights.load_generator(path)
    assert not loaded.training
    assert loaded.config == model.config
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert weights.read_card(path) == {"seed": 3}
    assert weights.load_generator(str(path)).latent_size == 5


def test_save_replaces_whole_or_not_at_all(path, monkeypatch):
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left"):
        weights.save(models.Generator(5, 4), path, {})
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["g.safetensors"], "no temporary file stays"


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r"g.safetensors is truncated or not a safetensors file \("
    ) as caught:
        weights.load_generator(path)
    assert "\n" not in str(caught.value)


def test_foreign(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match=r"foreign.safetensors was not written by defgan_fast"):
        weights.load_generator(foreign)
    picture = tmp_path / "picture.safetensors"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(ValueError, match=r"picture.safetensors is truncated or not a safetensors file"):
        weights.read_card(picture)


def test_wrong_kind_and_wrong_tensors(path, tmp_path):
    with pytest.raises(ValueError, match=r"must hold a classifier, got a Generator"):
        weights.load_classifier(path)
    odd = models.Generator(5, 4)
    odd.config["width"] = 8
    weights.save(odd, tmp_path / "odd.safetensors", {})
    with pytest.raises(ValueError, match=r"odd.safetensors does not fit its own header: .*size mismatch"):
        weights.load_generator(tmp_path / "odd.safetensors")


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent.safetensors"):
        weights.load_generator(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no such file: sub/absent"):
        weights.load_classifier("sub/absent")
    with pytest.raises(FileNotFoundError) as caught:
        weights.load_generator("cifar")
    assert "no generator named 'cifar' is shipped" in str(caught.value)
    assert "defgan-fast train gan --dataset cifar" in str(caught.value)


def test_save_refuses_strangers(tmp_path):
    with pytest.raises(TypeError, match=r"module must be one of defgan_fast.models, got Linear"):
        weights.save(torch.nn.Linear(1, 1), tmp_path / "x.safetensors", {})
