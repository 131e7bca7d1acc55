"""What is measured during training: the figures against their definitions, and that the best weights are kept."""

import csv
import math
import warnings

import pytest
import torch
from torch import nn

from defgan_fast import commands, data, weights
from defgan_fast.evaluation.metrics import score_samples
from defgan_fast.training import curve, loop
from defgan_fast.training.selection import GeneratorSelection


class Shades(nn.Module):
    """Three classes: the brightness decides."""

    def forward(self, images):
        level = images.mean((1, 2, 3))
        return torch.stack([-(level - centre).abs() * 100 for centre in (0.0, 0.5, 1.0)], dim=1)


def shade(*levels):
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def test_samples_of_one_class_and_of_all():
    one = score_samples(Shades(), shade(0.0, 0.01, 0.02))
    assert one["sample_balance"] == pytest.approx(0, abs=1e-6)
    assert one["sample_confidence"] > 0.99
    both = score_samples(Shades(), shade(0.0, 0.5))
    assert both["sample_balance"] == pytest.approx(math.log(2) / math.log(3), abs=1e-6)
    equal = score_samples(Shades(), shade(0.0, 0.5, 1.0))
    assert equal["sample_balance"] == pytest.approx(1, abs=1e-6)
    unsure = score_samples(Shades(), shade(0.25, 0.75))
    assert unsure["sample_confidence"] == pytest.approx(0.5, abs=0.01)


class Constant(nn.Module):
    """A generator that knows one image."""

    latent_size = 2

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, latents):
        return self.value + 0 * latents.sum(1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def evaluate(values, classifier, steps=None):
    """One evaluation for each value that the generator has in turn."""
    dataset = data.Dataset(shade(0.5, 0.5, 0.0), torch.tensor([1, 1, 0]), (0.0, 1.0))
    now = {}
    evaluation = GeneratorSelection(
        lambda: now["generator"], lambda count: shade(*[0.5] * count), dataset, classifier, 1, 1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step, value in enumerate(values, start=1):
            now["generator"] = Constant(value)
            evaluation.evaluate(step)
    return evaluation


def test_the_figures_and_the_best_by_error():
    evaluation = evaluate([0.9, 0.4, 0.1], None)
    expected = [(2 * 0.4**2 + 0.9**2) / 3, (2 * 0.1**2 + 0.4**2) / 3, (2 * 0.4**2 + 0.1**2) / 3]
    assert [row["reconstruction_error"] for row in evaluation.rows] == pytest.approx(expected, rel=1e-5)
    assert evaluation.best["step"] == 2
    assert evaluation.best["weights"]["value"].item() == pytest.approx(0.4)


def test_accuracy_counts_before_the_error():
    """0.45 and 0.3 are both taken for class 1, which two images have; 0.1 for class 0; 0.3 has the larger error."""
    evaluation = evaluate([0.1, 0.3, 0.45, 0.4], Shades())
    found = [row["accuracy_reconstructed"] for row in evaluation.rows]
    assert found == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3])
    assert evaluation.best["step"] == min(
        (2, 3, 4), key=lambda s: evaluation.rows[s - 1]["reconstruction_error"]
    )
    assert {"sample_confidence", "sample_balance"} < set(evaluation.rows[0])


def test_evaluations_survive_and_are_not_mixed():
    evaluation = evaluate([0.1, 0.45], Shades())
    state = evaluation.state()
    later = evaluate([], Shades())
    later.restore(state)
    assert later.rows == evaluation.rows
    assert later.best["step"] == evaluation.best["step"] == 2
    with pytest.raises(ValueError, match=r"quality was measured with classifier .* before, got None"):
        evaluate([], None).restore(state)
    state["settings"]["restarts"] = 7
    with pytest.raises(ValueError, match=r"quality was measured with restarts 7 before, got 1"):
        evaluate([], Shades()).restore(state)


WORDS = [
    "train",
    "gan",
    "--dataset",
    "digits",
    "--width",
    "2",
    "--critic-width",
    "2",
    "--batch",
    "8",
    "--lr",
    "0.01",
]
WORDS += ["--lr-schedule", "hold", "--sample-every", "0", "--evaluate-every", "2", "--evaluate-images", "3"]
WORDS += ["--evaluate-steps", "2", "--evaluate-restarts", "2", "--steps", "4"]


def test_training_keeps_the_best_average(tmp_path):
    """Against the same run stopped at the step that was best; and a resumed run has the same figures."""
    assert commands.main([*WORDS, "--out", str(tmp_path / "whole")]) == 0
    with (tmp_path / "whole" / loop.QUALITY).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    best = min(
        rows, key=lambda row: (-float(row["accuracy_reconstructed"]), float(row["reconstruction_error"]))
    )
    card = weights.read_card(tmp_path / "whole" / "generator.safetensors")
    assert card["steps"] == int(best["step"])
    assert "--evaluate-every 2 --evaluate-images 3" in card["command"]
    assert card["quality"]["validation"]["reconstruction_error"] == pytest.approx(
        float(best["reconstruction_error"])
    )
    assert commands.main([*WORDS, "--out", str(tmp_path / "parts"), "--stop-at", "2"]) == 0
    first = weights.load_generator(tmp_path / "parts" / "generator.safetensors")
    assert commands.main([*WORDS, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    with (tmp_path / "parts" / loop.QUALITY).open() as file:
        assert list(csv.DictReader(file)) == rows
    whole = weights.load_generator(tmp_path / "whole" / "generator.safetensors")
    last = weights.load_generator(tmp_path / "parts" / "generator.safetensors")
    same = [torch.equal(a, b) for a, b in zip(whole.parameters(), last.parameters(), strict=True)]
    assert all(same)
    if card["steps"] == 2:
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), first.parameters(), strict=True))


def test_curve(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / loop.QUALITY).write_text(
        "step,reconstruction_error,accuracy_reconstructed\n100,0.02,0.8\n200,0.01,0.95\n"
    )
    assert commands.main(["train", "curve", str(tmp_path / "run"), "--out", str(tmp_path / "curve.png")]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert curve.read(tmp_path / "run")[1] == {
        "step": 200.0,
        "reconstruction_error": 0.01,
        "accuracy_reconstructed": 0.95,
    }
    assert commands.main(["train", "curve", str(tmp_path)]) == 2
    assert "no such file: " in capsys.readouterr().err
