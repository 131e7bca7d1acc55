"""The networks that are measured: shipped geometries and two common others, with random weights that move.

Speed does not depend on the weights, but correctness that is asserted before timing does: with a default
initialisation the loss hardly falls, and a projector that takes no step would pass. So every layer is scaled
until its output has unit spread over random latents, and the last one until the pixels use their range; the
loss then falls by a third within a few steps (a test holds that).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from ..models import CelebaGenerator, Generator

SAMPLE = 64  # latents over which the spread is taken
LAST_LAYER_SPREAD = 2.0  # of a sigmoid's or tanh's input


class Chain(nn.Sequential):
    """Layers in a row that know their latent size, for geometries that are no model of the package."""

    def __init__(self, latent_size: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.latent_size = latent_size


def dcgan(latent_size: int = 100, width: int = 64) -> nn.Module:
    """Radford et al. (2016): 4x4 kernels, stride 2, from 1x1 to 3x64x64, BatchNorm in all but the last."""
    layers: list[nn.Module] = [nn.Unflatten(1, (latent_size, 1, 1))]
    channels = [latent_size, 8 * width, 4 * width, 2 * width, width]
    for position, (before, after) in enumerate(itertools.pairwise(channels)):
        stride, padding = (1, 0) if position == 0 else (2, 1)
        layers.append(nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False))
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    return Chain(latent_size, *layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())


def upsampling(latent_size: int = 64, width: int = 64) -> nn.Module:
    """Nearest upsampling followed by 3x3 convolutions, 7x7 to 1x28x28."""
    return Chain(
        latent_size,
        nn.Linear(latent_size, 2 * width * 49),
        nn.ReLU(),
        nn.Unflatten(1, (2 * width, 7, 7)),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(2 * width, width, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(width, width // 2, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width // 2, 1, 3, padding=1),
        nn.Sigmoid(),
    )


class Crop(nn.Module):
    """[N, C, H, W] -> its first `size` rows and columns."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, : self.size, : self.size]


def mnist_tensorflow(latent_size: int = 128, width: int = 64) -> nn.Module:
    """The MNIST geometry as the released code's framework aligns it: one pixel of padding, and crops."""
    layers: list[nn.Module] = [
        nn.Linear(latent_size, 64 * width),
        nn.ReLU(),
        nn.Unflatten(1, (4 * width, 4, 4)),
    ]
    for before, after, size in ((4 * width, 2 * width, 7), (2 * width, width, 14), (width, 1, 28)):
        layers += [nn.ConvTranspose2d(before, after, 5, 2, 1), Crop(size), nn.ReLU()]
    return Chain(latent_size, *layers[:-1], nn.Sigmoid())


GENERATORS: dict[str, Callable[[], nn.Module]] = {
    "mnist": Generator,
    "mnist_tensorflow": mnist_tensorflow,
    "digits": lambda: Generator(latent_size=64, width=32),
    "celeba": CelebaGenerator,
    "dcgan": dcgan,
    "upsampling": upsampling,
}


def moving_generator(name: str, seed: int = 0) -> nn.Module:
    """One of `GENERATORS` in eval mode, its weights drawn from `seed` and frozen.

    Raises:
        ValueError: no such name.
    """
    if name not in GENERATORS:
        raise ValueError(f"generator must be one of {', '.join(GENERATORS)}, got '{name}'")
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        generator = GENERATORS[name]().eval().requires_grad_(False)
        k = latent_size(generator)
        latents = torch.randn(SAMPLE, k) / math.sqrt(k)
        layers = [layer for layer in generator.modules() if isinstance(layer, kinds)]
        for layer in layers:  # in order, since each is fed by those before it
            layer.weight.div_(_output_spread(generator, layer, latents))
        layers[-1].weight.mul_(LAST_LAYER_SPREAD)
    return generator


def latent_size(generator: nn.Module) -> int:
    """k of a generator of this module."""
    return cast(int, generator.latent_size)


def _output_spread(generator: nn.Module, layer: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Standard deviation of all elements of one layer's output."""
    found: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _layer, _inputs, output: found.append(output.std()))
    generator(latents)
    hook.remove()
    return found[0]


def main() -> None:
    """Prints the lowered plan of a generator: `python -m defgan_fast.benchmark.generators NAME`."""
    from ..plan import lower

    generator = moving_generator(sys.argv[1] if len(sys.argv) > 1 else "mnist")
    print(lower(generator, latent_size(generator)).text)


if __name__ == "__main__":
    main()
