"""CelebA's folder: a few synthetic JPEGs with colours that say where they were cut and which part they belong to."""

import numpy as np
import pytest
import torch
from PIL import Image

from defgan_fast import commands, data, models, weights
from defgan_fast.data import celeba as celeba_files
from defgan_fast.plan import lower
from defgan_fast.projector import Projector
from defgan_fast.training.selection import ClassifierSelection

# Part, and whether the picture counts as a man.
FACES = {
    "000001.jpg": (0, 1),
    "000002.jpg": (0, -1),
    "000003.jpg": (1, 1),
    "000004.jpg": (2, -1),
    "000005.jpg": (0, -1),
}


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """The official layout, aligned images of 178 x 218 pixels: a band of another colour above and below."""
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    for index, name in enumerate(FACES):
        picture = np.zeros((218, 178, 3), dtype=np.uint8)
        picture[:] = (255, 255, 255)
        # The centred square of 178: its quarters are red, green, blue and a grey of the picture's own.
        picture[20:109, :89], picture[20:109, 89:] = (255, 0, 0), (0, 255, 0)
        picture[109:198, :89], picture[109:198, 89:] = (0, 0, 255), (40 * index,) * 3
        Image.fromarray(picture).save(folder / "img_align_celeba" / name, quality=95, subsampling=0)
    rows = "".join(f"{name} {part}\n" for name, (part, _) in FACES.items())
    (folder / celeba_files.PARTITION).write_text(rows)
    header = f"{len(FACES)}\nEyeglasses Male Young\n"
    rows = "".join(f"{name} -1  {male:2d} 1\n" for name, (_, male) in FACES.items())
    (folder / celeba_files.ATTRIBUTES).write_text(header + rows)
    monkeypatch.setenv("DEFGAN_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_parts_labels_and_pixels(celeba):
    images, labels = data.load("celeba", split="train")
    assert images.shape == (3, 3, 64, 64)
    assert images.dtype == torch.float32
    assert labels.tolist() == [1, 0, 0]
    assert data.load("celeba", split="validation").labels.tolist() == [1]
    assert data.load("celeba", celeba, "test").images.shape[0] == 1
    # Red above left, green above right, blue below left, and the grey of the fifth picture; JPEG blurs edges.
    face = images[2]
    for rows, columns, colour in [
        (slice(2, 28), slice(2, 28), (1, -1, -1)),
        (slice(2, 28), slice(36, 62), (-1, 1, -1)),
        (slice(36, 62), slice(2, 28), (-1, -1, 1)),
        (slice(36, 62), slice(36, 62), (160 / 127.5 - 1,) * 3),
    ]:
        expected = torch.tensor(colour).view(3, 1, 1)
        assert (face[:, rows, columns] - expected).abs().max() < 0.1
    # The white bands are cut off: nothing is white.
    assert images.amin(1).max() < 0.6


def test_8_bit_pixels_are_the_same_images(celeba):
    pixels, _ = data.celeba_pixels(split="train")
    dataset = data.load("celeba", split="train")
    assert pixels.dtype == torch.uint8
    assert torch.equal(data.to_range(pixels, (-1.0, 1.0)), dataset.images)
    assert data.fingerprint(data.celeba_pixels(split="train")) == data.fingerprint(dataset)
    assert dataset.value_range == (-1.0, 1.0)


def test_a_selection_knows_its_images(celeba):
    """What quality was measured on is recorded; images in [-1, 1] were once taken for images in [0, 1]."""
    selection = ClassifierSelection(lambda: torch.nn.Identity(), data.load("celeba", split="validation"))
    expected = data.fingerprint(data.celeba_pixels(split="validation"))
    assert selection.settings()["validation data"] == expected


def test_the_images_may_lie_beside_the_lists(celeba):
    expected = data.load("celeba", split="train").images
    for path in (celeba / "img_align_celeba").iterdir():
        path.rename(celeba / path.name)
    (celeba / "img_align_celeba").rmdir()
    assert torch.equal(data.load("celeba", split="train").images, expected)


def test_what_is_missing_or_damaged_is_named(celeba, tmp_path):
    path = celeba / "img_align_celeba" / "000002.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"000002.jpg is truncated or not an image"):
        data.load("celeba")
    path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no such file: 000002.jpg of celeba; looked in .*img_align_celeba"
    ):
        data.load("celeba")
    attributes = (celeba / celeba_files.ATTRIBUTES).read_text()
    (celeba / celeba_files.ATTRIBUTES).write_text(attributes.replace("Male", "Smiling"))
    with pytest.raises(
        ValueError, match=r"list_attr_celeba.txt must name the attribute Male in its second line"
    ):
        data.load("celeba")
    (celeba / celeba_files.ATTRIBUTES).write_text(attributes.replace("000003.jpg -1", "000003.jpg"))
    with pytest.raises(ValueError, match=r"list_attr_celeba.txt must have 4 columns, got 3 in row 5"):
        data.load("celeba")
    (celeba / celeba_files.ATTRIBUTES).unlink()
    with pytest.raises(FileNotFoundError, match=r"no such file: .*list_attr_celeba.txt"):
        data.load("celeba")
    (celeba / celeba_files.PARTITION).write_text("000001.jpg\n")
    with pytest.raises(ValueError, match=r"list_eval_partition.txt must have 2 columns, got 1 in row 1"):
        data.load("celeba")
    with pytest.raises(
        FileNotFoundError, match=r"list_eval_partition.txt of celeba; looked in .*empty"
    ) as caught:
        data.load("celeba", tmp_path / "empty")
    assert "\n" not in str(caught.value)


def test_training_commands(celeba, tmp_path, capsys):
    """Generator with BatchNorm, evaluated; classifier with adversarial examples; autoencoder."""
    words = ["train", "gan", "--dataset", "celeba", "--steps", "2", "--width", "2", "--critic-width", "2"]
    words += ["--batch", "3", "--latent-size", "4", "--batch-norm", "--out", str(tmp_path / "gan")]
    words += ["--evaluate-every", "2", "--evaluate-images", "1", "--evaluate-steps", "2"]
    assert commands.main(words) == 0, capsys.readouterr().err
    generator = weights.load_generator(tmp_path / "gan" / "generator.safetensors")
    assert generator.config["batch_norm"] is True
    card = weights.read_card(tmp_path / "gan" / "generator.safetensors")
    assert "--model CelebaGenerator --batch-norm" in card["command"]
    assert commands.main([*words, "--model", "Generator", "--no-batch-norm", "--resume"]) == 2
    assert "model must make images in [-1.0, 1.0] for celeba, got Generator" in capsys.readouterr().err
    words = [
        "train",
        "classifier",
        "--dataset",
        "celeba",
        "--arch",
        "E",
        "--epochs",
        "1",
        "--adversarial",
        "0.3",
    ]
    assert commands.main([*words, "--out", str(tmp_path / "classifier")]) == 0
    assert weights.load_classifier(tmp_path / "classifier" / "classifier.safetensors").config["classes"] == 2
    words = ["train", "magnet", "--dataset", "celeba", "--width", "2", "--epochs", "1", "--members", "2"]
    assert commands.main([*words, "--out", str(tmp_path / "magnet")]) == 0
    paths = [tmp_path / "magnet" / f"member-{index}" / "autoencoder.safetensors" for index in (0, 1)]
    first, second = map(weights.load_autoencoder, paths)
    assert first.config["signed"] is True
    assert not torch.equal(first.encoder[0].weight, second.encoder[0].weight)
    assert [weights.read_card(path)["seed"] for path in paths] == [0, 1]


def test_batch_norm_folds_into_the_plan():
    """Three normalised layers, five in the plan, and the same images as the module in eval mode."""
    torch.manual_seed(0)
    generator = models.CelebaGenerator(5, 4, batch_norm=True)
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
            torch.nn.init.normal_(module.bias)
    generator.eval()
    plain = models.CelebaGenerator(5, 4)
    plan, expected = (lower(module, 5) for module in (generator, plain))
    assert [layer.kind for layer in plan.layers] == [layer.kind for layer in expected.layers]
    projector = Projector(generator, steps=2, restarts=2)
    target = generator(torch.randn(2, 5)).detach()
    result = projector.project(target)
    assert projector.backend_for(target) == "cpu"
    assert (generator(result.latents) - result.images).abs().max() < 1e-5
