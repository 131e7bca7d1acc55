"""Every way to write a shape, an end, a crop or a shared weight gives the same plan."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from generators import PaperGenerator
from lowered import SHAPES, Written, check, identity, on_maps
from torch import Tensor, nn

from defgan_fast import LoweringError
from defgan_fast.plan import Plan, interpret, lower

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
    plan = lower(generator, 6)
    z = torch.randn(2, 6)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(interpret(plan, plan.tensors(generator), z), generator(z))
            generator[0].parametrizations.weight.original0.mul_(3)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_hook_computes_are_refused() -> None:
    """No kernel runs hooks: weight_norm's old form would leave the kernels with yesterday's weights."""
    generator = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (1, 2, 3))).eval()
    nn.utils.weight_norm(generator[0])
    with pytest.raises(LoweringError, match=r"layer '0' \(Linear\).*hook"):
        lower(generator, 6)


def test_folded_and_separate_batch_norm_agree() -> None:
    """The same numbers by two plans: BatchNorm folded, and kept apart by a LeakyReLU of slope 1, which does nothing."""
    torch.manual_seed(1)
    folded = on_maps(
        nn.ConvTranspose2d(4, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 3, padding=1)
    )
    check(folded, 6, ["linear", "conv_transpose", "conv"])
    apart = on_maps(folded[2], nn.LeakyReLU(1.0), folded[3], nn.ReLU(), folded[5])
    apart[0] = folded[0]
    plan = lower(apart.eval(), 6)
    assert [layer.kind for layer in plan.layers] == ["linear", "conv_transpose", "map", "conv"]
    z, one = torch.randn(3, 6), lower(folded, 6)
    torch.testing.assert_close(
        interpret(plan, plan.tensors(apart), z),
        interpret(one, one.tensors(folded), z),
        rtol=1e-4,
        atol=1e-5,
    )


def test_eps_and_slopes_survive_the_text() -> None:
    generator = on_maps(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, eps=1.2345678901234e-4), nn.LeakyReLU(1 / 3))
    plan = lower(generator.eval(), 6)
    again = Plan.parse(plan.text)
    assert again.layers == plan.layers
    assert again.layers[1].eps == 1.2345678901234e-4
    assert again.layers[1].slope == 1 / 3


def test_output_range_is_that_of_the_last_layer() -> None:
    def range_of(*end: nn.Module) -> tuple[float, float] | None:
        return lower(on_maps(*end).eval(), 6).output_range

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
    lower(generator, 16)
    assert all(torch.equal(before[key], value) for key, value in generator.state_dict().items())
    assert (generator.linear.weight.grad == 1).all()
    assert torch.equal(state, torch.get_rng_state())
