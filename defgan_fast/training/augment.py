"""Random small affine maps of the training images: shift, rotation, zoom and shear.

The digits have 1,297 training images. A critic learns them by heart within a few thousand steps, after which
the generator learns single images and not handwriting; small deformations are what handwriting does anyway.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SHIFT_PX = 1.0
ROTATION = math.radians(6)
ZOOM = 0.06
SHEAR = 0.08


def random_affine(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Deform every image by its own random affine map, bilinearly, zeros outside.

    Args:
        images: [N, C, H, W] float32, black (0) at the border.
        strength: multiplies the largest deformation; 0 returns the images as they are.
        generator: source of the random numbers, on the CPU.

    Returns:
        [N, C, H, W], same dtype and device.
    """
    if strength == 0:
        return images
    count, _, height, width = images.shape
    draws = torch.rand(count, 6, generator=generator) * 2 - 1
    angle = draws[:, 0] * ROTATION * strength
    zoom_x = 1 + draws[:, 1] * ZOOM * strength
    zoom_y = 1 + draws[:, 2] * ZOOM * strength
    shear = draws[:, 3] * SHEAR * strength
    cos, sin = angle.cos(), angle.sin()
    theta = torch.empty(count, 2, 3)
    theta[:, 0, 0] = zoom_x * cos
    theta[:, 0, 1] = zoom_x * (shear * cos - sin)
    theta[:, 1, 0] = zoom_y * sin
    theta[:, 1, 1] = zoom_y * (shear * sin + cos)
    # Coordinates run from -1 to 1, so that a pixel is 2 / size.
    theta[:, 0, 2] = draws[:, 4] * strength * SHIFT_PX * 2 / width
    theta[:, 1, 2] = draws[:, 5] * strength * SHIFT_PX * 2 / height
    positions = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, positions, align_corners=False)
