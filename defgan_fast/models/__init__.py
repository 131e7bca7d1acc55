"""The networks of the paper: generators, critic, classifiers A to F and MagNet's autoencoder (appendix C).

Models know nothing of training. Each keeps the arguments it was built with as ``config``, a dictionary that
serialises to JSON, so that a weight file can say how to rebuild the module that it belongs to.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from defgan_fast.models._layers import to_channels_last
from defgan_fast.models.autoencoder import Autoencoder
from defgan_fast.models.classifier import Classifier
from defgan_fast.models.critic import Critic
from defgan_fast.models.generator import CelebaGenerator, Generator

__all__ = [
    "Autoencoder",
    "CelebaGenerator",
    "Classifier",
    "Critic",
    "Generator",
    "build",
    "to_channels_last",
]

_CLASSES: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (Autoencoder, CelebaGenerator, Classifier, Critic, Generator)
}


def build(name: str, config: dict[str, Any]) -> nn.Module:
    """Build the model class called ``name`` from its ``config``.

    Raises:
        ValueError: no such class, or arguments that it does not take.
    """
    if name not in _CLASSES:
        raise ValueError(f"model must be one of {', '.join(sorted(_CLASSES))}, got {name!r}")
    try:
        return _CLASSES[name](**config)
    except TypeError as error:
        raise ValueError(f"config does not fit model {name}: {error}") from None
