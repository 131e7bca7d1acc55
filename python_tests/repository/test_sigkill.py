"""SIGKILL at any moment loses nothing that was finished; `python bench/sigkill.py` tries a hundred moments."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "sigkill.py"
JOBS = ("training", "cache")


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the checkout")
@pytest.mark.parametrize("job", JOBS)
def test_five_moments(job, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = importlib.util.spec_from_file_location("sigkill", SCRIPT)
    sigkill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sigkill)
    found = sigkill.check(job, 5, folder=tmp_path)
    assert found["kills"] >= 5
    assert found["ended"] >= 1
