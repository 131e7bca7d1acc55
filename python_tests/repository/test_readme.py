"""What the README shows runs as it stands, and its numbers are those of the committed measurements."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import torch

from defgan_fast import Projector, commands, data

ROOT = Path(__file__).resolve().parent.parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="needs the checkout")


def section(title: str) -> str:
    text = README.read_text()
    assert f"\n## {title}\n" in text, title
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every line of a table, without its heading and rule."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    rule = next(i for i, line in enumerate(cells) if all(set(cell) <= {"-"} and cell for cell in line))
    return cells[rule + 1 :]


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    images = data.load("digits", split="test").images[:6]
    names = {"images": images[:2], "clean_images": images[2:]}
    exec(compile(example, "README.md", "exec"), names)
    assert names["labels"].shape == (2,)
    assert names["attacked"].dtype == torch.bool


def test_the_fields_of_a_projection_are_named():
    from defgan_fast import Projection

    sentence = re.search(r"`projector\.project\(images\)` gives the whole result: (.*)\.", README.read_text())
    named = re.findall("`(.*?)`", sentence[1])
    assert set(named) == set(Projection._fields)


def test_every_argument_of_the_projector_is_in_the_table_with_its_default():
    table = {}
    for names, defaults in re.findall(r"^\| (`.*?) \| (.*?) \|", section("Ten lines"), re.MULTILINE):
        names, defaults = names.replace("`", "").split(", "), defaults.replace("`", "").split(", ")
        assert len(names) == len(defaults), names
        table |= dict(zip(names, defaults, strict=True))
    signature = inspect.signature(Projector).parameters
    expected = {name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty}
    assert set(table) == set(expected)
    for name, default in expected.items():
        assert table[name].strip('"') == str(default), name


def test_the_commands_exist():
    named = re.findall(r"^ +defgan-fast (\w+)", section("Command line"), re.MULTILINE)
    parser = commands.build_parser()
    known = parser._subparsers._group_actions[0].choices
    assert named
    assert set(named) == set(known)


def test_the_times_on_cpus_are_those_of_the_committed_runs():
    files = ("cpu-avx2.json", "cpu-amx.json", "cpu-amx.json")
    table = rows(section("Speed"))
    assert len(table) == len(files)
    for (name, *cells), file in zip(table, files, strict=True):
        precision = name.rpartition(", ")[2]
        measured = json.loads((RESULTS / file).read_text())["rows"]
        for cell, images in zip(cells, (1, 10, 200), strict=True):
            (row,) = (
                row
                for row in measured
                if row["backend"].startswith("defgan_fast")
                and (row["precision"], row["images"], row["restarts"]) == (precision, images, 10)
            )
            seconds, ratio = re.fullmatch(r"(\S+) \((\S+)\)", cell).groups()
            assert agrees(seconds, row["ms_per_step"] * 200 / 1000), (name, images)
            assert agrees(ratio, row["ratio_to_best_peer"]), (name, images)


def test_the_times_on_a_gpu_are_those_of_the_committed_run():
    text = " ".join(section("Speed").split())
    found = re.search(
        r"float16, 1, 16 and 1,000 images take (\d+), (\d+) and (\d+) ms: (\S+), (\S+) and (\S+) times", text
    )
    timings = json.loads((RESULTS / "gpu-h200.json").read_text())["parts"]["timings"]["rows"]
    for i, images in enumerate((1, 16, 1000)):
        of_size = [row for row in timings if row["images"] == images and row["precision"] == "float16"]
        (ours,) = (row["ms"] for row in of_size if row["backend"] == "defgan_fast")
        fastest = min(row["ms"] for row in of_size if not row["backend"].startswith("defgan_fast"))
        assert agrees(found[1 + i], ours), images
        assert agrees(found[4 + i], fastest / ours), images


def test_the_accuracies_are_those_of_the_committed_run():
    measured = json.loads((RESULTS / "test-sets-h200.json").read_text())["rows"]
    expected: dict[tuple[str, int], list[float]] = {}
    for row in measured:
        if "steps" in row:
            expected.setdefault(("", row["steps"]), []).append(row["accuracy"])
        else:
            expected.setdefault(("", 0), []).extend([row["classifier_clean"], row["classifier_attacked"]])
    for name, *cells in rows(section("Accuracy")):
        steps = int((re.search(r"L = (\d+)", name) or [0, 0])[1])
        for cell, value in zip(cells, expected.pop(("", steps)), strict=True):
            assert agrees(cell, value), name
    assert not expected


def agrees(text: str, value: float) -> bool:
    """Whether `text` is `value` to its own last digit."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5000001 * 10**-digits
