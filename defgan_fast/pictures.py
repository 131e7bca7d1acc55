"""Makes PNG files of image tensors: grids of samples and labelled rows.

Pixels are enlarged without smoothing, because 28x28 images are looked at for their pixels, and files are
replaced atomically, because long runs overwrite the picture that somebody is looking at.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from defgan_fast.files import write_atomically

GOOD, BAD, INK, PAPER = (0, 125, 60), (200, 30, 30), (40, 40, 40), (250, 250, 248)


def to_pixels(images: torch.Tensor, value_range: tuple[float, float] = (0.0, 1.0)) -> torch.Tensor:
    """Returns [N, H, W, 3] uint8 of [N, C, H, W] in ``value_range``; one channel becomes grey, values are clipped."""
    low, high = value_range
    scaled = (images.detach().float().cpu() - low) / (high - low)
    pixels = (scaled.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def grid(
    images: torch.Tensor, columns: int, scale: int = 2, value_range: tuple[float, float] = (0.0, 1.0)
) -> Image.Image:
    """Lays [N, C, H, W] images out row by row with one dark pixel between them, then enlarges by ``scale``."""
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


def labelled_rows(
    rows: Mapping[str, torch.Tensor],
    captions: Mapping[str, Sequence[tuple[str, bool]]],
    value_range: tuple[float, float] = (0.0, 1.0),
) -> Image.Image:
    """Draws rows of images with a caption under each.

    Args:
        rows: by the name that stands before the row, images [N, C, H, W] in ``value_range``; N and the size of the
            images are the same in all rows.
        captions: for each row and image a text and whether it is good, which is green, or bad, which is red.
        value_range: (low, high) of the images.
    """
    scale, gap, margin = 3, 10, 150
    font, small = ImageFont.load_default(size=18), ImageFont.load_default(size=15)
    first = next(iter(rows.values()))
    cell_w, cell_h = first.shape[3] * scale, first.shape[2] * scale
    line = cell_h + 24 + gap
    canvas = Image.new("RGB", (margin + len(first) * (cell_w + gap) + gap, gap + len(rows) * line), PAPER)
    draw = ImageDraw.Draw(canvas)
    for r, (name, images) in enumerate(rows.items()):
        top = gap + r * line
        draw.text((margin - 14, top + cell_h // 2), name, INK, font, anchor="rm")
        for c, pixels in enumerate(to_pixels(images, value_range)):
            left = margin + c * (cell_w + gap)
            picture = Image.fromarray(pixels.contiguous().numpy())
            canvas.paste(picture.resize((cell_w, cell_h), Image.Resampling.NEAREST), (left, top))
            text, good = captions[name][c]
            colour = GOOD if good else BAD
            draw.text((left + cell_w // 2, top + cell_h + 12), text, colour, small, anchor="mm")
    return canvas


def save_png(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes ``picture`` as PNG, whole or not at all."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
