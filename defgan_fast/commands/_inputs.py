"""The networks and images of the commands: the shipped ones, or the user's own.

A network is named by "module:factory", where the factory takes no argument and returns the module, by a weight file of
this package, or by the name of a shipped one. Images come from a data set, from a folder of PNG or JPEG files, or from
a .npy, .npz, .pt or .safetensors file.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from defgan_fast import arguments, data, files
from defgan_fast.commands import options
from defgan_fast.projector import Projector

PICTURES = (".png", ".jpg", ".jpeg")
ARRAYS = (".npy", ".npz", ".pt", ".safetensors")


class Inputs(NamedTuple):
    """Images with what is known of them.

    Attributes:
        images: [N, C, H, W] float32 in ``value_range``.
        labels: [N] int64, None where they are not known.
        value_range: (low, high).
        names: one for each image: its file, or its index.
    """

    images: Tensor
    labels: Tensor | None
    value_range: tuple[float, float]
    names: list[str]

    def needed_labels(self) -> Tensor:
        """Returns the labels; raises ValueError where there are none."""
        if self.labels is None:
            raise ValueError("--labels must be given, since --images says nothing of classes, got none")
        return self.labels


def add_data(parser: argparse.ArgumentParser, count: int) -> None:
    """Adds the options of images, of which the first ``count`` are taken by default."""
    parser.add_argument("--dataset", choices=data.DATASETS, default="digits", help="default: digits")
    options.add_root(parser)
    parser.add_argument(
        "--images",
        type=Path,
        help="instead of a data set: a folder of PNG or JPEG files (in folders named after classes where labels are"
        " needed), or a .npy, .npz, .pt or .safetensors file with images [N, C, H, W]",
    )
    parser.add_argument("--labels", type=Path, help="a .npy, .npz, .pt or .safetensors file with labels [N]")
    parser.add_argument("--count", type=int, default=count, help=f"the first so many (default: {count})")
    parser.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of pixels that are floating-point numbers (default: the data set's)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def add_projector(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a projector."""
    parser.add_argument(
        "--generator", help="module:factory or weight file (default: the one that is shipped for --dataset)"
    )
    parser.add_argument("--steps", type=int, default=200, help="L, steps of a projection (default: 200)")
    parser.add_argument("--restarts", type=int, default=10, help="R, starting points (default: 10)")
    parser.add_argument("--lr", type=float, default=10.0, help="rate of the descent (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda", "reference"), default="auto")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the option of a classifier."""
    parser.add_argument(
        "--model",
        help="classifier: module:factory or weight file (default: the one that is shipped for --dataset)",
    )


def projector_of(args: argparse.Namespace) -> Projector:
    """Returns the projector that the options describe, on their device."""
    generator = network("generator", args.generator, args.dataset).to(options.parse_device(args.device))
    return Projector(
        generator,
        steps=args.steps,
        restarts=args.restarts,
        lr=args.lr,
        seed=args.seed,
        backend=args.backend,
    )


def network(kind: str, text: str | None, dataset: str) -> nn.Module:
    """Loads a network in eval mode.

    Args:
        kind: "generator" or "classifier".
        text: what the option says, None for the shipped one.
        dataset: whose network is the shipped one.

    Raises:
        ValueError: there is no such module or factory, or it does not return a module.
        FileNotFoundError: there is no such file.
    """
    if text is None or ":" not in text or Path(text).exists():
        return options.load_network(kind, dataset, None if text is None else Path(text))
    option = "--generator" if kind == "generator" else "--model"
    module_name, _, factory_name = text.partition(":")
    # What a user has in the folder that he stands in is found, as by `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:
        raise ValueError(
            f"{option} must be module:factory, got {text} ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"{option} must make a torch.nn.Module, got {type(found).__name__} from {text}")
    return found.eval()


def images_of(args: argparse.Namespace, split: str = "test") -> Inputs:
    """Returns the images that the options name, on their device.

    Raises:
        ValueError: a file does not hold images, or labels do not fit them.
        FileNotFoundError: there is no such file.
    """
    device, count = options.parse_device(args.device), arguments.count("--count", args.count)
    value_range = data.RANGES[args.dataset] if args.value_range is None else tuple(args.value_range)
    if not value_range[0] < value_range[1]:
        raise ValueError(f"--value-range must have LOW below HIGH, got {value_range[0]:g} {value_range[1]:g}")
    if args.images is None:
        if args.labels is not None:
            raise ValueError("--labels must come with --images, got --labels alone")
        found = data.load(args.dataset, args.root, split).first(count).to(device)
        names = [str(i) for i in range(len(found))]
        return Inputs(found.images, found.labels, found.value_range, names)
    images, labels, names = _read(args.images, value_range, count)
    if args.labels is not None:
        labels = _tensor(args.labels, "labels")
        if labels.dim() != 1 or labels.is_floating_point() or len(labels) < len(images):
            raise ValueError(
                f"--labels must be whole numbers, one for each image, got {labels.dtype} {tuple(labels.shape)}"
            )
        labels = labels[: len(images)]
    if not len(images):
        raise ValueError(f"--images must hold at least one image, got none in {args.images}")
    least, most = float(images.min()), float(images.max())
    slack = 1e-5 * (value_range[1] - value_range[0])
    if not (value_range[0] - slack <= least and most <= value_range[1] + slack):
        raise ValueError(
            f"--images must lie in --value-range [{value_range[0]:g}, {value_range[1]:g}], got [{least:g}, {most:g}]"
        )
    moved = None if labels is None else labels.to(device, torch.int64)
    return Inputs(images.to(device), moved, value_range, names)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a .npz file whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    files.write_atomically(path, buffer.getvalue())


def _read(
    path: Path, value_range: tuple[float, float], count: int
) -> tuple[Tensor, Tensor | None, list[str]]:
    """Returns images in the range, labels where there are some, and names."""
    if path.is_dir():
        return _folder(path, value_range, count)
    images = _tensor(path, "images")[:count]
    if images.dim() == 3:
        images = images[:, None]  # grey images without a dimension for their one channel
    if images.dim() != 4:
        raise ValueError(f"--images must hold images [N, C, H, W], got {tuple(images.shape)} in {path}")
    if images.dtype == torch.uint8:
        images = data.to_range(images, value_range)
    elif not images.is_floating_point():
        raise ValueError(f"--images must hold bytes or floating-point numbers, got {images.dtype} in {path}")
    labels = None
    if path.suffix != ".npy":
        kept = _content(path)
        labels = kept["labels"][:count] if isinstance(kept, dict) and "labels" in kept else None
    return images.float(), labels, [str(i) for i in range(len(images))]


def _folder(
    path: Path, value_range: tuple[float, float], count: int
) -> tuple[Tensor, Tensor | None, list[str]]:
    """Returns the pictures of a folder by name; where they lie in folders of their own, these name the classes."""
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"--images must hold PNG or JPEG files, got none in {path}")
    classes = sorted({file.parent.name for file in found if file.parent != path})
    # Numbers are classes themselves; other names are counted in their order.
    number = {
        name: int(name) if all(each.isdigit() for each in classes) else i for i, name in enumerate(classes)
    }
    pixels = []
    for file in found[:count]:
        try:
            with Image.open(file) as picture:
                array = np.asarray(picture.convert("L" if picture.mode in ("1", "L", "I;16") else "RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} must be a PNG or JPEG picture ({error})") from None
        pixels.append(torch.from_numpy(array.copy()).view(*array.shape[:2], -1).permute(2, 0, 1))
    shapes = {tuple(each.shape) for each in pixels}
    if len(shapes) > 1:
        raise ValueError(f"--images must have pictures of one size and mode, got {sorted(shapes)} in {path}")
    inside = all(file.parent != path for file in found)
    labels = torch.tensor([number[file.parent.name] for file in found[:count]]) if inside else None
    return (
        data.to_range(torch.stack(pixels), value_range),
        labels,
        [str(file.relative_to(path)) for file in found[:count]],
    )


def _tensor(path: Path, name: str) -> Tensor:
    """Returns the tensor of a file: the only one, or the one of that name."""
    kept = _content(path)
    if isinstance(kept, dict):
        if name not in kept and len(kept) != 1:
            raise ValueError(
                f"--{name} must hold one array, or one named {name!r}, got {', '.join(kept)} in {path}"
            )
        kept = kept.get(name, next(iter(kept.values())))
    if not isinstance(kept, Tensor):
        raise ValueError(f"--{name} must hold a tensor, got {type(kept).__name__} in {path}")
    return kept


def _content(path: Path) -> Any:
    """Returns a tensor, or tensors by name."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix not in ARRAYS:
        raise ValueError(f"{path} must be a folder or end in {', '.join(ARRAYS)}")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as kept:
                # Text, such as names, is no tensor.
                return {key: torch.from_numpy(kept[key]) for key in kept if kept[key].dtype.kind in "biuf"}
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        from safetensors.torch import load

        return load(path.read_bytes())
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        EOFError,
        UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())[:200]})") from None
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise ValueError(f"{path} cannot be read ({error})") from None
        raise
