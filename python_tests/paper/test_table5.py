"""Table 5: measured on test images, rendered beside the paper's numbers, and as it stands in the documentation."""

import json
from pathlib import Path

import pytest

from defgan_fast import data, models, weights
from defgan_fast.paper import markdown, table5

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


@pytest.mark.skipif(not DOCS.is_dir(), reason="needs the checkout")
def test_the_table_in_the_documentation_is_that_of_the_committed_results():
    document = (DOCS / "experiments" / "2026-11-25-classifiers.md").read_text()
    results = json.loads((DOCS / "results" / "classifiers.json").read_text())
    assert markdown.insert(document, table5.table(results), table5.BEGIN, table5.END) == document


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
