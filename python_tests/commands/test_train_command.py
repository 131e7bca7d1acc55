"""``defgan-fast train``: what it leaves behind, and that the weight files say how they came to be."""

import csv
import warnings

import pytest
import torch
from PIL import Image
from torch import nn

from defgan_fast import commands, data, weights
from defgan_fast.evaluation import quality
from defgan_fast.evaluation.metrics import accuracy
from defgan_fast.training import loop, recipes
from defgan_fast.training.classifier import ClassifierSettings
from defgan_fast.training.wgan_gp import GanSettings


def test_train_gan(tmp_path, capsys):
    words = ["train", "gan", "--dataset", "digits", "--steps", "4", "--width", "3", "--critic-width", "2"]
    words += ["--batch", "8", "--lr", "0.0001", "--sample-every", "2", "--seed", "5", "--out", str(tmp_path)]
    assert commands.main(words) == 0
    assert f"4 steps; generator of step 4 in {tmp_path / 'generator.safetensors'}" in capsys.readouterr().out
    generator = weights.load_generator(tmp_path / "generator.safetensors")
    assert generator.config == {"latent_size": 64, "width": 3, "image_shape": [1, 28, 28]}
    card = weights.read_card(tmp_path / "generator.safetensors")
    assert card["seed"] == 5
    assert card["steps"] == 4
    assert card["data_sha256"] == data.fingerprint(data.load("digits"))
    for flag in ("--steps 4", "--seed 5", "--latent-floor 0.125", "--lr 0.0001", "--augment 1.0"):
        assert flag in card["command"]
    assert {"defgan_fast", "torch"} <= set(card)
    samples = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert samples == ["step_000002.png", "step_000004.png"]
    with Image.open(tmp_path / "samples" / samples[0]) as picture:
        assert picture.size == ((8 * 29 + 1) * 3, (8 * 29 + 1) * 3)
    with (tmp_path / "metrics.csv").open() as file:
        assert set(next(csv.DictReader(file))) >= {"step", "critic_distance", "penalty", "generator_loss"}
    # A finished run: resuming does nothing and succeeds, starting again is refused.
    assert commands.main([*words, "--resume"]) == 0
    assert commands.main(words) == 2
    assert "continue it with --resume" in capsys.readouterr().err


def test_train_classifier(tmp_path, capsys):
    words = ["train", "classifier", "--dataset", "digits", "--arch", "D", "--epochs", "20"]
    words += ["--corrupt", "0", "--out", str(tmp_path)]
    assert commands.main(words) == 0
    classifier = weights.load_classifier(tmp_path / "classifier.safetensors")
    assert classifier.config["arch"] == "D"
    card = weights.read_card(tmp_path / "classifier.safetensors")
    assert "--arch D" in card["command"]
    images, labels = data.load("digits", split="validation")
    measured = (classifier(images).argmax(1) == labels).double().mean().item()
    assert card["quality"]["accuracy_validation"] == pytest.approx(measured)
    assert measured > 0.85
    assert "accuracy on validation images" in capsys.readouterr().out


def test_the_best_epoch_or_the_last(tmp_path):
    """One training, saved twice: --keep chooses among its epochs, and takes no part in the training."""
    words = ["train", "classifier", "--dataset", "digits", "--arch", "D", "--epochs", "12", "--lr", "0.01"]
    words += ["--out", str(tmp_path), "--resume"]
    images, labels = data.load("digits", split="validation")
    found = {}
    for keep in ("best", "last", "best"):
        assert commands.main([*words, "--keep", keep]) == 0
        card = weights.read_card(tmp_path / "classifier.safetensors")
        assert f"--keep {keep}" in card["command"]
        measured = accuracy(weights.load_classifier(tmp_path / "classifier.safetensors"), images, labels)
        assert card["quality"]["accuracy_validation"] == pytest.approx(measured)
        assert found.setdefault(keep, (card["steps"], measured)) == (card["steps"], measured)
    rows = [line.split(",") for line in (tmp_path / "quality.csv").read_text().split()[1:]]
    epochs = [(int(step), float(value)) for step, value in rows]
    assert [step for step, _ in epochs] == [10 * epoch for epoch in range(1, 13)]
    assert found["last"] == epochs[-1]
    assert found["best"] == max(epochs, key=lambda epoch: epoch[1])  # the first of equals
    assert found["best"] != found["last"]


def test_the_average_is_saved(tmp_path):
    """Of the same run: the last weights are those of a run without it, and the saved ones are measured."""
    words = ["train", "classifier", "--dataset", "digits", "--arch", "E", "--epochs", "3", "--out"]
    assert commands.main([*words, str(tmp_path / "plain")]) == 0
    assert commands.main([*words, str(tmp_path / "averaged"), "--ema", "0.9"]) == 0
    checkpoints = [loop.load_checkpoint(tmp_path / name / loop.CHECKPOINT) for name in ("plain", "averaged")]
    plain, averaged = (checkpoint["trainer"] for checkpoint in checkpoints)
    assert all(torch.equal(plain["model"][name], averaged["model"][name]) for name in plain["model"])
    file = tmp_path / "averaged" / "classifier.safetensors"
    saved, card = weights.load_classifier(file), weights.read_card(file)
    assert all(torch.equal(averaged["average"][name], saved.state_dict()[name]) for name in plain["model"])
    assert "--ema 0.9" in card["command"]
    images, labels = data.load("digits", split="validation")
    assert card["quality"]["accuracy_validation"] == pytest.approx(accuracy(saved, images, labels))


def test_train_gan_may_end_early(tmp_path):
    words = ["train", "gan", "--dataset", "digits", "--steps", "9", "--width", "2", "--critic-width", "2"]
    words += ["--batch", "8", "--sample-every", "0", "--out", str(tmp_path)]
    assert commands.main([*words, "--stop-at", "2"]) == 0
    card = weights.read_card(tmp_path / "generator.safetensors")
    assert card["steps"] == 2
    assert "--stop-at 2" in card["command"]
    assert "--steps 9" in card["command"]


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    """Before any work, with the place that was looked at; and a generator that --on needs."""
    for job in (["gan"], ["classifier"], ["magnet"]):
        words = ["train", *job, "--dataset", "mnist", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
        assert commands.main(words) == 2
        message = capsys.readouterr().err
        assert message.startswith(
            "defgan-fast: no such file: train-images-idx3-ubyte.gz (or unpacked, or mnist.npz) of mnist; looked in "
        )
        assert str(tmp_path) in message
        assert message.count("\n") == 1
    words = [
        "train",
        "classifier",
        "--dataset",
        "digits",
        "--on",
        "reconstructions",
        "--out",
        str(tmp_path / "out"),
    ]
    assert commands.main([*words, "--generator", str(tmp_path / "absent.safetensors")]) == 2
    assert "no such file: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shipped_generators_have_the_geometry_of_the_paper():
    """And the digits' that of the design."""
    for dataset, recipe in recipes.SHIPPED.items():
        expected = (64, 32) if dataset == "digits" else (128, 64)
        assert (recipe.gan.latent_size, recipe.gan.width) == expected


def test_train_weights(tmp_path, monkeypatch, capsys):
    """The whole way to a shipped pair, with tiny networks."""
    small = {"steps": 2, "batch": 8, "critic_steps": 1, "latent_size": 4, "width": 2, "critic_width": 2}
    recipe = recipes.Recipe(GanSettings(**small), ClassifierSettings(arch="E", epochs=2))
    monkeypatch.setitem(recipes.SHIPPED, "digits", recipe)
    words = ["train", "weights", "--images", "3", "--images-test", "4", "--images-attacked", "2"]
    words += ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert commands.main(words) == 0
    generator = weights.load_generator(tmp_path / "digits_generator.safetensors")
    assert generator.config["latent_size"] == 4
    assert weights.load_classifier(tmp_path / "digits_classifier.safetensors").config["arch"] == "E"
    for kind in ("generator", "classifier"):
        card = weights.read_card(tmp_path / f"digits_{kind}.safetensors")
        assert set(card["quality"]) == {"validation", "validation_float32", "test"}
        assert card["quality"]["test"]["images"] == 4
        assert card["quality"]["test"]["images_attacked"] == 2
        assert card["storage"] == "float16"
        assert card["command"].startswith("defgan-fast train ")
    assert "validation: images 3, reconstruction_error" in capsys.readouterr().out


def test_quality_measures_what_it_says():
    """A generator that knows the image exactly, and a classifier whose answers are known."""
    images, labels = (part[:4] for part in data.load("digits", split="validation"))

    class Constant(nn.Module):
        latent_size = 2

        def forward(self, latents):
            return images[:1] + 0 * latents.sum(1).view(-1, 1, 1, 1)

    classifier = weights.load_classifier("digits")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = quality.measure(
            Constant(), classifier, data.Dataset(images, labels, (0.0, 1.0)), steps=1, restarts=1
        )
    errors = (images - images[:1]).square().mean((1, 2, 3))
    assert found["reconstruction_error"] == pytest.approx(errors.mean().item(), rel=1e-5)
    # Every reconstruction is the first image, whatever was asked for.
    answer = classifier(images[:1]).argmax(1)
    same = (labels == answer).double().mean().item()
    assert found["accuracy_clean_defended"] == found["accuracy_attacked_defended"] == same
    assert found["accuracy_clean"] == (classifier(images).argmax(1) == labels).double().mean().item()
