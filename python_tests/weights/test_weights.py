"""Weight files: what comes back is what went in, and damaged or foreign files are named."""

import json
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
    with pytest.raises(
        ValueError, match=r"odd.safetensors does not fit its own header: layers.0.bias must have shape"
    ):
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


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path, monkeypatch, value, kind):
    module = models.Generator(latent_size=4, width=2)
    name, parameter = list(module.named_parameters())[1]
    parameter.data.view(-1)[0] = value
    path = tmp_path / "spoilt.safetensors"
    said = rf"got {kind} in {name} \(1 of {parameter.numel()} values\)"
    with pytest.raises(ValueError, match=rf"module must have finite weights to be saved to .*, {said}"):
        weights.save(module, path, {})
    assert not path.exists()
    with monkeypatch.context() as unchecked:
        unchecked.setattr(weights, "non_finite", lambda tensors: None)
        weights.save(module, path, {})
    with pytest.raises(ValueError, match=rf"spoilt.safetensors must hold finite weights, {said}"):
        weights.load_generator(path)


def test_weights_that_overflow_in_float16_are_not_written(tmp_path):
    module = models.Generator(latent_size=4, width=2)
    next(module.parameters()).data.view(-1)[0] = 1e6
    with pytest.raises(ValueError, match=r"got inf in "):
        weights.save(module, tmp_path / "large.safetensors", {}, torch.float16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"config": '{"latent_size": 1000000000000, "width": 1000000}'},
            "has a damaged header|does not fit its own",
        ),
        ({"config": '{"latent_size": 5}'}, "does not fit its own header: .* must have shape"),
        ({"config": "{"}, "has a damaged header: JSONDecodeError"),
        ({"config": "[]"}, "has a damaged header: "),
        ({"config": '{"latent_size": "x"}'}, "has a damaged header: "),
        ({"config": '{"wings": 2}'}, "has a damaged header: .*config does not fit model Generator"),
        ({"config": "[" * 100000}, "has a damaged header: RecursionError"),
        ({"model": "Classifier"}, "must hold a generator, got a Classifier"),
        ({"model": "Dragongenerator"}, "has a damaged header: .*model must be one of"),
        ({"model": None}, "must hold a generator, got a nothing"),
        ({"config": None}, "has a damaged header: "),
    ],
)
def test_damaged_headers(tmp_path, changes, said):
    from safetensors.torch import save_file

    module = models.Generator(latent_size=4, width=2)
    metadata = {
        "format": weights.FORMAT,
        "model": "Generator",
        "config": json.dumps(module.config),
        "card": "{}",
    }
    metadata = {k: v for k, v in (metadata | changes).items() if v is not None}
    path = tmp_path / "damaged.safetensors"
    save_file(module.state_dict(), path, metadata=metadata)
    with pytest.raises(ValueError, match=said) as caught:
        weights.load_generator(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
