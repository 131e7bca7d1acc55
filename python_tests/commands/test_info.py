"""`defgan-fast info` tells what is there, and gives a reason for what is not."""

from __future__ import annotations

import json
import platform
import re

import pytest
import torch

from defgan_fast import __version__, commands, info
from defgan_fast.kernels import extension

needs_kernels = pytest.mark.skipif(not extension.load(), reason="the extension is not built")


def test_environment_serialises_and_names_versions():
    found = info.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["defgan_fast"] == __version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads()


def test_every_backend_is_available_or_says_why_not():
    for name, backend in info.environment()["backends"].items():
        assert backend["available"] != bool(backend["reason"]), name


def test_cuda_is_absent_for_the_first_thing_that_is_missing():
    backend = info.environment()["backends"]["cuda"]
    if backend["available"]:
        pytest.skip("CUDA is there")
    if torch.version.cuda is None:
        assert backend["reason"] == f"torch {torch.__version__} is a build without CUDA"


@needs_kernels
def test_instruction_sets_of_this_machine():
    cpu = info.environment()["cpu"]
    assert cpu["instruction_sets"][0] == "baseline"
    assert cpu["active"] in cpu["instruction_sets"]


@needs_kernels
def test_the_override_is_seen(monkeypatch):
    monkeypatch.setenv("DEFGAN_CPU_ISA", "baseline")
    assert info.environment()["cpu"]["active"] == "baseline"


@needs_kernels
def test_how_the_extension_was_built():
    extension = info.environment()["extension"]
    assert extension["built"] in ("ahead of time", "on first import")
    assert extension["compiler"]
    assert extension["path"].endswith(".so")


def test_without_the_module_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(extension, "_module", None)
    absent = {"built": "absent", "reason": "no compiler", "path": None, "without_cuda": "no compiler"}
    monkeypatch.setattr(extension, "_status", absent)
    found = info.environment()
    assert found["backends"]["cpu"] == {"available": False, "reason": "no compiler"}
    assert found["backends"]["reference"]["available"]
    assert found["cpu"]["active"] is None


def test_command_prints_text(capsys):
    assert commands.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", printed, re.MULTILINE)
    for line in ("backend cpu", "backend cuda", "backend reference", "extension", "processor"):
        assert f"\n{line} " in printed


def test_command_prints_json(capsys):
    assert commands.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == info.environment().keys()
