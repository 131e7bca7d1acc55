"""The commands `project`, `attack`, `detect` and `evaluate`, on shipped networks and on the user's own."""

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from defgan_fast import Projector, commands, data, load_generator

CHEAP = ["--steps", "4", "--restarts", "2", "--count", "3"]


def run(capsys, *words):
    """Exit status, stdout, stderr."""
    try:
        status = commands.main(words)
    except SystemExit as end:  # argparse's way
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def test_images():
    return data.load("digits", split="test").first(3)


def test_project(capsys, folder, test_images):
    status, out, _ = run(capsys, "project", *CHEAP)
    assert status == 0
    kept = np.load("out/project/projection.npz")
    expected = Projector(load_generator("digits"), steps=4, restarts=2).project(test_images.images)
    for name in ("images", "latents", "errors", "restarts", "all_errors"):
        assert np.array_equal(kept[name], getattr(expected, name).numpy()), name
    report = json.loads((folder / "out/project/report.json").read_text())
    assert f"{report['mean_error']:.5f}" in out
    assert Image.open("out/project/projection.png").size[0] > 3 * 28


def write(kind, images, labels):
    """Writes images, as bytes where the format has bytes, and returns the words that name them."""
    pixels = (images * 255).round().to(torch.uint8)
    if kind == "png":
        for i, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
            path = Path(f"pictures/{int(label)}/{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[0].numpy()).save(path)
        return ["--images", "pictures"]
    if kind == "npy":
        np.save("images.npy", images.numpy())
        np.save("labels.npy", labels.numpy())
        return ["--images", "images.npy", "--labels", "labels.npy"]
    if kind == "npz":
        np.savez(
            "both.npz", images=pixels[:, 0].numpy(), labels=labels.numpy(), names=np.array(["a", "b", "c"])
        )
        return ["--images", "both.npz"]
    if kind == "pt":
        torch.save({"images": images, "labels": labels}, "both.pt")
        return ["--images", "both.pt"]
    save_file({"images": images, "labels": labels}, "both.safetensors")
    return ["--images", "both.safetensors"]


@pytest.mark.parametrize("kind", ["png", "npy", "npz", "pt", "safetensors"])
def test_every_kind_of_images(capsys, test_images, kind):
    words = write(kind, *test_images)
    status, _, errors = run(
        capsys, "attack", *words, "--no-defence", "--attack", "fgsm", "--epsilon", "0.1", *CHEAP
    )
    assert status == 0, errors
    kept = np.load("out/attack/adversarial.npz")
    order = np.argsort(test_images.labels.numpy(), kind="stable") if kind == "png" else np.arange(3)
    assert kept["labels"].tolist() == test_images.labels[order].tolist()
    moved = np.abs(kept["images"] - test_images.images.numpy()[order]).max()
    # Bytes round by half of 1/255 at most.
    assert moved <= 0.1 + (0.002 if kind in ("png", "npz") else 1e-6)


OWN = """
from defgan_fast import load_classifier, load_generator

def generator():
    return load_generator("digits")

def classifier():
    return load_classifier("digits")

def wrong():
    return 3
"""


def test_networks_of_ones_own(capsys, folder):
    (folder / "defgan_own_networks.py").write_text(textwrap.dedent(OWN))
    words = ["evaluate", "--attacks", "fgsm", "noise", "--set", "noise.tries=1", *CHEAP]
    assert run(capsys, *words, "--out", "shipped")[0] == 0
    own = ["--generator", "defgan_own_networks:generator", "--model", "defgan_own_networks:classifier"]
    assert run(capsys, *words, *own, "--out", "own")[0] == 0
    reports = [json.loads((folder / name / "report.json").read_text()) for name in ("shipped", "own")]
    for report in reports:
        for row in report["rows"]:
            del row["seconds"]
    assert reports[0] == reports[1]
    assert [row["attack"] for row in reports[0]["rows"]] == ["clean", "fgsm", "noise", "unbounded"]
    assert (folder / "own/attacked.png").is_file()
    assert "is left when each image" in (folder / "own/report.md").read_text()


def test_accuracy_against_epsilon(capsys, folder):
    words = ["--attacks", "fgsm", "--epsilons", "0", "0.2", "--set", "apgd.steps=2", "--no-defence", *CHEAP]
    status, out, _ = run(capsys, "evaluate", *words)
    assert status == 0
    assert "epsilon 0: 1.000 under apgd" in out
    points = json.loads((folder / "out/evaluate/epsilons.json").read_text())
    assert [point["threat"]["epsilon"] for point in points] == [0.0, 0.2]


def test_detect(capsys, folder):
    status, out, _ = run(capsys, "detect", *CHEAP, "--clean-count", "10", "--attacks", "fgsm", "evade")
    assert status == 0
    report = json.loads((folder / "out/detect/report.json").read_text())
    assert [row["attack"] for row in report["attacks"]] == ["clean", "fgsm", "evade"]
    assert f"threshold {report['threshold']:.6f}" in out
    kept = np.load("out/detect/detection.npz")
    assert (kept["attack"] == (kept["errors"] > report["threshold"])).all()
    assert kept["fgsm_true_positive"][-1] == 1


MISTAKES = {
    "no file": (["project", "--images", "absent.npy"], "no such file: absent.npy"),
    "no folder": (["project", "--images", "absent"], "no such file: absent"),
    "empty folder": (
        ["project", "--images", "empty"],
        "--images must hold PNG or JPEG files, got none in empty",
    ),
    "kind": (["project", "--images", "text.txt"], "text.txt must be a folder or end in .npy, .npz"),
    "damaged": (["project", "--images", "bad.npz"], "bad.npz cannot be read"),
    "damaged pt": (["project", "--images", "bad.pt"], "bad.pt cannot be read"),
    "damaged safetensors": (["project", "--images", "bad.safetensors"], "bad.safetensors cannot be read"),
    "no picture": (["project", "--images", "fake"], "fake.png must be a PNG or JPEG picture"),
    "shape": (["project", "--images", "flat.npy"], "--images must hold images [N, C, H, W], got (2, 784)"),
    "no labels": (["attack", "--images", "good.npy"], "--labels must be given"),
    "labels alone": (["attack", "--labels", "good.npy"], "--labels must come with --images"),
    "range": (
        ["project", "--images", "wide.npy"],
        "--images must lie in --value-range [0, 1], got [0, 255]",
    ),
    "no module": (
        ["project", "--generator", "absent_module:make"],
        "--generator must be module:factory, got absent",
    ),
    "no function": (["attack", "--model", "json:absent"], "--model must be module:factory, got json:absent"),
    "no network": (["attack", "--model", "os:getcwd"], "--model must make a torch.nn.Module, got str"),
    "setting": (["evaluate", "--set", "pgd=3"], "--set must be ATTACK.NAME=VALUE, got 'pgd=3'"),
    "setting of another": (["attack", "--set", "fgsm.steps=3"], "settings must be one of pgd, got 'fgsm'"),
    "norm": (["attack", "--attack", "square", "--norm", "l2"], "attacks must exist in the norm 'l2'"),
    "count": (["project", "--count", "0"], "--count must be at least 1, got 0"),
    "epsilon": (["evaluate", "--epsilon", "-1"], "epsilon must be at least 0, got -1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, capsys, folder):
    words, message = MISTAKES[name]
    for made in ("empty", "fake"):
        (folder / made).mkdir()
    for file in ("text.txt", "bad.npz", "bad.pt", "bad.safetensors", "fake/fake.png"):
        (folder / file).write_bytes(b"PK\x03\x04 half of it")
    np.save("flat.npy", np.zeros((2, 784), np.float32))
    np.save("good.npy", np.zeros((2, 1, 28, 28), np.float32))
    np.save("wide.npy", np.arange(784, dtype=np.float32).clip(0, 255).reshape(1, 1, 28, 28))
    status, _, errors = run(capsys, *words)
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
    assert errors.count("\n") == 1
