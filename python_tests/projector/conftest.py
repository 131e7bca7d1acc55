"""The images that most of the projector's tests project."""

from __future__ import annotations

import pytest
from projectors import make_generator, make_images
from torch import Tensor


@pytest.fixture
def images() -> Tensor:
    return make_images(make_generator())
