"""Lowering against the module itself: every layer alone and in combination, every way to write a shape, and every
refusal with its message.

The plan is run twice: by `lowering.run` in float64, where only a wrong plan can differ, and by the compiled
kernels (decode and one step of descent), which read the same text with a parser of their own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from generators import FAMILIES, PaperGenerator, scale_up
from torch import Tensor, nn

from defgan_fast import LoweringError, Projector, lowering, reference
from defgan_fast.kernels import ops


def check(generator: nn.Module, k: int, kinds: list[str] | None = None, scale: bool = True) -> lowering.Plan:
    """The plan computes what the generator does, by both its readers; `kinds` are the layers expected in it."""
    if scale:
        scale_up(generator, 1.2)
    generator.eval()
    plan = lowering.lower(generator, k)
    if kinds is not None:
        assert [layer.kind for layer in plan.layers] == kinds, plan.text
    assert lowering.parse(plan.text).text == plan.text
    z = torch.randn(5, k, generator=torch.Generator().manual_seed(4))
    twin = copy.deepcopy(generator).double()
    decoder = lowering.decoder_of(twin, k)
    with torch.no_grad():
        expected = decoder(z.double())
        got = lowering.run(plan, plan.tensors(twin), z.double())
    assert got.shape == expected.shape
    assert expected.std() > 1e-3, "the generator is dead, nothing would be compared"
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    if ops.kernels_available:
        parameters = [p.detach() for p in plan.tensors(generator)]
        images = torch.ops.defgan_fast.decode(z, parameters, plan.text, 0)
        torch.testing.assert_close(
            images.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )
        target = expected.flip(0)[:2].float()
        rates = [1.0]
        z1, _ = reference.project(decoder, target.double(), z.double(), rates, 0.0)
        latents, errors = torch.ops.defgan_fast.project(
            target, z, parameters, plan.text, rates, 0.0, "float32", 0, False
        )
        gradient, ours = z.double() - z1, z.double() - latents.double()
        assert (gradient - ours).norm() < 1e-5 * gradient.norm() + 1e-6 * z.norm()
        torch.testing.assert_close(
            errors.double(),
            reference.reconstruction_errors(
                decoder, latents.flatten(0, 1).double(), target.double().repeat_interleave(5, 0)
            )
            .detach()
            .view(2, 5),
            rtol=1e-5,
            atol=1e-9,
        )
    return plan


def on_maps(*layers: nn.Module, c: int = 4, h: int = 5, w: int = 3, k: int = 6) -> nn.Sequential:
    """The layers after a Linear that lays the latent out as [N, c, h, w]."""
    return nn.Sequential(nn.Linear(k, c * h * w), nn.Unflatten(1, (c, h, w)), *layers)


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
    k = lowering.latent_size_of(generator.eval())
    assert k == (1 if name.startswith("one channel") else 6)
    check(generator, k, kinds)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_family(name: str) -> None:
    generator = FAMILIES[name]().eval()
    k = lowering.latent_size_of(generator)
    assert k is not None
    check(generator, k)


def test_norm_without_affine_parameters() -> None:
    generator = on_maps(nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    scale_up(generator, 1.2)
    for norm in (generator[3], generator[5]):
        norm.weight = norm.bias = None
    check(generator, 6, ["linear", "conv", "map"], scale=False)


# --- the many ways to write the same ------------------------------------------------------------------------


class Written(nn.Module):
    """Linear, a shape, a transposed convolution and an end, each spelled by the function given."""

    def __init__(self, shape: Callable[[Tensor], Tensor], end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.convolution = nn.Linear(6, 24), nn.ConvTranspose2d(4, 2, 3, 2)
        self.shape, self.end = shape, end

    def forward(self, z: Tensor) -> Tensor:
        return self.end(self.convolution(self.shape(self.linear(z))))


def identity(x: Tensor) -> Tensor:
    return x


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "view, size()": lambda h: h.view(h.size(0), 4, 2, 3),
    "view, shape": lambda h: h.view(h.shape[0], 4, 2, 3),
    "view, tuple": lambda h: h.view((-1, 4, 2, 3)),
    "reshape": lambda h: h.reshape(-1, 4, 2, 3),
    "torch.reshape": lambda h: torch.reshape(h, (-1, 4, 2, 3)),
    "len": lambda h: h.reshape(h.shape[0], 4, -1, 3),
    "unflatten": lambda h: h.unflatten(1, (4, 2, 3)),
    "torch.unflatten": lambda h: torch.unflatten(h, -1, (4, 2, 3)),
    "in two goes": lambda h: h.view(-1, 4, 6).unflatten(2, (2, 3)),
    "unsqueeze": lambda h: h.unsqueeze(2).unsqueeze(-1).reshape(-1, 4, 2, 3).contiguous(),
    "flatten and back": lambda h: torch.flatten(h.view(-1, 4, 2, 3), 1).view(-1, 4, 2, 3),
}
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.sigmoid": torch.sigmoid,
    "F.sigmoid": F.sigmoid,
    "method": lambda h: h.sigmoid(),
    "in place": lambda h: h.relu_(),
    "tanh": lambda h: torch.tanh(h),
    "F.relu, in place": lambda h: F.relu(h, inplace=True),
    "F.leaky_relu": lambda h: F.leaky_relu(h),
    "F.leaky_relu, slope": lambda h: F.leaky_relu(h, 0.4),
    "F.leaky_relu, keyword": lambda h: F.leaky_relu(h, negative_slope=0.4),
    "F.dropout": lambda h: F.dropout(h, 0.5, False),
    "F.interpolate": lambda h: F.interpolate(h, scale_factor=2),
    "F.interpolate, size": lambda h: F.interpolate(h, (10, 14), mode="nearest"),
    "crop": lambda h: h[:, :, 1:4, 2:5],
    "crop, ellipsis": lambda h: h[..., 1:, :-2],
    "crop, one side": lambda h: h[:, :, :3],
    "crop, negative": lambda h: h[:, :, -4:, -3:-1],
    "crop twice": lambda h: h[:, :, 1:, 1:][:, :, 1:, :3],
    "crop after an activation": lambda h: torch.tanh(h)[:, :, 1:-1, 1:-1],
    "crop before an activation": lambda h: torch.tanh(h[:, :, 1:-1, 1:-1]),
    "crop of an upsampled map": lambda h: F.interpolate(h, scale_factor=3)[:, :, 1:-4, 2:],
    "crop, crop, upsample, crop": lambda h: F.interpolate(
        torch.relu(h)[..., 1:, 1:][..., 1:], scale_factor=2
    )[..., 1:],
    "the whole": lambda h: h[:, :, 0:5],
    "an image of another shape": lambda h: h.reshape(-1, 7, 5, 2),
    "flat, then an image": lambda h: h.flatten(1).view(-1, 1, 10, 7),
}


@pytest.mark.parametrize("name", list(SHAPES))
def test_shape_is_written(name: str) -> None:
    plan = check(Written(SHAPES[name], identity), 6)
    assert [layer.kind for layer in plan.layers] == ["linear", "conv_transpose"]


@pytest.mark.parametrize("name", list(ENDS))
def test_end_is_written(name: str) -> None:
    check(Written(SHAPES["reshape"], ENDS[name]), 6)


class CropBetween(nn.Module):
    """Crops of a convolution of an upsampled map, and of a strided convolution, each before another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.up = nn.Linear(6, 4 * 12), nn.Upsample(scale_factor=3)
        self.first, self.norm = nn.Conv2d(4, 5, 3, 2, 1), nn.BatchNorm2d(5)
        self.second = nn.ConvTranspose2d(5, 3, 4, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.first(self.up(self.linear(z).view(-1, 4, 3, 4)))[:, :, 1:, 2:5]
        return torch.sigmoid(self.second(F.relu(self.norm(h)))[:, :, 1:-1, 1:8])


def test_crops_change_the_index_rule() -> None:
    """They cost no layer, and BatchNorm still folds behind them."""
    check(CropBetween(), 6, ["linear", "conv", "conv_transpose"])


class Shared(nn.Module):
    """The same Linear, BatchNorm and convolution twice each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.last = (
            nn.Linear(12, 12),
            nn.BatchNorm1d(12),
            nn.ConvTranspose2d(3, 3, 2, 1),
        )

    def forward(self, z: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> Tensor:
        h = F.relu(self.norm(self.linear(z)))
        h = F.relu(self.norm(self.linear(h))).view(-1, 3, 2, 2)
        return torch.sigmoid(self.last(torch.relu(self.last(h))))


def test_shared_weights_travel_once() -> None:
    plan = check(Shared(), 12, ["linear", "linear", "conv_transpose", "conv_transpose"])
    assert len(plan.parameters) == len(set(plan.parameters)) == 8


def test_weights_tied_between_modules() -> None:
    generator = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Unflatten(1, (1, 2, 3)))
    generator[2].weight = generator[0].weight
    check(generator, 6, ["linear", "linear"])


def test_parametrised_weights_are_read_where_they_are_used() -> None:
    generator = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (1, 2, 3))).eval()
    nn.utils.parametrizations.weight_norm(generator[0])
    plan = lowering.lower(generator, 6)
    z = torch.randn(2, 6)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(lowering.run(plan, plan.tensors(generator), z), generator(z))
            generator[0].parametrizations.weight.original0.mul_(3)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_hook_computes_are_refused() -> None:
    """No kernel runs hooks: weight_norm's old form would leave the kernels with yesterday's weights."""
    generator = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (1, 2, 3))).eval()
    nn.utils.weight_norm(generator[0])
    with pytest.raises(LoweringError, match=r"layer '0' \(Linear\).*hook"):
        lowering.lower(generator, 6)


def test_folded_and_separate_batch_norm_agree() -> None:
    """The same numbers by two plans: BatchNorm folded, and kept apart by a LeakyReLU of slope 1, which does nothing."""
    torch.manual_seed(1)
    folded = on_maps(
        nn.ConvTranspose2d(4, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 3, padding=1)
    )
    check(folded, 6, ["linear", "conv_transpose", "conv"])
    apart = on_maps(folded[2], nn.LeakyReLU(1.0), folded[3], nn.ReLU(), folded[5])
    apart[0] = folded[0]
    plan = lowering.lower(apart.eval(), 6)
    assert [layer.kind for layer in plan.layers] == ["linear", "conv_transpose", "map", "conv"]
    z, one = torch.randn(3, 6), lowering.lower(folded, 6)
    torch.testing.assert_close(
        lowering.run(plan, plan.tensors(apart), z),
        lowering.run(one, one.tensors(folded), z),
        rtol=1e-4,
        atol=1e-5,
    )


def test_eps_and_slopes_survive_the_text() -> None:
    generator = on_maps(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, eps=1.2345678901234e-4), nn.LeakyReLU(1 / 3))
    plan = lowering.lower(generator.eval(), 6)
    again = lowering.parse(plan.text)
    assert again.layers == plan.layers
    assert again.layers[1].eps == 1.2345678901234e-4
    assert again.layers[1].slope == 1 / 3


def test_output_range_is_that_of_the_last_layer() -> None:
    def range_of(*end: nn.Module) -> tuple[float, float] | None:
        return lowering.lower(on_maps(*end).eval(), 6).output_range

    assert range_of(nn.Sigmoid()) == (0, 1)
    assert range_of(nn.Tanh()) == (-1, 1)
    assert range_of(nn.Sigmoid(), nn.Conv2d(4, 1, 1)) is None
    assert range_of(nn.ReLU()) is None
    assert range_of(nn.Tanh(), nn.Upsample(scale_factor=2)) in (None, (-1, 1))
    assert range_of(nn.Sigmoid(), nn.BatchNorm2d(4)) is None


def test_lowering_changes_nothing() -> None:
    generator = PaperGenerator().eval()
    before, state = copy.deepcopy(generator.state_dict()), torch.get_rng_state()
    generator.linear.weight.grad = torch.ones_like(generator.linear.weight)
    lowering.lower(generator, 16)
    assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())
    assert (generator.linear.weight.grad == 1).all()
    assert torch.equal(state, torch.get_rng_state())


# --- refusals -----------------------------------------------------------------------------------------------


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
        lowering.lower(generator, 6)
    text = str(caught.value)
    assert text.startswith(f"generator {type(generator).__name__} cannot be lowered: ")
    assert "\n" not in text, "an error message is one line"


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Dropout(0.5)], ids=["norm", "dropout"])
def test_training_mode_is_refused(layer: nn.Module) -> None:
    generator = on_maps(layer).eval()
    lowering.lower(generator, 6)
    layer.train()
    with pytest.raises(
        LoweringError, match=rf"layer '2' \({type(layer).__name__}\).*training mode"
    ) as caught:
        lowering.lower(generator, 6)
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


# --- the latent's size --------------------------------------------------------------------------------------


class OutOfOrder(nn.Module):
    """The layer that is registered first is not the one that runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.latent_size = nn.Conv2d(3, 1, 1), nn.Linear(6, 12), 6

    def forward(self, z: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(z)).view(-1, 3, 2, 2))


def test_latent_size() -> None:
    assert lowering.latent_size_of(PaperGenerator(latent_size=11)) == 11
    assert lowering.latent_size_of(nn.Sequential(nn.ConvTranspose2d(7, 2, 3))) == 7
    assert lowering.latent_size_of(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)).eval()) == 5
    assert lowering.latent_size_of(OutOfOrder()) == 6
    assert lowering.latent_size_of(nn.Flatten()) is None
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
