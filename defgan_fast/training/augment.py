"""Random deformations and corruptions of training images.

The digits have 1,297 training images. A critic learns them by heart within a few thousand steps, after which
the generator learns single images and not handwriting; small deformations are what handwriting does anyway.
Corruptions are for classifiers: reconstructions of attacked images are paler than the images that they were
trained on, and blotched.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SHIFT_PX = 1.0
ROTATION = math.radians(6)
ZOOM = 0.06
SHEAR = 0.08
# Largest grey added to the background, and largest part of the contrast taken away.
BACKGROUND = 0.3
PALENESS = 0.5
# Largest standard deviation of added noise, and the sizes in pixels of its squares of one value.
NOISE = 0.3
GRAINS = (1, 2, 4)


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


def random_corruption(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Make every image paler by its own random amount, then add noise of its own amount and grain.

    Args:
        images: [N, C, H, W] float32 in [0, 1].
        strength: multiplies the largest change; 0 returns the images as they are.
        generator: source of the random numbers, on the CPU.

    Returns:
        [N, C, H, W] in [0, 1], same dtype and device.
    """
    if strength == 0:
        return images
    return random_noise(random_contrast(images, strength, generator), strength, generator)


def random_contrast(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """low + (high - low) * x with a random low and high for every image, both in [0, 1]."""
    draws = torch.rand(2, len(images), 1, 1, 1, generator=generator).to(images)
    low = draws[0] * min(BACKGROUND * strength, 1.0)
    return low + (1 - draws[1] * min(PALENESS * strength, 1.0)) * (1 - low) * images


def random_noise(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Add a random field of one of three grains, from single pixels to squares of four, and clip."""
    count, channels, height, width = images.shape
    grain = torch.randint(len(GRAINS), (count,), generator=generator)
    noise = torch.empty(count, channels, height, width)
    for index, size in enumerate(GRAINS):
        # Drawn for all images, so that the numbers used do not depend on the grains.
        coarse = torch.randn(count, channels, -(-height // size), -(-width // size), generator=generator)
        field = F.interpolate(coarse, size=(height, width), mode="nearest")
        noise[grain == index] = field[grain == index]
    amplitude = torch.rand(count, 1, 1, 1, generator=generator) * NOISE * strength
    return (images + (amplitude * noise).to(images)).clamp(0, 1)
