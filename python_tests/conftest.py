"""What all tests share: helper modules beside this file are importable, and the random state is fixed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# The reference's small operations run slower on several threads than on one, much slower on a busy machine. Tests
# of threading set their own number.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
