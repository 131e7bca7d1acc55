"""Importing the package never fails for want of kernels: one warning says why, and what to do; the reference runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from defgan_fast import files
from defgan_fast.kernels import build, extension

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the checkout")

IMPORT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import defgan_fast, torch
    from defgan_fast.models import Generator
    projector = defgan_fast.Projector(Generator(latent_size=4, width=2), steps=2, restarts=2)
    found = projector.project(torch.rand(2, 1, 28, 28))
assert projector.backend_for(torch.rand(1, 1, 28, 28)) == "reference"
assert found.errors.isfinite().all()
print(json.dumps([str(w.message) for w in caught if "defgan_fast runs without" in str(w.message)]))
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installation without anything built, and an empty cache, for `load`."""
    folder = tmp_path / "defgan_fast"
    folder.mkdir()
    (folder / "_csrc").symlink_to(ROOT / "csrc")
    monkeypatch.setattr(extension, "_PACKAGE", folder)
    monkeypatch.setattr(extension, "_module", None)
    monkeypatch.setattr(extension, "_tried", False)
    monkeypatch.setattr(extension, "_status", dict(extension._status))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return folder


def warning_of_load():
    """Returns the one warning of an import that finds no kernels."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not extension.load()
        assert not extension.load()
    assert extension.status()["built"] == "absent"
    (message,) = [str(w.message) for w in caught]
    assert message.startswith("defgan_fast runs without its kernels, on the much slower reference path: ")
    assert "\n" not in message
    assert extension.status()["reason"] in message
    return message


def compiler(folder, script):
    """Returns the path of a program that takes a C++ compiler's place."""
    path = folder / "fake-c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "--version' ended with 1 (no message)"),
        ("echo 'license expired' >&2; exit 3", "--version' ended with 3 (license expired)"),
    ],
)
def test_a_compiler_that_fails(package, tmp_path, monkeypatch, script, said):
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    message = warning_of_load()
    assert said in message
    assert "install g++ or clang, or name one in CXX" in message


def test_a_compiler_that_is_no_program(package, tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_text("no program\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    assert "the C++ compiler does not run: " in warning_of_load()


def test_a_compiler_that_says_its_version_and_no_more(package, tmp_path, monkeypatch, capfd):
    script = 'case "$1" in -v|--version|-dump*) exec c++ "$1";; esac; echo "x.cpp:1: error: out of order" >&2; exit 1'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    message = warning_of_load()
    assert "out of order" in message
    assert "docs/install.md" in message


@pytest.mark.parametrize("words", ["", "  ", "'c++"])
def test_an_empty_name_of_the_compiler_is_none(package, tmp_path, monkeypatch, words):
    """torch takes the first word of what is there; it is given the usual name."""
    seen = []

    def load(**_):
        seen.append(os.environ["CXX"])
        raise RuntimeError("stopped by the test")

    monkeypatch.setenv("CXX", words)
    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    assert "stopped by the test" in warning_of_load()
    assert seen == ["c++"]


def test_a_missing_compiler(package, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert "no C++ compiler: '/nonexistent/c++' was not found; install g++ or clang" in warning_of_load()


def test_a_cache_that_cannot_be_written(package, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    message = warning_of_load()
    assert str(tmp_path / "file") in message
    assert "set TORCH_EXTENSIONS_DIR to a folder that can be written" in message


def test_no_home(package, monkeypatch, tmp_path):
    """A folder named "~" in the working directory would be the alternative."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # neither HOME nor an entry in passwd
    message = warning_of_load()
    assert "no folder for caches: HOME or XDG_CACHE_HOME must be an absolute path, got ~/.cache" in message
    assert not (tmp_path / "~").exists()


def test_a_system_without_locks(package, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    assert "this system has no fcntl" in warning_of_load()


def test_sources_that_are_not_there(package):
    (package / "_csrc").unlink()
    assert "no C++ sources in " in warning_of_load()


@pytest.mark.parametrize("record", ["", "{", "[]", "null", '{"torch": 2}', '{"torch": "1.0"}'])
def test_a_damaged_record_sends_the_import_to_the_cache(package, monkeypatch, record):
    (package / "_C.so").write_bytes(b"no library")
    (package / build.BUILD_RECORD).write_text(record)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert "no C++ compiler" in warning_of_load()


@pytest.mark.parametrize("error", [ImportError("undefined symbol"), RuntimeError("registered twice")])
def test_a_library_that_does_not_load_sends_the_import_to_the_cache(package, monkeypatch, error):
    def import_module(name):
        raise error

    (package / "_C.so").touch()
    record = {"torch": torch.__version__, "cuda": False, "reason": "a build without CUDA"}
    (package / build.BUILD_RECORD).write_text(json.dumps(record))
    monkeypatch.setattr("importlib.import_module", import_module)
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert "no C++ compiler" in warning_of_load()


def test_a_library_that_was_cut_short_is_not_loaded(tmp_path):
    """The system may kill a process that loads one."""
    record = {"torch": torch.__version__, "cuda": False, "reason": "a build without CUDA"}
    (tmp_path / build.BUILD_RECORD).write_text(json.dumps(record))
    (tmp_path / "x.so").write_bytes(b"12345678")
    (tmp_path / extension._FINISHED).write_text("x.so\n8\n")
    assert extension._finished(tmp_path) == tmp_path / "x.so"
    (tmp_path / "x.so").write_bytes(b"1234")
    assert extension._finished(tmp_path) is None
    (tmp_path / "x.so").write_bytes(b"12345678")
    for text in ("", "x.so", "x.so\n\n", "absent.so\n8\n"):
        (tmp_path / extension._FINISHED).write_text(text)
        assert extension._finished(tmp_path) is None


def test_an_import_without_kernels_projects(tmp_path):
    """The whole way, in a process of its own: no fcntl and no compiler."""
    package = tmp_path / "defgan_fast"
    ignored = shutil.ignore_patterns("*.so", "_C.json", "__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "defgan_fast", package, ignore=ignored)
    (package / "_csrc").symlink_to(ROOT / "csrc")
    code = "import sys; sys.modules['fcntl'] = None\n" + IMPORT
    variables = {"PATH": str(tmp_path), "CXX": "", "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **variables, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    (message,) = json.loads(finished.stdout)
    assert "no C++ compiler: 'c++' was not found" in message
