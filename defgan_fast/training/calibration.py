"""The unit of a generator's latents, chosen so that the projection's descent suits the generator.

The method fixes the descent: rate 10, 200 steps. Whether it converges depends on the generator: the error's
curvature is the square of the image's change with the latent, and that grows as training sharpens the images,
until steps overshoot and the reconstructions get worse while the samples get better. Measuring the latents in
another unit, G(c z) in place of G(z), makes the curvature c^2 times as large and changes no image that the
generator can draw; descending on it at rate 10 is descending on G at rate 10 c^2 from starting points c z0. The
factor is chosen by the reconstruction error of validation images and kept in the first layer's weights.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from defgan_fast.evaluation.quality import reconstruction_error

# Each multiplies the curvature by about 0.7; below the last the rate would be less than a tenth of the paper's.
FACTORS = (1.0, 0.84, 0.71, 0.59, 0.5, 0.42, 0.35)


def in_unit(generator: nn.Module, factor: float) -> nn.Module:
    """Returns a copy G' of the generator with G'(z) = G(factor * z).

    Args:
        generator: one whose latents enter an ``nn.Linear``, its first module with weights.
        factor: above 0.

    Raises:
        ValueError: the factor is not above 0, or the first layer is no ``nn.Linear``.
    """
    if not factor > 0:
        raise ValueError(f"factor must be above 0, got {factor}")
    changed = copy.deepcopy(generator)
    first = next((module for module in changed.modules() if list(module.parameters(recurse=False))), None)
    if not isinstance(first, nn.Linear):
        raise ValueError(f"generator must begin with an nn.Linear, got {type(first).__name__}")
    with torch.no_grad():
        first.weight.mul_(factor)
    return changed


def calibrate(
    generator: nn.Module, images: torch.Tensor, steps: int = 200, restarts: int = 10
) -> tuple[nn.Module, dict[float, float]]:
    """Returns the generator in the unit with the smallest reconstruction error, and the errors found.

    Factors are tried downwards from 1 until the error grows.

    Args:
        generator: see :func:`in_unit`; not changed.
        images: [N, C, H, W], N at least 1, in the generator's range; not those of any reported figure.
        steps, restarts: L and R.

    Returns:
        A copy of the generator, and the mean reconstruction error by factor; the least is the copy's.
    """
    errors: dict[float, float] = {}
    for factor in FACTORS:
        title = f"latents times {factor:g}"
        errors[factor] = reconstruction_error(in_unit(generator, factor), images, steps, restarts, title)
        if errors[factor] > min(errors.values()):
            break
    return in_unit(generator, min(errors, key=lambda factor: errors[factor])), errors
