"""Every layer alone and in combination: its plan against the module itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from generators import FAMILIES, scale_up
from lowered import check, on_maps
from torch import nn

from defgan_fast.plan import latent_size_of

LAYERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "linear": (lambda: on_maps(), ["linear"]),
    "linear without bias": (
        lambda: nn.Sequential(nn.Linear(6, 24, bias=False), nn.Unflatten(1, (2, 3, 4))),
        ["linear"],
    ),
    "linear stack": (
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 24), nn.Unflatten(1, (2, 3, 4))),
        ["linear"] * 2,
    ),
    "transposed convolution": (
        lambda: on_maps(nn.ConvTranspose2d(4, 3, 5, 2, 2, 1)),
        ["linear", "conv_transpose"],
    ),
    "transposed convolution, rectangular": (
        lambda: on_maps(nn.ConvTranspose2d(4, 3, (2, 5), (3, 2), (0, 1), (2, 0), bias=False)),
        ["linear", "conv_transpose"],
    ),
    "transposed convolution, stride above kernel": (
        lambda: on_maps(nn.ConvTranspose2d(4, 2, 1, 3, 0, 2)),
        ["linear", "conv_transpose"],
    ),
    "transposed convolution, padding above what a tap reaches": (
        lambda: on_maps(nn.ConvTranspose2d(4, 2, 3, 1, 2)),
        ["linear", "conv_transpose"],
    ),
    "transposed convolution from one pixel": (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 3, (4, 3))),
        ["conv_transpose"],
    ),
    "convolution": (lambda: on_maps(nn.Conv2d(4, 3, 3, padding=1)), ["linear", "conv"]),
    "convolution, strided": (
        lambda: on_maps(nn.Conv2d(4, 3, (3, 2), (2, 1), (1, 0), bias=False)),
        ["linear", "conv"],
    ),
    "convolution, stride above kernel": (lambda: on_maps(nn.Conv2d(4, 3, 1, 2)), ["linear", "conv"]),
    "convolution, same, even kernel": (
        lambda: on_maps(nn.Conv2d(4, 3, (4, 2), padding="same")),
        ["linear", "conv"],
    ),
    "convolution, valid": (lambda: on_maps(nn.Conv2d(4, 3, 2, padding="valid")), ["linear", "conv"]),
    "convolution, padding above the kernel": (
        lambda: on_maps(nn.Conv2d(4, 3, 2, padding=3)),
        ["linear", "conv"],
    ),
    "one channel, one pixel, one latent": (
        lambda: nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Unflatten(1, (1, 1, 1))),
        ["linear"],
    ),
    "relu": (lambda: on_maps(nn.ReLU()), ["linear"]),
    "relu in place": (lambda: on_maps(nn.ReLU(True), nn.Conv2d(4, 1, 1)), ["linear", "conv"]),
    "leaky relu": (lambda: on_maps(nn.LeakyReLU(0.3)), ["linear"]),
    "leaky relu of slope 0": (lambda: on_maps(nn.LeakyReLU(0.0)), ["linear"]),
    "leaky relu above 1": (lambda: on_maps(nn.LeakyReLU(1.7), nn.Conv2d(4, 1, 1)), ["linear", "conv"]),
    "sigmoid": (lambda: on_maps(nn.Sigmoid()), ["linear"]),
    "tanh": (lambda: on_maps(nn.Tanh()), ["linear"]),
    "sigmoid and tanh between": (
        lambda: on_maps(nn.Sigmoid(), nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Conv2d(3, 1, 2)),
        ["linear", "conv", "conv"],
    ),
    "two activations in a row": (lambda: on_maps(nn.LeakyReLU(0.1), nn.Tanh()), ["linear", "map"]),
    "activation first": (
        lambda: nn.Sequential(nn.Tanh(), nn.Linear(6, 8), nn.Unflatten(1, (2, 2, 2))),
        ["map", "linear"],
    ),
    "identity and dropout": (
        lambda: on_maps(nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Conv2d(4, 1, 2)),
        ["linear", "conv"],
    ),
    "norm 1d folded": (
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 8), nn.Unflatten(1, (2, 2, 2))
        ),
        ["linear", "linear"],
    ),
    "norm 1d folded into a layer laid out later": (
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 1, 2)
        ),
        ["linear", "conv"],
    ),
    "norm 1d after the activation": (
        lambda: nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.BatchNorm1d(12), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 1, 2)
        ),
        ["linear", "map", "conv"],
    ),
    "norm 1d first": (
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.Unflatten(1, (2, 2, 2))),
        ["map", "linear"],
    ),
    "norm 1d over flattened maps": (
        lambda: on_maps(
            nn.Conv2d(4, 3, 2), nn.Flatten(), nn.BatchNorm1d(24), nn.Linear(24, 8), nn.Unflatten(1, (2, 2, 2))
        ),
        ["linear", "conv", "map", "linear"],
    ),
    "norm 2d folded into a linear layer": (
        lambda: on_maps(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 2)),
        ["linear", "conv"],
    ),
    "norm 2d folded into a transposed convolution": (
        lambda: on_maps(nn.ConvTranspose2d(4, 3, 3, 2, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
        ["linear", "conv_transpose"],
    ),
    "norm 2d before a padded convolution": (
        lambda: on_maps(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)),
        ["linear", "map", "conv"],
    ),
    "norm 2d twice": (
        lambda: on_maps(nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3), nn.BatchNorm2d(3, eps=0.3)),
        ["linear", "conv", "map"],
    ),
    "norm 2d last": (lambda: on_maps(nn.ReLU(), nn.BatchNorm2d(4)), ["linear", "map"]),
    "upsample merged": (
        lambda: on_maps(nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3, padding=1)),
        ["linear", "conv"],
    ),
    "upsample merged, strided, rectangular": (
        lambda: on_maps(nn.Upsample(scale_factor=(3, 2)), nn.Conv2d(4, 3, (4, 3), (2, 3), (2, 1))),
        ["linear", "conv"],
    ),
    "upsample with an activation between": (
        lambda: on_maps(nn.Upsample(scale_factor=2), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)),
        ["linear", "map", "conv"],
    ),
    "upsample twice": (
        lambda: on_maps(nn.Upsample(scale_factor=2), nn.UpsamplingNearest2d(scale_factor=3), nn.Conv2d(4, 1, 3)),
        ["linear", "map", "conv"],
    ),
    "upsample last": (lambda: on_maps(nn.Conv2d(4, 2, 2), nn.Upsample(size=(8, 4))), ["linear", "conv", "map"]),
    "upsample before a transposed convolution": (
        lambda: on_maps(nn.Upsample(scale_factor=2), nn.ConvTranspose2d(4, 2, 3, 2)),
        ["linear", "map", "conv_transpose"],
    ),
    "upsample from one pixel": (
        lambda: nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(6, 2, 3, padding=1)),
        ["conv"],
    ),
    "nested": (
        lambda: on_maps(
            nn.Sequential(nn.Sequential(nn.ConvTranspose2d(4, 3, 3), nn.Sequential(nn.BatchNorm2d(3))), nn.ReLU()),
            nn.Sequential(nn.Conv2d(3, 2, 2)),
        ),
        ["linear", "conv_transpose", "conv"],
    ),
    "maps laid out again": (
        lambda: on_maps(nn.ReLU(), nn.Flatten(), nn.Unflatten(1, (10, 2, 3)), nn.Conv2d(10, 2, 2), nn.Flatten(),
                        nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 1, 2, 2)),
        None,  # whether the Linear can take the second shape is the lowering's business
    ),
    "normed maps laid out again": (
        lambda: on_maps(
            nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Unflatten(1, (3, 5, 4)), nn.ConvTranspose2d(3, 1, 2, 2)
        ),
        None,
    ),
    "maps normed after the activation laid out again": (
        lambda: on_maps(
            nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Unflatten(1, (3, 5, 4)), nn.ConvTranspose2d(3, 1, 2, 2)
        ),
        None,
    ),
    "upsampled maps laid out again": (
        lambda: on_maps(nn.Upsample(scale_factor=2), nn.Flatten(2), nn.Unflatten(2, (4, 15)), nn.Conv2d(4, 1, 2)),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(LAYERS))
def test_layer(name: str) -> None:
    build, kinds = LAYERS[name]
    generator = build()
    k = latent_size_of(generator.eval())
    assert k == (1 if name.startswith("one channel") else 6)
    check(generator, k, kinds)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_family(name: str) -> None:
    generator = FAMILIES[name]().eval()
    k = latent_size_of(generator)
    assert k is not None
    check(generator, k)


def test_norm_without_affine_parameters() -> None:
    generator = on_maps(nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    scale_up(generator, 1.2)
    for norm in (generator[3], generator[5]):
        norm.weight = norm.bias = None
    check(generator, 6, ["linear", "conv", "map"], scale=False)
