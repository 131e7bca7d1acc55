"""The package installs beside an existing torch in each of three ways, and works from outside the checkout.

Virtual environments here see this interpreter's packages through a path file, so that torch is not installed
again; the package itself is theirs alone. A module `torch` that cannot be imported stands for pip's isolated
build environment, where torch is not visible.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from defgan_fast import __version__
from defgan_fast.kernels import build, extension

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

in_checkout = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the checkout")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

# Prints what the tests look at, from whichever installation the interpreter finds.
PROJECT = """
import json, os, warnings
os.environ.pop("DEFGAN_CPU_ISA", None)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import defgan_fast
    import defgan_fast.kernels.extension
    import torch
    from defgan_fast.models import Generator
    torch.manual_seed(0)
    projector = defgan_fast.Projector(Generator(latent_size=16, width=4), steps=3, restarts=2)
    images = torch.rand(2, 1, 28, 28)
    found = projector.project(images)
print(json.dumps({
    "file": defgan_fast.__file__,
    "status": defgan_fast.kernels.extension.status(),
    "warnings": [str(w.message) for w in caught if "reference path" in str(w.message)],
    "backend": projector.backend_for(images),
    "errors": [e.hex() for e in found.errors.tolist()],
}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Returns a copy of the checkout without anything that was built in it, so that builds leave no trace there."""
    target = tmp_path_factory.mktemp("source") / "defgan-fast"
    built = shutil.ignore_patterns(
        "*.so", "_C.json", "_csrc", "__pycache__", "*.egg-info", ".*", "build", "out"
    )
    shutil.copytree(ROOT, target, ignore=built)
    return target


@pytest.fixture
def environment(tmp_path):
    """Returns the interpreter of an empty virtual environment that sees this one's packages."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(own, "packages_of_the_tests.pth").write_text("\n".join(paths) + "\n")
    return python


@pytest.fixture
def no_torch(tmp_path):
    """Returns environment variables under which torch cannot be imported."""
    (tmp_path / "no_torch").mkdir()
    (tmp_path / "no_torch" / "torch.py").write_text("raise ImportError('not visible here')\n")
    return {"PYTHONPATH": str(tmp_path / "no_torch")}


def run(command, cwd, **variables):
    """Runs a command without the variables that lead back to the checkout; returns the finished process."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX")}
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def install(python, source, **variables):
    """Runs `pip install .` without dependencies and without the index."""
    pip = [
        python,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--ignore-installed",
    ]
    run([*pip, source], source, **variables)


def project(python, cwd, **variables):
    """Returns what PROJECT prints, and its stderr."""
    finished = run([python, "-c", PROJECT], cwd, **variables)
    return json.loads(finished.stdout), finished.stderr


@in_checkout
@pytest.mark.slow
def test_source_install_without_compiler_runs_the_reference_with_one_warning(
    source, environment, no_torch, tmp_path
):
    install(environment, source, **no_torch)
    variables = {"CXX": "/nonexistent/c++", "TORCH_EXTENSIONS_DIR": tmp_path / "cache"}
    found, _ = project(environment, tmp_path, **variables)
    assert not Path(found["file"]).is_relative_to(ROOT)
    assert found["status"]["built"] == "absent"
    assert "no C++ compiler: '/nonexistent/c++' was not found" in found["status"]["reason"]
    assert len(found["warnings"]) == 1
    assert "no C++ compiler" in found["warnings"][0]
    assert found["backend"] == "reference"
    finished = run([environment, "-m", "defgan_fast", "info"], tmp_path, **variables)
    assert "backend cpu        absent: no C++ compiler" in finished.stdout


@in_checkout
@needs_compiler
@pytest.mark.slow
def test_source_install_compiles_on_first_import_and_only_then(source, environment, no_torch, tmp_path):
    install(environment, source, **no_torch)
    cache = tmp_path / "cache"
    key = extension._cache_key(CSRC)
    # What a build that was killed leaves behind: torch's lock file would make the next one wait for ever.
    (cache / f"defgan_fast_C-{key}").mkdir(parents=True)
    (cache / f"defgan_fast_C-{key}" / "lock").touch()
    first, said = project(environment, tmp_path, TORCH_EXTENSIONS_DIR=cache)
    assert first["status"]["built"] == "on first import", first["status"]
    assert Path(first["status"]["path"]).parent.name == f"defgan_fast_C-{key}"
    assert "compiling the kernels" in said
    assert first["backend"] == "cpu"
    assert first["warnings"] == []

    again, said = project(environment, tmp_path, TORCH_EXTENSIONS_DIR=cache, CXX="/nonexistent/c++")
    assert again == first
    assert "compiling" not in said

    if extension.load():
        here, _ = project(sys.executable, ROOT)
        assert here["errors"] == first["errors"]


@in_checkout
@needs_compiler
@pytest.mark.slow
def test_install_beside_torch_builds_ahead_of_time(source, environment, tmp_path):
    install(environment, source)
    empty = tmp_path / "cache"
    found, said = project(environment, tmp_path, TORCH_EXTENSIONS_DIR=empty, CXX="/nonexistent/c++")
    assert not Path(found["file"]).is_relative_to(ROOT)
    assert found["status"]["built"] == "ahead of time"
    assert found["backend"] == "cpu"
    assert found["warnings"] == []
    assert "compiling" not in said
    assert not empty.exists()


@in_checkout
@pytest.mark.slow
def test_install_beside_torch_without_compiler_still_installs_the_sources(source, environment, tmp_path):
    install(environment, source, CXX="/nonexistent/c++")
    variables = {"CXX": "/nonexistent/c++", "TORCH_EXTENSIONS_DIR": tmp_path / "cache"}
    found, _ = project(environment, tmp_path, **variables)
    assert found["status"]["built"] == "absent"
    assert len(found["warnings"]) == 1
    assert found["backend"] == "reference"


@in_checkout
@pytest.mark.slow
def test_wheel_holds_what_it_needs_and_nothing_built(source, no_torch, tmp_path):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        tmp_path,
    ]
    run([*pip, source], source, **no_torch)
    (wheel,) = tmp_path.glob("defgan_fast-*.whl")
    assert wheel.name == f"defgan_fast-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"defgan_fast/_csrc/{path.relative_to(CSRC).as_posix()}" for path in build.shipped_files(CSRC)}
    assert shipped <= names
    assert {"defgan_fast/py.typed", "defgan_fast/_C.pyi", "defgan_fast/commands/demo.py"} <= names
    weights = {f"defgan_fast/weights/{path.name}" for path in ROOT.glob("defgan_fast/weights/*.safetensors")}
    assert weights <= names
    assert not [name for name in names if name.endswith((".so", ".o", "_C.json")) or "/tests/" in name]


@in_checkout
@pytest.mark.slow
def test_source_distribution_can_be_built_from(source, no_torch, tmp_path):
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path], source, **no_torch)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {f"csrc/{path.relative_to(CSRC).as_posix()}" for path in build.shipped_files(CSRC)} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "Makefile", "CMakeLists.txt", "README.md"} <= names


def test_metadata_has_the_version_of_the_package():
    assert importlib.metadata.version("defgan-fast") == __version__
