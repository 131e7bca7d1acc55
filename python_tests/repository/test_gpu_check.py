"""bench/gpu_check.py without a GPU: parts rehearse or are skipped by name, and none takes another one with it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from defgan_fast.kernels import extension

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_check.py"
pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the checkout"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run bench/gpu_check.py itself"),
]
needs_kernels = pytest.mark.skipif(not extension.load(), reason="the extension is not built")


@pytest.fixture
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


@needs_kernels
@pytest.mark.slow
def test_everything_runs_or_is_skipped_by_name(tmp_path):
    path = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == [
        "card", "ceilings", "build", "correctness", "sanitizer", "quality", "tests", "timings", "profile"
    ]  # fmt: skip
    skipped = {name for name, found in parts.items() if found["outcome"] == "skipped"}
    assert skipped == {"card", "ceilings", "sanitizer", "tests", "profile"}
    assert all(parts[name]["skipped"] == "torch sees no GPU" for name in skipped)
    assert all(parts[name]["backend"] == "cpu" for name in ("correctness", "quality", "timings"))
    assert len(parts["correctness"]["rows"]) >= 8  # three mappings or two of each precision, once or more
    assert [row["precision"] for row in parts["quality"]["rows"]] == ["float32", "float16", "bfloat16"]
    assert all("ms" not in row for row in parts["timings"]["rows"])  # no time without a GPU
    assert all("error" not in row for row in parts["timings"]["rows"])
    assert "rehearsed on the CPU: no GPU" in done.stdout
    assert not list(tmp_path.glob("*.partial"))


FAKE = """
import json, os, signal, sys, time
path = sys.argv[sys.argv.index("--result") + 1]
open(path, "w").write(json.dumps({"failures": [], "half": "done"}))
{then}
"""


@pytest.mark.parametrize(
    ("then", "outcome", "failure"),
    [
        ("", "passed", None),
        ("time.sleep(60)", "failed", "was ended after 2 seconds"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "failed", "ended with status -11"),
        ("os.fork() or time.sleep(60); time.sleep(60)", "failed", "was ended after 2 seconds"),
    ],
)
def test_a_part_that_fails_keeps_what_it_had_found(gpu_check, then, outcome, failure, tmp_path, monkeypatch):
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE.replace("{then}", then))
    monkeypatch.setattr(gpu_check, "__file__", str(fake))
    start = time.monotonic()
    found = gpu_check.run_part(gpu_check.PARTS[0], 2)
    assert time.monotonic() - start < 30
    assert found["half"] == "done"
    assert found["outcome"] == outcome
    assert found["failures"] == ([failure] if failure else [])


def test_an_exception_is_a_failure_with_its_words(gpu_check, tmp_path, monkeypatch):
    def broken(found):
        found["before"] = 1
        raise ValueError("no such thing")

    monkeypatch.setitem(gpu_check.CHILDREN, "card", broken)
    assert gpu_check.run_child("card", tmp_path / "r.json", 10) == 1
    assert json.loads((tmp_path / "r.json").read_text()) == {
        "failures": ["ValueError: no such thing"],
        "before": 1,
    }


def test_budgets_fit_the_time_that_is_promised(gpu_check):
    names = [part.name for part in gpu_check.PARTS]
    # The build, which everything needs, may take longer than it should: then the last parts go without.
    spent = sum(part.budget for part in gpu_check.PARTS if part.name != "build")
    assert spent <= 60 * gpu_check.MINUTES
    assert names.index("build") < names.index("correctness") < names.index("timings")


def test_the_table_has_times_and_ratios(gpu_check):
    def row(backend, images, ms):
        return {"backend": backend, "precision": "float16", "images": images, "ms": ms}

    rows = [row("defgan_fast", 1, 10.0), row("eager NCHW", 1, 90.0), row("CUDA graph", 1, 25.0)]
    rows += [row("defgan_fast", 16, 20.0), row("eager NCHW", 16, 50.0)]
    part = {"outcome": "passed", "seconds_taken": 1.0, "failures": []}
    printed = gpu_check.table({"parts": {"timings": {**part, "rows": rows}}})
    lines = {line[:44].strip(): line[44:].split() for line in printed.splitlines()}
    assert lines["defgan_fast, float16"] == ["10.00", "20.00"]
    assert lines["CUDA graph, float16"] == ["25.00", "-"]
    assert lines["float16 to eager"] == ["9.0x", "2.5x"]
    assert lines["float16 to best peer"] == ["2.5x", "2.5x"]
