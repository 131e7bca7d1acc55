"""Generators for tests: drawn at random, of every kind that lowering knows, and scaled so that descent moves.

With default initialisation a generator's output hardly depends on its latent, and a projector that takes no step
passes most comparisons. So weights are scaled up, targets are images of the generator itself, and the learning
rate is searched until the loss has fallen by a third within the steps that are tested.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defgan_fast import data, load_generator, reference
from defgan_fast.plan import decoder_of, latent_size_of
from defgan_fast.starts import starting_points


class StemAndBody(nn.Module):
    """A plain stack with a forward of its own, so that lowering goes through torch.fx and not only Sequential."""

    def __init__(self, stem: nn.Linear, shape: tuple[int, int, int], body: nn.Module) -> None:
        super().__init__()
        self.stem, self.shape, self.body = stem, shape, body

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.stem(z)).view(z.size(0), *self.shape)
        return torch.sigmoid(self.body(h))


class TensorFlowAligned(nn.Module):
    """Full transposed convolutions cropped as TensorFlow's SAME does: 4 -> 8 -> 7 -> 14 -> 28 pixels."""

    def __init__(self, latent_size: int = 12, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(latent_size, 64 * width)
        self.first = nn.ConvTranspose2d(4 * width, 2 * width, 5, 2)
        self.second = nn.ConvTranspose2d(2 * width, width, 5, 2)
        self.third = nn.ConvTranspose2d(width, 1, 5, 2)

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.linear(z)).reshape(-1, 4 * self.width, 4, 4)
        h = F.relu(self.first(h)[:, :, 1:9, 1:9])[..., :7, :7]
        h = F.relu(self.second(h)[:, :, 1:15, 1:15])
        return torch.sigmoid(self.third(h)[:, :, 1:29, 1:29])


class PaperGenerator(nn.Module):
    """The geometry of the shipped generators, small."""

    def __init__(self, latent_size: int = 16, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(latent_size, 64 * width)
        self.convolutions = nn.Sequential(
            nn.ConvTranspose2d(4 * width, 2 * width, 5, 2, 2),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 5, 2, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 1, 5, 2, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        h = F.relu(self.linear(z)).view(-1, 4 * self.width, 4, 4)
        return self.convolutions(h)


def _int(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()).item())


def _transposed(c_in: int, c_out: int, kernel: int, stride: int) -> nn.ConvTranspose2d:
    padding = _int(0, kernel // 2)
    return nn.ConvTranspose2d(c_in, c_out, kernel, stride, padding, _int(0, stride - 1), bias=_int(0, 3) > 0)


def random_transposed() -> nn.Module:
    """Odd channel counts, kernels 2 to 7, strides 1 to 3, any padding and output padding, not square."""
    while True:
        generator = _random_transposed()
        with torch.no_grad():
            if generator(torch.zeros(1, generator.stem.in_features)).shape[2:].numel() <= 1200:
                return generator


def _random_transposed() -> StemAndBody:
    k, c = _int(5, 23), [_int(1, 37), _int(1, 29), _int(1, 21), _int(1, 3)]
    h, w = _int(2, 4), _int(2, 5)
    layers: list[nn.Module] = []
    for c_in, c_out, largest in zip(c, c[1:], (3, 3, 2), strict=False):
        layers += [_transposed(c_in, c_out, _int(2, 7), _int(1, largest)), nn.ReLU()]
    return StemAndBody(nn.Linear(k, c[0] * h * w), (c[0], h, w), nn.Sequential(*layers[:-1]))


def random_rectangular() -> nn.Module:
    k, c = _int(4, 20), _int(3, 19)
    kernel, stride = (_int(2, 5), _int(2, 6)), (_int(1, 2), _int(1, 3))
    return nn.Sequential(
        nn.Linear(k, c * 3 * 4, bias=False),
        nn.Unflatten(1, (c, 3, 4)),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(c, 7, kernel, stride, (_int(0, 1), _int(0, 1))),
        nn.ReLU(),
        nn.ConvTranspose2d(7, 2, 3, 2, 1, 1),
        nn.Sigmoid(),
    )


def random_linear_stack() -> nn.Module:
    """A stack of Linear with BatchNorm1d before and after the activation, as multilayer GANs have."""
    k, a, b = _int(3, 17), _int(9, 41), _int(9, 70)
    return nn.Sequential(
        nn.Linear(k, a),
        nn.BatchNorm1d(a),
        nn.LeakyReLU(0.1),
        nn.Linear(a, b),
        nn.ReLU(),
        nn.BatchNorm1d(b),
        nn.Linear(b, 2 * 7 * 5),
        nn.Sigmoid(),
        nn.Unflatten(1, (2, 7, 5)),
    )


def random_from_one_pixel() -> nn.Module:
    """DCGAN: transposed convolutions from 1x1, foldable BatchNorm, tanh, latents as [N, k, 1, 1]."""
    k, c = _int(6, 33), _int(5, 20)
    return nn.Sequential(
        nn.ConvTranspose2d(k, 2 * c, 4, 1, 0, bias=False),
        nn.BatchNorm2d(2 * c),
        nn.ReLU(True),
        nn.ConvTranspose2d(2 * c, c, 4, 2, 1, bias=False),
        nn.BatchNorm2d(c),
        nn.ReLU(True),
        nn.ConvTranspose2d(c, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def random_upsampling() -> nn.Module:
    """Nearest upsampling and convolutions, folded and not."""
    k, c = _int(6, 21), _int(4, 18)
    return nn.Sequential(
        nn.Linear(k, c * 9),
        nn.ReLU(),
        nn.Unflatten(1, (c, 3, 3)),
        nn.Upsample(scale_factor=_int(2, 3)),
        nn.Conv2d(c, 11, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(11, 5, _int(2, 5), padding="same"),
        nn.ReLU(),
        nn.Conv2d(5, 1, 3, stride=_int(1, 2), padding=1),
        nn.Upsample(scale_factor=2),
        nn.Sigmoid(),
    )


def random_unfoldable_norm() -> nn.Module:
    """BatchNorm after an activation, in front of a padded convolution and as the very first layer."""
    k, c = _int(5, 19), _int(3, 13)
    return nn.Sequential(
        nn.BatchNorm1d(k),
        nn.Linear(k, c * 16),
        nn.ReLU(),
        nn.BatchNorm1d(c * 16),
        nn.Unflatten(1, (c, 4, 4)),
        nn.BatchNorm2d(c),
        nn.ConvTranspose2d(c, 9, 3, 2, 1),
        nn.ReLU(),
        nn.BatchNorm2d(9),
        nn.Conv2d(9, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Dropout2d(0.3),
        nn.ConvTranspose2d(6, 2, 4, 2, 1),
        nn.BatchNorm2d(2),
        nn.Sigmoid(),
    )


def random_latent_as_map() -> nn.Module:
    """No Linear at all: the latent viewed as a feature map (a reorder), hidden sigmoid and tanh."""
    c, side = _int(1, 5), _int(2, 3)
    module = nn.Sequential(
        nn.Unflatten(1, (c, side, side)),
        nn.ConvTranspose2d(c, 13, 3, 2, 1, 1),
        nn.Tanh(),
        nn.ConvTranspose2d(13, 17, 3, 1, 1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(17 * 4 * side * side, 3 * 6 * 6),
        nn.Unflatten(1, (3, 6, 6)),
    )
    module.latent_size = c * side * side
    return module


def random_flattened() -> nn.Module:
    """Feature maps flattened into a Linear, and a Linear laid out in space again."""
    k, c = _int(4, 12), _int(2, 9)
    return nn.Sequential(
        nn.Linear(k, c * 6),
        nn.Unflatten(1, (c, 2, 3)),
        nn.ConvTranspose2d(c, 10, 3, 2, 1),
        nn.LeakyReLU(0.3),
        nn.Flatten(),
        nn.Linear(10 * 3 * 5, 8 * 4 * 4),
        nn.BatchNorm1d(8 * 4 * 4),
        nn.ReLU(),
        nn.Unflatten(1, (8, 4, 4)),
        nn.Conv2d(8, 1, 3, padding=1),
        nn.Sigmoid(),
    )


def three_channels_64() -> nn.Module:
    """CelebA's shape at a tenth of its width: 3 x 64 x 64, tanh, a linear layer without activation between."""
    return nn.Sequential(
        nn.Linear(16, 24 * 16),
        nn.Unflatten(1, (24, 4, 4)),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 12, 5, 2, 2, 1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 5, 2, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 5, 2, 2, 1),
        nn.ConvTranspose2d(8, 3, 5, 2, 2, 1),
        nn.Tanh(),
    )


def many_output_channels() -> nn.Module:
    """An image of so many channels that the last layer is a gather and not a set of columns."""
    return nn.Sequential(
        nn.Linear(9, 10 * 4), nn.Unflatten(1, (10, 2, 2)), nn.ReLU(), nn.ConvTranspose2d(10, 33, 3, 2, 1, 1)
    )


def many_positions_and_taps() -> nn.Module:
    """A Linear onto more positions, and a convolution of more taps, than kernels keep at hand at a time (64, 32)."""
    return nn.Sequential(
        nn.Linear(6, 3 * 9 * 10),
        nn.Unflatten(1, (3, 9, 10)),
        nn.ReLU(),
        nn.Conv2d(3, 5, 7, padding=3),
        nn.LeakyReLU(0.2),
        nn.Conv2d(5, 1, 3, padding=1),
        nn.Sigmoid(),
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "paper": PaperGenerator,
    "tensorflow": TensorFlowAligned,
    "transposed-a": random_transposed,
    "transposed-b": random_transposed,
    "transposed-c": random_transposed,
    "transposed-d": random_transposed,
    "rectangular-a": random_rectangular,
    "rectangular-b": random_rectangular,
    "linear-a": random_linear_stack,
    "linear-b": random_linear_stack,
    "one-pixel-a": random_from_one_pixel,
    "one-pixel-b": random_from_one_pixel,
    "upsampling-a": random_upsampling,
    "upsampling-b": random_upsampling,
    "unfoldable-norm-a": random_unfoldable_norm,
    "unfoldable-norm-b": random_unfoldable_norm,
    "latent-as-map": random_latent_as_map,
    "flattened": random_flattened,
    "three-channels-64": three_channels_64,
    "many-channels": many_output_channels,
    "many-positions-and-taps": many_positions_and_taps,
}


@dataclass(eq=False)
class Case:
    """A generator and a projection of it that moves.

    Attributes:
        generator: float32, eval mode.
        images: targets [B, C, H, W], images of the generator.
        z0: starting points [R, k].
        lr: with which the loss falls by a third within `steps`.
    """

    generator: nn.Module
    images: Tensor
    z0: Tensor
    lr: float
    steps: int
    momentum: float = 0.7

    @property
    def latent_size(self) -> int:
        return self.z0.shape[1]


def scale_up(generator: nn.Module, gain: float = 1.6) -> None:
    """Draws weights of variance gain^2 / fan-in, statistics and affine parameters of BatchNorm away from 0 and 1."""
    with torch.no_grad():
        for module in generator.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                weight = module.weight
                # Each output of a transposed convolution sums over the input channels and kernel / stride taps.
                if isinstance(module, nn.ConvTranspose2d):
                    taps = math.prod(module.kernel_size) / math.prod(module.stride)
                    fan_in = weight.shape[0] * max(taps, 1.0)
                else:
                    fan_in = weight[0].numel()
                weight.normal_(0, gain / math.sqrt(fan_in))
                if module.bias is not None:
                    module.bias.normal_(0, 0.2)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.6, 1.6)
                module.bias.normal_(0, 0.3)


@functools.cache
def make_case(name: str, images: int = 4, restarts: int = 4, steps: int = 20) -> Case:
    """Returns the named generator with seeded weights, its targets, starting points and learning rate."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + list(FAMILIES).index(name))
        generator = FAMILIES[name]()
        scale_up(generator)
        generator.eval()
        k = latent_size_of(generator)
        assert k is not None
        decoder = decoder_of(generator, k)
        with torch.no_grad():
            targets = decoder(torch.randn(images, k) * 0.5)
        z0 = torch.randn(restarts, k) / math.sqrt(k)
        lr = _search_rate(decoder, targets, z0, steps)
    return Case(generator, targets, z0, lr, steps)


@functools.cache
def shipped_case(name: str) -> Case:
    """Returns a shipped generator on test images of its own data set.

    The rate is found as for the others: at the default of 10 MNIST's descent is at the edge of chaos, where
    PyTorch's own float32 and float64 part within 20 steps, and nothing is said of a kernel (docs/numerics.md).
    """
    generator = load_generator(name)
    try:
        images = data.load(name, split="test").images[:4]
    except FileNotFoundError as error:  # neither at hand nor to be downloaded
        pytest.skip(str(error))
    k = latent_size_of(generator)
    assert k is not None
    z0 = starting_points(0, 4, k)
    return Case(generator, images, z0, _search_rate(decoder_of(generator, k), images, z0, 20), 20)


def _search_rate(decoder: reference.Decoder, images: Tensor, z0: Tensor, steps: int) -> float:
    """Returns the middle of the rates at which the median loss falls by a third, far from the edge of chaos."""
    _, before = reference.project(decoder, images, z0, [], 0.7)
    good = []
    for exponent in range(-4, 14):
        rate = 2.0**exponent
        _, after = reference.project(decoder, images, z0, [rate] * steps, 0.7)
        if torch.isfinite(after).all() and after.median() < before.median() * 2 / 3:
            good.append(rate)
    assert good, "no learning rate moves this generator"
    return good[0] if len(good) < 3 else good[len(good) // 3]
