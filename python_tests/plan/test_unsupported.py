"""Every generator and every plan that is refused, with its message; the latent's size where nothing tells it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from generators import PaperGenerator, scale_up
from lowered import SHAPES, Written, check, identity, on_maps
from torch import Tensor, nn

from defgan_fast import LoweringError, Projector, reference
from defgan_fast.kernels import ops
from defgan_fast.plan import latent_size_of, lower


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 12)

    def forward(self, z: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(z)) + z).view(-1, 3, 2, 2)


class TwoBranches(nn.Module):
    """The image leaves out a later layer: the end of the chain is not what is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 12)

    def forward(self, z: Tensor) -> Tensor:
        image = self.first(z).view(-1, 3, 2, 2)
        self.second(image.flatten(1))
        return image


class ReadsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 12)

    def forward(self, z: Tensor) -> Tensor:
        return (self.linear(z) if z.sum() > 0 else -self.linear(z)).view(-1, 3, 2, 2)


class ScaledBy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(6, 12), nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor) -> Tensor:
        return (self.linear(z) * self.gain).view(-1, 3, 2, 2)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "groups": (lambda: on_maps(nn.ConvTranspose2d(4, 4, 3, groups=2)), r"layer '2' \(ConvTranspose2d\).*groups=2"),
    "groups of a convolution": (lambda: on_maps(nn.Conv2d(4, 4, 3, groups=4)), r"layer '2' \(Conv2d\).*groups=4"),
    "dilation": (lambda: on_maps(nn.Conv2d(4, 1, 2, dilation=(1, 2))), r"layer '2' \(Conv2d\).*dilation=\(1, 2\)"),
    "padding mode": (
        lambda: on_maps(nn.Conv2d(4, 1, 3, padding=1, padding_mode="reflect")),
        r"layer '2' \(Conv2d\).*padding_mode='reflect'",
    ),
    "bilinear": (lambda: on_maps(nn.Upsample(scale_factor=2, mode="bilinear")), r"layer '2' \(Upsample\).*bilinear"),
    "bilinear function": (
        lambda: Written(SHAPES["reshape"], lambda h: F.interpolate(h, scale_factor=2, mode="bilinear")),
        r"function 'interpolate'.*bilinear",
    ),
    "fractional": (lambda: on_maps(nn.Upsample(size=(7, 4))), r"layer '2' \(Upsample\)"),
    "softmax": (lambda: on_maps(nn.Softmax(1)), r"layer '2' \(Softmax\)"),
    "relu6": (lambda: on_maps(nn.ReLU6()), r"layer '2' \(ReLU6\)"),
    "gelu": (lambda: on_maps(nn.GELU()), r"layer '2' \(GELU\)"),
    "prelu": (lambda: on_maps(nn.PReLU()), r"layer '2' \(PReLU\)"),
    "instance norm": (lambda: on_maps(nn.InstanceNorm2d(4)), r"layer '2' \(InstanceNorm2d\)"),
    "pixel shuffle": (lambda: on_maps(nn.PixelShuffle(2)), r"layer '2' \(PixelShuffle\)"),
    "three dimensions": (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.Unflatten(1, (3, 4)), nn.Linear(4, 4), nn.Unflatten(2, (2, 2))),
        r"layer '2' \(Linear\)",
    ),
    "statistics of the batch": (
        lambda: on_maps(nn.BatchNorm2d(4, track_running_stats=False)),
        r"layer '2' \(BatchNorm2d\).*running statistics",
    ),
    "slope": (lambda: on_maps(nn.LeakyReLU(-0.1)), r"layer '2' \(LeakyReLU\).*-0\.1.*at least 0"),
    "slope of a function": (
        lambda: Written(SHAPES["reshape"], lambda h: F.leaky_relu(h, -0.5)),
        r"function 'leaky_relu'.*-0\.5.*at least 0",
    ),
    "skip connection": (Skip, r"function 'add'"),
    "two branches": (TwoBranches, r"output"),
    "control flow": (ReadsValues, r"control flow|traced"),
    "arithmetic": (lambda: Written(SHAPES["reshape"], lambda h: h * 2), r"function 'mul'"),
    "a parameter of its own": (ScaledBy, r"'mul'"),
    "a method": (lambda: Written(lambda h: h.view(-1, 4, 3, 2).transpose(2, 3), identity), r"method 'transpose'"),
    "strided crop": (lambda: Written(SHAPES["reshape"], lambda h: h[:, :, ::2]), r"function 'getitem'"),
    "crop of channels": (lambda: Written(SHAPES["reshape"], lambda h: h[:, :1]), r"function 'getitem'"),
    "padding": (lambda: Written(SHAPES["reshape"], lambda h: F.pad(h, (1, 1))), r"function '_?pad'"),
    "output of 2 dimensions": (lambda: nn.Sequential(nn.Linear(6, 8)), r"\[N, C, H, W\], got \[3, 8\]"),
    "output of 3 dimensions": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4))),
        r"\[N, C, H, W\], got \[3, 2, 4\]",
    ),
    "no layers": (lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3))), r"no layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_unsupported_layers_are_named(name: str) -> None:
    build, message = REFUSED[name]
    generator = build().eval()
    with pytest.raises(LoweringError, match=message) as caught:
        lower(generator, 6)
    text = str(caught.value)
    assert text.startswith(f"generator {type(generator).__name__} cannot be lowered: ")
    assert "\n" not in text, "an error message is one line"


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Dropout(0.5)], ids=["norm", "dropout"])
def test_training_mode_is_refused(layer: nn.Module) -> None:
    generator = on_maps(layer).eval()
    lower(generator, 6)
    layer.train()
    with pytest.raises(
        LoweringError, match=rf"layer '2' \({type(layer).__name__}\).*training mode"
    ) as caught:
        lower(generator, 6)
    assert "\n" not in str(caught.value)


def unlowerable() -> nn.Module:
    generator = on_maps(nn.Tanh(), nn.Softplus(), nn.Conv2d(4, 1, 1), nn.Sigmoid())
    scale_up(generator)
    return generator.eval()


def test_auto_falls_back_with_one_warning() -> None:
    torch.manual_seed(2)
    generator = unlowerable()
    projector = Projector(generator, steps=4, restarts=3, lr=3.0)
    z0 = torch.randn(3, 6)
    images = generator(torch.randn(2, 6)).detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = projector.project(images, z0=z0)
        projector(images)
        projector.project(images)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "reference path" in message
    assert "layer '3' (Softplus)" in message
    assert "\n" not in message
    rates = [3.0] * 4  # ceil(0.8 * 4) = 4
    latents, errors = reference.project(generator, images, z0, rates, 0.7)
    torch.testing.assert_close(got.all_errors, errors)
    torch.testing.assert_close(got.latents, latents[torch.arange(2), errors.argmin(1)])
    with torch.no_grad():
        torch.testing.assert_close(got.images, generator(got.latents))


def test_asking_for_the_reference_does_not_warn() -> None:
    projector = Projector(unlowerable(), steps=1, restarts=1, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projector(torch.rand(1, 1, 5, 3))


@pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")
def test_asking_for_a_kernel_raises_instead() -> None:
    with pytest.raises(LoweringError, match=r"layer '3' \(Softplus\)") as caught:
        Projector(unlowerable(), backend="cpu")
    assert "\n" not in str(caught.value)


def test_asking_for_cuda_says_why_not() -> None:
    with pytest.raises((RuntimeError, ValueError), match="cuda") as caught:
        Projector(PaperGenerator(), backend="cuda")
    assert "\n" not in str(caught.value)


class OutOfOrder(nn.Module):
    """The layer that is registered first is not the one that runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.latent_size = nn.Conv2d(3, 1, 1), nn.Linear(6, 12), 6

    def forward(self, z: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(z)).view(-1, 3, 2, 2))


def test_latent_size() -> None:
    assert latent_size_of(PaperGenerator(latent_size=11)) == 11
    assert latent_size_of(nn.Sequential(nn.ConvTranspose2d(7, 2, 3))) == 7
    assert latent_size_of(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)).eval()) == 5
    assert latent_size_of(OutOfOrder()) == 6
    assert latent_size_of(nn.Flatten()) is None
    check(OutOfOrder(), 6, ["linear", "conv"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no layers"),
        ("linear in=2x1x1 out=4x1x1", "weight"),
        ("linear in=2x1x1 out=4x1x1 weight=0\nlinear in=5x1x1 out=4x1x1 weight=0", "input is not the output"),
        ("linear in=2x1x1 out=4x1x1 weight=3\nimage out=1x2x2", "not given"),
        ("linear in=2x1x1 out=4x1x1 weight=0\nimage out=1x2x3", "image"),
        ("linear in=2x1x1 out=4x1x1 weight=x", "integer"),
        ("softmax in=2x1x1 out=2x1x1", "softmax"),
        ("conv in=2x1x1 out=2x1x1 weight=0 kernel=0x1", "kernel"),
        ("conv in=2x1x1 out=99999999x99x99 weight=0 kernel=1x1", "shape"),
        ("linear in=2x1x1 out=4x1x1 weight=0 stride=0x1", "stride"),
        ("linear in=2x1x1 out=4x1x1 weight=0\nimage out=4x1x1", "elements"),
    ],
)
@pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")
def test_foreign_plans_are_errors_of_one_line(text: str, message: str) -> None:
    """The op takes the plan from anybody: what does not fit is a ValueError and never a crash."""
    weights = [torch.ones(3, 2)]
    with pytest.raises(ValueError, match=message) as caught:
        torch.ops.defgan_fast.decode(torch.ones(1, 2), weights, text, 0)
    assert "\n" not in str(caught.value)
