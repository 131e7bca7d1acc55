"""The documentation names only what is there: files, folders, links, targets, options of commands."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest

from defgan_fast import commands, data, load_classifier, load_generator

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "csrc" / "README.md",
    *(ROOT / "docs").rglob("*.md"),
]
# Experiments and the changelog say how things were on their day.
PRESENT = [d for d in DOCUMENTS if d.name != "CHANGELOG.md" and d.parent.name != "experiments"]
SUFFIXES = "py|pyi|cpp|cu|cuh|h|md|json|toml|txt|png|plan"
# What a command makes, and what a user has.
MADE = ("out/", ".venv", "build/", "samples/", "tensorboard/", "checkpoint.pt", "metrics.csv", "quality.csv")

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="needs the checkout")


@pytest.fixture(scope="module")
def tree() -> set[str]:
    """Every file and folder of the checkout, folders with a slash at the end, each after a slash."""
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [
            f for f in folders if not f.startswith(".venv") and f not in (".git", "build", "__pycache__")
        ]
        inside = "/" + Path(folder).relative_to(ROOT).as_posix().removeprefix(".")
        inside = inside.rstrip("/") + "/"
        found |= {inside + name for name in files} | {inside + name + "/" for name in folders}
    return found


def named_paths(document: Path) -> list[str]:
    """What stands in backticks and looks like a file or a folder of the repository."""
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r"`([\w./*-]+)`", prose)
    return [
        name
        for name in names
        if (name.endswith("/") or re.fullmatch(rf"[\w./*-]+\.({SUFFIXES})", name))
        and not name.startswith(MADE)
    ]


@pytest.mark.parametrize("document", PRESENT, ids=lambda d: d.name)
def test_the_paths_exist(document: Path, tree: set[str]):
    for name in named_paths(document):
        pattern = re.compile(".*/" + re.escape(name).replace(r"\*", "[^/]*"))
        assert any(pattern.fullmatch(path) for path in tree), f"{document.name} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_the_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_the_commands_name_scripts_and_targets_that_exist(document: Path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = document.read_text()
    for script in re.findall(r"python ((?:bench|tools)/\S+\.py)", text):
        assert (ROOT / script).is_file(), f"{document.name} names {script}"
    for line in re.findall(r"^    make (.*)$", text, re.MULTILINE):
        words = re.sub(r"[A-Z]+=(\"[^\"]*\"|\S+)", "", line.partition("#")[0]).split()
        assert set(words) <= targets, f"{document.name}: make {line}"


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d.name != "bad-inputs.md"], ids=lambda d: d.name
)
def test_the_options_of_commands_exist(document: Path):
    text = document.read_text().replace("\\\n", " ")
    for line in re.findall(
        r"(?:^    |^|`)(defgan-fast \w.*?|python bench/\w+\.py.*?)(?:`|$|#)", text, re.MULTILINE
    ):
        words = line.split()
        known = options_of_script(ROOT / words[1]) if words[0] == "python" else options_of_command(words[1:])
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line))
        assert used <= known, f"{document.name}: {line}"


def options_of_script(script: Path) -> set[str]:
    return set(re.findall(r'"(--[a-z][a-z-]*)"', script.read_text()))


def options_of_command(words: list[str], parser: argparse.ArgumentParser | None = None) -> set[str]:
    """The options of the parser that the first words lead to; of any of them where a word is `one|another`."""
    parser = commands.build_parser() if parser is None else parser
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below or not words:
        return {option for action in parser._actions for option in action.option_strings}
    choices = below[0].choices
    return set().union(*(options_of_command(words[1:], choices[name]) for name in words[0].split("|")))


def test_the_examples_for_a_generator_of_ones_own_run(capsys: pytest.CaptureFixture[str]):
    images = data.load("digits", split="validation").images[:2]
    names = {"generator": load_generator("digits"), "images": images}
    text = (ROOT / "docs" / "your-own-generator.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "your-own-generator.md", "exec"), names)
    assert "<- chosen" in capsys.readouterr().err


def test_the_example_of_the_attacks_runs(capsys: pytest.CaptureFixture[str]):
    test = data.load("digits", split="test")
    names = {"generator": load_generator("digits"), "classifier": load_classifier("digits").eval()}
    names |= {"images": test.images[:1], "labels": test.labels[:1]}
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attacks.md").read_text(), re.DOTALL)
    assert "steps=50" in example
    cheap = example.replace("steps=50", "steps=1, restarts=1")
    exec(compile(cheap, "attacks.md", "exec"), names)
    assert capsys.readouterr().out.count("is left when each image") == 2


def test_every_experiment_is_dated_names_a_command_and_is_in_the_index():
    folder = ROOT / "docs" / "experiments"
    index = (folder / "README.md").read_text()
    for file in folder.glob("*.md"):
        if file.name == "README.md":
            continue
        assert re.match(r"\d{4}-\d{2}-\d{2}-", file.name), f"{file.name} begins with no date"
        commands = re.findall(
            r"^    (?:defgan-fast|python|build/|make|cmake) ?.*$", file.read_text(), re.MULTILINE
        )
        assert commands, f"{file.name} names no command"
        assert f"]({file.name})" in index, file.name


def test_no_number_rests_on_what_is_not_here():
    for document in DOCUMENTS:
        assert "not in the repository" not in " ".join(document.read_text().split()), document.name
