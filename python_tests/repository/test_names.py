"""Each file of tests has a name of its own: pytest imports them by their names alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_no_two_files_of_tests_share_a_name():
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("folder", ["csrc", "bench"])
def test_no_two_sources_share_a_name(folder):
    """A reader finds a file by its name, and a build keeps all objects under the names of their sources."""
    root = TESTS.parent / folder
    found = (path for path in root.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))
    names = Counter(path.name for path in found)
    assert [name for name, count in names.items() if count > 1] == []
