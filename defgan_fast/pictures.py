"""Image tensors to PNG files: grids of samples and labelled rows.

Pixels are enlarged without smoothing, because 28x28 images are looked at for their pixels, and files are
replaced atomically, because long runs overwrite the picture that somebody is looking at.
"""

from __future__ import annotations

import io
import os

import torch
from PIL import Image

from defgan_fast.files import write_atomically


def to_pixels(images: torch.Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> torch.Tensor:
    """[N, C, H, W] in ``value_range`` to [N, H, W, 3] uint8; one channel becomes grey, values are clipped."""
    low, high = value_range
    scaled = (images.detach().float().cpu() - low) / (high - low)
    pixels = (scaled.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def grid(
    images: torch.Tensor, columns: int, scale: int = 2, value_range: tuple[float, float] = (0.0, 1.0)
) -> Image.Image:
    """Lay [N, C, H, W] images out row by row with one dark pixel between them, then enlarge by ``scale``."""
    pixels = to_pixels(images, value_range)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 40, dtype=torch.uint8)
    for index in range(count):
        top = index // columns * (height + 1) + 1
        left = index % columns * (width + 1) + 1
        canvas[top : top + height, left : left + width] = pixels[index]
    picture = Image.fromarray(canvas.numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def save_png(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write ``picture`` as PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
