"""Defense-GAN, fast: images are projected onto the range of a generator before they are classified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .candidates import sure_candidates
from .detector import Detector
from .plan import LoweringError
from .projector import Projection, Projector
from .vote import Vote

if TYPE_CHECKING:
    from .weights import load_classifier, load_generator

__all__ = [
    "Detector",
    "LoweringError",
    "Projection",
    "Projector",
    "Vote",
    "__version__",
    "load_classifier",
    "load_generator",
    "sure_candidates",
]


def __getattr__(name: str) -> Any:
    # safetensors and the models are imported when first asked for: importing the projector stays quick.
    if name in ("load_generator", "load_classifier"):
        from . import weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
