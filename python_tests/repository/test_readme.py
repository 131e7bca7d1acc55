"""What the README shows runs as it stands, and names only what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from defgan_fast import Projector, cli, data

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="needs the checkout")


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    images = data.load("digits", split="test").images[:6]
    names = {"images": images[:2], "clean_images": images[2:]}
    exec(compile(example, "README.md", "exec"), names)
    assert names["labels"].shape == (2,)
    assert names["p"].images.shape == images[:2].shape
    assert names["attacked"].dtype == torch.bool


def test_every_argument_of_the_projector_is_in_the_table_with_its_default():
    import inspect

    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", README.read_text(), re.MULTILINE)
    table = {}
    for names, defaults in rows:
        names, defaults = names.replace("`", "").split(", "), defaults.replace("`", "").split(", ")
        if len(names) == len(defaults):
            table |= dict(zip(names, defaults, strict=True))
    for name, parameter in inspect.signature(Projector).parameters.items():
        if parameter.default is inspect.Parameter.empty:
            continue
        assert table[name].strip('"') == str(parameter.default), name


def test_the_commands_exist():
    block = README.read_text().partition("## Command line")[2].partition("\n## ")[0]
    commands = re.findall(r"^ +defgan-fast (\w+)", block, re.MULTILINE)
    parser = cli.build_parser()
    known = parser._subparsers._group_actions[0].choices
    assert commands
    assert set(commands) == set(known)


def test_the_paths_exist():
    block = README.read_text().partition("## Where things are")[2].partition("\n## ")[0]
    named = [
        name
        for cell in re.findall(r"^\| (`.*?) \|", block, re.MULTILINE)
        for name in re.findall("`(.*?)`", cell)
    ]
    assert len(named) > 8
    folder = ROOT
    for name in named:
        # In one cell a bare name lies in the folder of the name before it.
        path = ROOT / name if (ROOT / name).exists() else folder / name
        assert path.exists(), name
        folder = path.parent


def test_the_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in (README, ROOT / "CONTRIBUTING.md"):
        for line in re.findall(r"^    make (.*)$", document.read_text(), re.MULTILINE):
            words = re.sub(r"[A-Z]+=(\"[^\"]*\"|\S+)", "", line.partition("#")[0]).split()
            assert set(words) <= targets, line
