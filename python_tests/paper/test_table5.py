"""Table 5: trained once, measured on the test part, written beside the paper's numbers."""

import json

import pytest

from defgan_fast import commands, data, models, weights
from defgan_fast.paper import markdown, table5
from defgan_fast.training.run import Trained


def test_table_of_classifiers(tmp_path):
    """Measured on the test part, written beside the paper's numbers, between the marks only."""
    classifier = models.Classifier("E")
    file = tmp_path / "classifier.safetensors"
    card = {"quality": {"accuracy_validation": 0.5}, "command": "c", "steps": 1, "seed": 0}
    weights.save(classifier, file, {**card, "torch": "2", "data_sha256": "0"})
    test = data.load("digits", split="test")
    entry = table5.entry(file, test)
    expected = (classifier(test.images).argmax(1) == test.labels).double().mean().item()
    assert entry["accuracy_test"] == pytest.approx(expected, abs=1e-6)
    results = {
        "mnist": {"A": {"accuracy_test": 0.99}, "A-averaged": {"accuracy_test": 0.995}, "E": entry},
        "fashion_mnist": {"A": {"accuracy_test": 0.94}, "B-released": {"accuracy_test": 0.75}},
    }
    text = table5.table(results)
    assert "| A | 0.9900 | 0.997 | -0.7 points | 0.9400 | 0.934 | +0.6 points |" in text
    assert "| B-released |  | 0.962 |  | 0.7500 | 0.747 | +0.3 points |" in text
    assert "| A-averaged | 0.9950 | 0.997 | -0.2 points |  | 0.934 |  |" in text
    assert "| B |" not in text
    assert f"| E | {expected:.4f} |  |  |  |  |  |" in text
    document = f"before\n{table5.BEGIN}\nold\n{table5.END}\nafter\n"
    changed = markdown.insert(document, text, table5.BEGIN, table5.END)
    assert changed == f"before\n{table5.BEGIN}\n{text}\n{table5.END}\nafter\n"
    with pytest.raises(ValueError, match=r"--markdown must be a file with the lines"):
        markdown.insert("nothing", text, table5.BEGIN, table5.END)


def test_the_command_trains_measures_and_writes(tmp_path, monkeypatch, capsys):
    """Every row by one training with the options of the command; only the training itself is left out."""
    digits = data.load("digits", split="test").first(20)
    monkeypatch.setattr(data, "load", lambda *_: digits)
    trainings = []

    def train(settings, run, *, keep):
        trainings.append((settings, run, keep))
        card = {"quality": {"accuracy_validation": 0.5}, "command": "c", "steps": 1, "seed": 0}
        file = run.out / "classifier.safetensors"
        weights.save(models.Classifier(settings.arch), file, {**card, "torch": "2", "data_sha256": "0"})
        return Trained(file, card, (f"trained {settings.arch}",))

    monkeypatch.setattr(table5, "train_classifier", train)
    document = tmp_path / "document.md"
    document.write_text(f"{table5.BEGIN}\nold\n{table5.END}\n")
    words = [
        "train",
        "classifiers",
        "--dataset",
        "mnist",
        "--arch",
        "E",
        "D",
        "--ema",
        "0.9",
        "--keep",
        "best",
    ]
    words += [
        "--work",
        str(tmp_path / "work"),
        "--json",
        str(tmp_path / "r.json"),
        "--markdown",
        str(document),
    ]
    assert commands.main(words) == 0
    assert [(s.arch, s.ema, s.epochs, keep) for s, _, keep in trainings] == [
        ("E", 0.9, 10, "best"),
        ("D", 0.9, 10, "best"),
    ]
    assert all(run.resume and run.dataset == "mnist" for _, run, _ in trainings)
    assert trainings[0][1].out == tmp_path / "work" / "classifier-mnist-E-averaged"
    found = json.loads((tmp_path / "r.json").read_text())
    assert set(found["mnist"]) == {"D-averaged", "E-averaged"}
    text = table5.table(found)
    assert document.read_text() == f"{table5.BEGIN}\n{text}\n{table5.END}\n"
    assert capsys.readouterr().out == f"trained E\ntrained D\n{text}\n"
