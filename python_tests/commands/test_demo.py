"""The demonstration end to end, small: its report, its picture, its repeatability and its refusals."""

import json

import pytest
import torch
from PIL import Image

from defgan_fast import commands, data, models, pictures, weights
from defgan_fast.attacks import fgsm
from defgan_fast.commands import options
from defgan_fast.evaluation.metrics import score_samples

KEYS = [
    "dataset",
    "images",
    "images_adaptive",
    "steps",
    "restarts",
    "backend",
    "precision",
    "accuracy_clean",
    "accuracy_clean_defended",
    "accuracy_attacked",
    "accuracy_attacked_defended",
    "accuracy_adaptive_defended",
    "auc_detection",
    "seconds_per_image",
]
SMALL = ["--images", "6", "--images-adaptive", "2", "--steps", "4", "--restarts", "2"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One small run on the shipped weights: folder and report."""
    out = tmp_path_factory.mktemp("demo")
    assert commands.main(["demo", *SMALL, "--out", str(out)]) == 0
    return out, json.loads((out / "report.json").read_text())


def test_report(small):
    _, report = small
    assert list(report) == KEYS
    assert report["dataset"] == "digits"
    assert (report["images"], report["images_adaptive"]) == (6, 2)
    assert (report["steps"], report["restarts"]) == (4, 2)
    assert report["backend"] in ("cpu", "cuda", "reference")
    assert report["precision"] == "float32"
    for key in KEYS:
        if key.startswith(("accuracy", "auc")):
            assert 0 <= report[key] <= 1
    assert report["seconds_per_image"] > 0


def test_undefended_numbers_are_the_classifiers(small):
    _, report = small
    images, labels = (part[:6] for part in data.load("digits", split="test"))
    classifier = weights.load_classifier("digits")
    assert report["accuracy_clean"] == (classifier(images).argmax(1) == labels).double().mean().item()
    attacked = fgsm(classifier, images, labels, 0.3)
    assert report["accuracy_attacked"] == (classifier(attacked).argmax(1) == labels).double().mean().item()


def test_picture(small):
    out, _ = small
    with Image.open(out / "demo.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300
        # Labels in both colours: what the classifier gets right and what it gets wrong.
        colours = {colour for _, colour in picture.getcolors(1 << 20)}
        assert pictures.GOOD in colours
        assert pictures.BAD in colours
    assert sorted(path.name for path in out.iterdir()) == ["demo.png", "report.json"]


def test_second_run_prints_the_same(small, tmp_path, capsys):
    _, report = small
    assert commands.main(["demo", *SMALL, "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert {**again, "seconds_per_image": 0} == {**report, "seconds_per_image": 0}
    out = capsys.readouterr().out
    assert "Defense-GAN on digits: L = 4, R = 2" in out
    for name in ("clean", "FGSM, epsilon 0.3", "PGD through the defence, 10 steps", "AUC"):
        assert name in out
    assert f"{report['accuracy_attacked']:.3f}" in out


def test_shipped_weights_defend():
    """Fewer images than the demonstration, full L and R: the gain the project promises, with a margin."""
    from defgan_fast.projector import Projector

    images, labels = (part[:24] for part in data.load("digits", split="test"))
    classifier = weights.load_classifier("digits")
    projector = Projector(weights.load_generator("digits"))
    attacked = fgsm(classifier, images, labels, 0.3)

    def accuracy(pictures):
        return (classifier(pictures).argmax(1) == labels).double().mean().item()

    with torch.no_grad():
        assert accuracy(projector(images)) >= 0.9
        assert accuracy(projector(attacked)) >= accuracy(attacked) + 0.25


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion_mnist"])
@pytest.mark.parametrize("kind", ["generator", "classifier"])
def test_shipped_card(kind, dataset):
    path = weights.FOLDER / f"{dataset}_{kind}.safetensors"
    card = weights.read_card(path)
    assert card["command"].startswith("defgan-fast train ")
    assert {"seed", "steps", "quality", "defgan_fast", "torch", "machine", "data_sha256"} <= set(card)
    if dataset == "digits":
        assert card["data_sha256"] == data.fingerprint(data.load("digits"))
    module = (weights.load_generator if kind == "generator" else weights.load_classifier)(dataset)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion_mnist"])
def test_shipped_classifier_knows_the_shipped_generators_samples(dataset):
    """All ten classes, and most samples without doubt: the two files belong together."""
    generator, classifier = weights.load_generator(dataset), weights.load_classifier(dataset)
    with torch.no_grad():
        images = generator(
            torch.randn(300, generator.latent_size, generator=torch.Generator().manual_seed(0))
        )
    assert 0 <= images.min() <= images.max() <= 1
    found = score_samples(classifier, images)
    assert found["sample_balance"] > 0.9
    assert found["sample_confidence"] > 0.7


def test_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in weights.FOLDER.glob("*.safetensors")) < 15e6


def test_trained_weights_are_found_where_training_puts_them(tmp_path, monkeypatch, capsys):
    """A data set without shipped weights: the trainer's default folders, or the files that are named."""
    monkeypatch.chdir(tmp_path)
    images = data.load("digits", split="test")
    monkeypatch.setattr(data, "load", lambda *_: images)
    generator, classifier = models.Generator(5, 2), models.Classifier("E")
    monkeypatch.setattr(weights, "shipped", lambda kind: [])

    assert commands.main(["demo", "--dataset", "mnist", *SMALL]) == 2
    message = capsys.readouterr().err
    assert "no generator for mnist at hand" in message
    assert "defgan-fast train gan --dataset mnist --steps" in message
    assert "out/train/gan-mnist/generator.safetensors" in message

    weights.save(generator, "out/train/gan-mnist/generator.safetensors", {})
    assert commands.main(["demo", "--dataset", "mnist", *SMALL]) == 2
    assert "train one with: defgan-fast train classifier --dataset mnist, or" in capsys.readouterr().err

    weights.save(classifier, "mine.safetensors", {})
    assert commands.main(["demo", "--dataset", "mnist", *SMALL, "--classifier", "mine.safetensors"]) == 0
    report = json.loads((tmp_path / "out" / "demo" / "report.json").read_text())
    assert report["dataset"] == "mnist"


def test_suggested_command_is_accepted(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "shipped", lambda kind: [])
    monkeypatch.chdir(tmp_path)
    parser = commands.build_parser()
    with pytest.raises(FileNotFoundError) as caught:
        options.load_network("generator", "fashion_mnist", None)
    suggested = str(caught.value).split("train one with: ")[1].split(", or")[0]
    args = parser.parse_args(suggested.split()[1:])
    assert (args.job, args.dataset) == ("gan", "fashion_mnist")


MISTAKES = {
    "unwritable": (["--out", "file/out"], "--out must be a folder that can be written, got file/out (Not a"),
    "images": (["--images", "0"], "--images must be at least 1, got 0"),
    "adaptive": (["--images-adaptive", "-3"], "--images-adaptive must be at least 1, got -3"),
    "steps": (["--steps", "0"], "steps must be"),
    "restarts": (["--restarts", "0"], "restarts must be"),
    "generator": (["--generator", "absent.safetensors"], "no such file: absent.safetensors"),
    "foreign": (["--generator", "file"], "file is truncated or not a safetensors file"),
    "device": (["--device", "toaster"], "--device must be"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path, monkeypatch, capsys):
    words, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    assert commands.main(["demo", *SMALL, *words]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
