"""How the extension is built: sources and flags, the cache of what was built, whether CUDA kernels are part of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import types
from pathlib import Path

import pytest
import torch

from defgan_fast.kernels import build, extension

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

in_checkout = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the checkout")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@in_checkout
def test_objects_do_not_overwrite_each_other(tmp_path):
    # A build on first import puts all objects in one folder under the name of their source.
    sources = build.source_files(CSRC, cuda=True)
    names = {extension._under_its_own_name(path, CSRC, tmp_path).stem for path in sources}
    assert len(names) == len(sources) > 3


@in_checkout
def test_builds_with_cuda_have_more_sources():
    plain, cuda = set(build.source_files(CSRC)), set(build.source_files(CSRC, cuda=True))
    assert {path.name for path in cuda - plain} == {
        "nearest_op_cuda.cpp",
        "project_op_cuda.cpp",
        *(path.name for path in build.cuda_source_files(CSRC)),
    }
    assert plain < cuda <= set(build.shipped_files(CSRC))


@in_checkout
def test_fingerprint_follows_sources_headers_and_flags(tmp_path, monkeypatch):
    copy = tmp_path / "csrc"
    shutil.copytree(CSRC, copy)
    before = build.fingerprint(copy)
    assert before == build.fingerprint(CSRC)
    (copy / "tests" / "test_more.cpp").parent.mkdir(exist_ok=True)
    (copy / "tests" / "test_more.cpp").write_text("int main() {}\n")
    assert build.fingerprint(copy) == before
    with (copy / "plan.h").open("a") as header:
        header.write("// changed\n")
    assert build.fingerprint(copy) != before
    for name in ("COMPILE_FLAGS", "NVCC_FLAGS"):
        monkeypatch.setattr(build, name, [*getattr(build, name), "-g"])
        assert build.fingerprint(CSRC) != before
        monkeypatch.undo()


@in_checkout
def test_cache_key_follows_torch(monkeypatch):
    before = extension._cache_key(CSRC)
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu999")
    assert "torch2.99.0_cu999" in extension._cache_key(CSRC) != before


def test_cache_key_follows_the_toolkit_and_the_architectures(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    keys = {extension._cache_key(CSRC)}
    for name, value in (("CUDA_HOME", "/cuda"), ("TORCH_CUDA_ARCH_LIST", "9.0"), ("PATH", "/nowhere")):
        monkeypatch.setenv(name, value)
        keys.add(extension._cache_key(CSRC))
    assert len(keys) >= 3
    monkeypatch.setattr(torch.version, "cuda", None)
    before = extension._cache_key(CSRC)
    monkeypatch.setenv("CUDA_HOME", "/other")
    assert extension._cache_key(CSRC) == before


RECORD = {"torch": torch.__version__, "cuda": False, "reason": "a build without CUDA"}
DAMAGED = "the record of its build is missing or damaged"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (RECORD, None),
        (RECORD | {"torch": build.release(torch.__version__) + "+cu999"}, None),
        (RECORD | {"torch": "2.0.1"}, "it was built for torch 2.0.1, and torch"),
        ({}, DAMAGED),
        ([], DAMAGED),
        ("", DAMAGED),
        (RECORD | {"torch": 2}, DAMAGED),
        ({"torch": torch.__version__}, DAMAGED),  # of an older version, which did not say whether it has CUDA
        (None, DAMAGED),
    ],
)
def test_a_module_built_for_another_torch_is_not_loaded(record, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "_PACKAGE", tmp_path)
    if record is not None:
        (tmp_path / build.BUILD_RECORD).write_text(json.dumps(record))
    misfit = extension._misfit()
    assert misfit is None if reason is None else reason in (misfit or "")


@pytest.mark.parametrize(
    ("torch_cuda", "home", "nvcc", "sources", "reason"),
    [
        (None, "/usr/local/cuda", "13.0", 3, "torch 2.13.0 is a build without CUDA"),
        ("13.0", "/usr/local/cuda", "13.0", 0, "has no CUDA kernels"),
        ("13.0", None, None, 3, "no toolkit was found (set CUDA_HOME)"),
        ("13.0", "/usr/local/cuda", None, 3, "nvcc does not run in /usr/local/cuda"),
        ("13.0", "/usr/local/cuda", "12.8", 3, "nvcc is of CUDA 12.8 but torch was built for CUDA 13.0"),
        ("13.0", "/usr/local/cuda", "13.2", 3, None),
    ],
)
def test_cuda_is_decided_by_torch_and_toolkit(torch_cuda, home, nvcc, sources, reason):
    found = build.why_without_cuda("2.13.0", torch_cuda, home, nvcc, sources)
    assert found is None if reason is None else reason in (found or "")


def fake_toolkit(folder, release="13.0"):
    """Returns a folder whose nvcc says its version and no more."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    return folder


@in_checkout
def test_a_decision_for_cuda_names_toolkit_and_architectures(tmp_path, monkeypatch):
    home = fake_toolkit(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(build, "visible_capabilities", lambda: ["9.0"])
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    decision = build.decide_cuda(CSRC, "2.13.0", "13.0")
    assert decision == build.Decision(True, f"CUDA 13.0 in {home}", str(home), "9.0+PTX")
    assert decision.record("2.13.0") == {
        "torch": "2.13.0",
        "cuda": True,
        "reason": decision.reason,
        "architectures": "9.0+PTX",
    }
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build.decide_cuda(CSRC, "2.13.0", "13.0").architectures == "8.0"
    decision = build.decide_cuda(tmp_path, "2.13.0", "13.0")
    assert decision == build.Decision(False, "this version of defgan_fast has no CUDA kernels")
    assert decision.record("2.13.0").keys() == {"torch", "cuda", "reason"}


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, "c++"),
        ("", "c++"),
        (" ", "c++"),
        ("'g++", "c++"),
        ("g++-13", "g++-13"),
        ("ccache g++", "ccache"),
    ],
)
def test_the_compiler_is_the_first_word_of_its_variable(variable, expected, monkeypatch):
    if variable is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", variable)
    assert build.compiler() == expected


@pytest.mark.parametrize(
    ("nvcc", "capabilities", "expected"),
    [
        ("13.0", [], "8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("12.6", [], "8.0;8.6;8.9;9.0+PTX"),
        ("13.0", ["9.0", "9.0"], "9.0+PTX"),
        ("13.0", ["8.6", "9.0"], "8.6;9.0+PTX"),
        ("13.0", ["8.7", "10.3"], "8.6;10.0+PTX"),  # machine code runs on later minor versions
        ("12.6", ["12.0"], "9.0+PTX"),  # newer than the toolkit: from PTX
        ("13.0", ["7.5"], "8.0;8.6;8.9;9.0;10.0;12.0+PTX"),  # too old for any kernel
    ],
)
def test_architectures_are_those_in_sight_or_all_that_the_toolkit_knows(nvcc, capabilities, expected):
    assert build.architecture_list(nvcc, capabilities) == expected


def test_the_toolkit_is_found_behind_a_script(tmp_path, monkeypatch):
    """The nvcc on PATH may call another one: the folder above it then has no headers."""
    home, scripts = tmp_path / "cuda", tmp_path / "scripts"
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    scripts.mkdir()
    (scripts / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={home}/bin/..' >&2\n")
    (scripts / "nvcc").chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(scripts), prepend=os.pathsep)
    assert build.cuda_home() == str(home)
    monkeypatch.setenv("CUDA_PATH", "/elsewhere")
    assert build.cuda_home() == "/elsewhere"


def test_capabilities_are_asked_of_the_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.visible_capabilities() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 9.0; echo 8.6\n")
    tool.chmod(0o755)
    assert build.visible_capabilities() == ["9.0", "8.6"]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert build.visible_capabilities() == []


@pytest.mark.parametrize("fails", [True, False])
def test_cuda_that_does_not_compile_costs_no_more_than_cuda(fails, tmp_path, monkeypatch, capsys):
    """Building on first import goes on without the kernels for GPUs, and says why there are none."""
    module = types.ModuleType("defgan_fast_C")
    tried = []

    def compile_(csrc, folder, decision):
        tried.append(decision.use)
        library = folder / f"defgan_fast_C_v{len(tried)}.so"
        if decision.use and fails:
            raise RuntimeError("Error building extension\nhost.h:3: error: unsupported GNU version")
        library.touch()
        module.__file__ = str(library)
        return module

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    decided = build.Decision(True, "CUDA 13.0 in /cuda", "/cuda", "9.0+PTX")
    monkeypatch.setattr(build, "decide_cuda", lambda *_: decided)
    monkeypatch.setattr(extension, "_compile", compile_)
    monkeypatch.setattr(extension, "_import_file", lambda library: library)
    assert extension._on_first_import() is module
    assert tried == ([True, False] if fails else [True])
    folder = Path(module.__file__).parent
    status = extension._told("on first import", "", module, folder)
    why = "compiling them failed: host.h:3: error: unsupported GNU version"
    assert status["without_cuda"] == (why if fails else None)
    assert (why in capsys.readouterr().err) == fails
    assert str(extension._on_first_import()) == module.__file__  # the next import finds what was built


def test_nvcc_version_is_read_from_what_it_prints(tmp_path):
    assert build.nvcc_version(str(tmp_path)) is None
    nvcc = fake_toolkit(tmp_path) / "bin" / "nvcc"
    assert build.nvcc_version(str(tmp_path)) == "13.0"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert build.nvcc_version(str(tmp_path)) is None


def test_an_error_is_told_by_the_line_that_says_most():
    ninja = "Error building extension 'x': [1/2] c++ ...\na.cpp:3:1: error: no such thing\nninja: stopped"
    assert extension._one_line(RuntimeError(ninja)) == "a.cpp:3:1: error: no such thing"
    assert extension._one_line(RuntimeError("first\nsecond")) == "first"
    assert extension._one_line(ImportError()) == "ImportError"


@in_checkout
def test_sources_include_only_what_is_shipped():
    """An installed package compiles on first import from the shipped files alone; a GPU's code includes others."""
    shipped = set(build.shipped_files(CSRC))
    todo = list(build.source_files(CSRC))
    seen = set(todo)
    while todo:
        path = todo.pop()
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            included = (path.parent / name).resolve()
            if not included.is_file():
                included = CSRC.resolve() / name
            assert included in {other.resolve() for other in shipped}, (
                f"{path} includes {name}, which is not shipped"
            )
            if included not in seen:
                seen.add(included)
                todo.append(included)
