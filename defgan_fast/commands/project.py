"""``defgan-fast project``: replaces images by the nearest ones that a generator makes."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from defgan_fast import files, pictures, progress
from defgan_fast.commands import _inputs, options
from defgan_fast.evaluation.projection import fixed_group

COLUMNS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``project``."""
    _inputs.add_data(parser, 100)
    _inputs.add_projector(parser)
    parser.add_argument("--out", type=Path, default=Path("out") / "project", help="default: out/project")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Projects, and writes ``projection.npz``, a picture and the report."""
    options.check_writable(args.out)
    projector, found = _inputs.projector_of(args), _inputs.images_of(args)
    parts = []
    with progress.bar(len(found.images), "projections", "image") as bar, torch.no_grad():
        for images in found.images.split(fixed_group(projector)):
            parts.append(projector.project(images))
            bar.update(len(images))
    kept = ("images", "latents", "errors", "restarts", "all_errors")
    arrays = {name: torch.cat([getattr(part, name) for part in parts]).cpu().numpy() for name in kept}
    _inputs.write_arrays(args.out / "projection.npz", {"names": np.array(found.names), **arrays})
    shown = min(COLUMNS, len(found.images))
    captions = [(f"{error:.4f}", True) for error in arrays["errors"][:shown].tolist()]
    rows = {"image": found.images[:shown], "projection": torch.from_numpy(arrays["images"][:shown])}
    names = {"image": [(name[-8:], True) for name in found.names[:shown]], "projection": captions}
    pictures.save_png(pictures.labelled_rows(rows, names, found.value_range), args.out / "projection.png")
    report = {
        "images": len(found.images),
        "steps": args.steps,
        "restarts": args.restarts,
        "seed": args.seed,
        "backend": projector.backend_for(found.images),
        "precision": projector.precision_for(found.images),
        "mean_error": float(arrays["errors"].astype(np.float64).mean()),
    }
    files.write_json(args.out / "report.json", report)
    print(f"{len(found.images)} images, mean squared error {report['mean_error']:.5f}")
    print("\n".join(str(args.out / name) for name in ("projection.npz", "projection.png", "report.json")))
    return 0
