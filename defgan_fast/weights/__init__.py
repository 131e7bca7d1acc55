"""Weight files: safetensors with a card in the header that says what they are and how they came to be.

The header holds the model's class and constructor arguments, so that a file alone rebuilds its module, and
the card: the command, the seed, the hash of the data, the measured quality, the versions. Files are written
whole or not at all. The weights shipped with the package lie beside this file, named ``<name>_generator``
and ``<name>_classifier``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from torch import nn

from defgan_fast import files, models
from defgan_fast.finite import non_finite

FOLDER = Path(__file__).parent
SUFFIX = ".safetensors"
FORMAT = "defgan_fast 1"


def load_generator(name_or_path: str | os.PathLike[str]) -> nn.Module:
    """Loads a trained generator, in eval mode on the CPU.

    Args:
        name_or_path: "digits", "mnist" or "fashion_mnist", which are shipped, or the path of a weight file.

    Returns:
        The module, latents [N, k] -> images [N, C, H, W].

    Raises:
        FileNotFoundError: no such shipped generator (the message says which there are and how to train
            one), or no such file.
        ValueError: the file is truncated, was not written by :func:`save`, or is not a generator's.
    """
    return _load(name_or_path, "generator")


def load_classifier(name_or_path: str | os.PathLike[str]) -> nn.Module:
    """Loads a trained classifier, in eval mode on the CPU; arguments and errors as for :func:`load_generator`."""
    return _load(name_or_path, "classifier")


def load_autoencoder(path: str | os.PathLike[str]) -> nn.Module:
    """Loads a trained autoencoder of MagNet, in eval mode on the CPU; none is shipped, errors as above."""
    return _load(path, "autoencoder")


def shipped(kind: str) -> list[str]:
    """Returns the names of the shipped weights of one kind, "generator" or "classifier"."""
    ending = f"_{kind}{SUFFIX}"
    return sorted(path.name[: -len(ending)] for path in FOLDER.glob("*" + ending))


def save(
    module: nn.Module,
    path: str | os.PathLike[str],
    card: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the module's weights with its card, whole or not at all.

    Args:
        module: one of :mod:`defgan_fast.models`, which keep their constructor arguments as ``config``.
        path: the file, by custom ending in ``.safetensors``; its folder is made if need be.
        card: what there is to know about the weights; must serialise to JSON.
        dtype: floating-point type to store them in (default: their own). Loading converts them back to
            float32, so that float16 only halves the file and rounds.

    Raises:
        TypeError: the module is none of this package's models, or the card does not serialise.
        ValueError: a weight is not finite, or is not in ``dtype``; the message names it.
        OSError: the folder cannot be written.
    """
    config = getattr(module, "config", None)
    if not isinstance(config, dict):
        raise TypeError(f"module must be one of defgan_fast.models, got {type(module).__name__}")
    metadata = {
        "format": FORMAT,
        "model": type(module).__name__,
        "config": json.dumps(config),
        "card": json.dumps(card),
    }
    tensors = {}
    for key, value in module.state_dict().items():
        stored = value.detach().cpu().contiguous()
        tensors[key] = stored.to(dtype) if dtype is not None and stored.is_floating_point() else stored
    bad = non_finite(tensors.items())
    if bad is not None:
        raise ValueError(f"module must have finite weights to be saved to {path}, got {bad}")
    files.write_atomically(path, serialise(tensors, metadata=metadata))


def read_card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the card of a weight file; errors as for :func:`load_generator`."""
    try:
        card = json.loads(_read(Path(path))[0]["card"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has no card, or a damaged one ({_shortened(error)})") from None
    if not isinstance(card, dict):
        raise ValueError(f"{path} must have a dictionary for its card, got {type(card).__name__}")
    return card


def _load(name_or_path: str | os.PathLike[str], kind: str) -> nn.Module:
    path = _resolve(name_or_path, kind)
    metadata, tensors = _read(path)
    name = metadata.get("model", "nothing")
    if not name.lower().endswith(kind):
        raise ValueError(f"{path} must hold a {kind}, got a {name}")
    bad = non_finite(tensors.items())
    if bad is not None:
        raise ValueError(f"{path} must hold finite weights, got {bad}")
    config = metadata.get("config", "")
    _check_shapes(path, name, config, tensors)
    module = models.build(name, json.loads(config))
    module.load_state_dict(tensors)
    return module.eval()


def _check_shapes(path: Path, name: str, config: str, tensors: dict[str, torch.Tensor]) -> None:
    """Checks that a file's tensors are those of the module that its header describes.

    The module is built without memory for its weights, since a damaged header may ask for any amount.

    Raises:
        ValueError: the header is damaged, or the file's tensors are not those of the module.
    """
    try:
        with torch.device("meta"):
            module = models.build(name, json.loads(config))
        expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    except Exception as error:  # whatever a constructor may say to arguments of any type
        raise ValueError(
            f"{path} has a damaged header: {type(error).__name__}: {_shortened(error)}"
        ) from None
    for key in sorted(expected.keys() | tensors.keys()):
        found = tuple(tensors[key].shape) if key in tensors else None
        if found != expected.get(key):
            raise ValueError(
                f"{path} does not fit its own header: {key} must have shape {_shape(expected.get(key))}, "
                f"got {_shape(found)}"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none (no such tensor)" if shape is None else str(list(shape))


def _shortened(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _resolve(name_or_path: str | os.PathLike[str], kind: str) -> Path:
    text = os.fspath(name_or_path)
    if text.endswith(SUFFIX) or os.sep in text or not isinstance(name_or_path, str):
        return Path(text)
    path = FOLDER / f"{text}_{kind}{SUFFIX}"
    if not path.is_file():
        job = {"generator": "gan", "autoencoder": "magnet"}.get(kind, kind)
        raise FileNotFoundError(
            f"no {kind} named {text!r} is shipped, there are: {', '.join(shipped(kind)) or 'none'}; "
            f"train one with: defgan-fast train {job} --dataset {text}"
        )
    return path


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and what its binding raises beside it
        raise ValueError(f"{path} is truncated or not a safetensors file ({_shortened(error)})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by defgan_fast: expected format {FORMAT!r} in its header, "
            f"got {metadata.get('format')!r}"
        )
    return metadata, tensors
