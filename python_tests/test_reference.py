"""The specification itself, against a descent written by hand in numpy: formulas of the forward pass, of its
derivative and of the heavy ball, no autograd and no torch.

Whatever the kernels are compared with must be right for a reason of its own: the gradient's mean, the momentum,
the staircase, the number of steps and the selection.
"""

from __future__ import annotations

import copy
import hashlib
import math

import numpy as np
import pytest
import torch
from generators import make_case

from defgan_fast import reference
from defgan_fast.plan import decoder_of
from defgan_fast.starts import starting_points


class TwoLayers(torch.nn.Module):
    """sigmoid(W2 relu(W1 z + b1) + b2) as an image of 2 x 3 x 4 pixels, float64."""

    def __init__(self, latent_size: int = 5, hidden: int = 17) -> None:
        super().__init__()
        self.first = torch.nn.Linear(latent_size, hidden)
        self.second = torch.nn.Linear(hidden, 24)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.9)
        self.double()

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.second(torch.relu(self.first(z)))).view(-1, 2, 3, 4)


def by_hand(
    generator: TwoLayers,
    x: np.ndarray,
    z: np.ndarray,
    rates: list[float],
    momentum: float,
    radius: float = 0.0,
    velocity: np.ndarray | None = None,
) -> tuple[np.ndarray, float, np.ndarray]:
    """One row, x [24] and z [k]: its latent after the steps, its error, and its velocity."""
    w1, b1, w2, b2 = (p.detach().numpy() for p in generator.parameters())

    def forward(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        before = w1 @ z + b1
        return before, 1 / (1 + np.exp(-(w2 @ np.maximum(before, 0) + b2)))

    if velocity is None:
        velocity = np.zeros_like(z)
        z = z * (radius / np.sqrt(np.sum(z * z))) if radius else z
    for rate in rates:
        before, image = forward(z)
        to_image = 2 * (image - x) / x.size
        to_hidden = w2.T @ (to_image * image * (1 - image)) * (before > 0)
        velocity = momentum * velocity + w1.T @ to_hidden
        z = z - rate * velocity
        z = z * (radius / np.sqrt(np.sum(z * z))) if radius else z
    return z, float(np.mean((forward(z)[1] - x) ** 2)), velocity


@pytest.fixture(scope="module")
def setting() -> tuple[TwoLayers, torch.Tensor, torch.Tensor, list[float]]:
    torch.manual_seed(3)
    generator = TwoLayers()
    images = generator(torch.randn(4, 5, dtype=torch.float64)).detach()
    z0 = torch.randn(3, 5, dtype=torch.float64) / math.sqrt(5)
    return generator, images, z0, [3.0] * 8 + [0.3] * 2


def worst_difference(latents: torch.Tensor, errors: torch.Tensor, setting, momentum: float = 0.7) -> float:
    """Largest difference from the hand-written descent, in units of a latent's and an error's own size."""
    generator, images, z0, rates = setting
    worst = 0.0
    for b, image in enumerate(images):
        for r in range(latents.shape[1]):
            start = z0[r] if z0.dim() == 2 else z0[b, r]
            z, error, _ = by_hand(generator, image.flatten().numpy(), start.numpy(), rates, momentum)
            worst = max(
                worst, float(np.abs(latents[b, r].numpy() - z).max()), abs(errors[b, r].item() - error)
            )
    return worst


def test_descent_is_the_one_written_by_hand(setting) -> None:
    generator, images, z0, rates = setting
    latents, errors = reference.project(generator, images, z0, rates, 0.7)
    assert latents.shape == (4, 3, 5)
    assert errors.shape == (4, 3)
    assert latents.dtype == errors.dtype == torch.float64
    _, before = reference.project(generator, images, z0, [], 0.7)
    assert errors.median() < before.median() * 2 / 3, "the case does not move"
    assert worst_difference(latents, errors, setting) < 1e-12


@pytest.mark.parametrize("wrong", ["no step", "one step fewer", "no staircase", "no momentum", "sum"])
def test_wrong_descents_are_far_from_it(setting, wrong: str) -> None:
    """What the comparison above would see, by a margin of 10 orders of magnitude."""
    generator, images, z0, rates = setting
    momentum, scale = 0.7, 1.0
    if wrong == "no step":
        rates = []
    elif wrong == "one step fewer":
        rates = rates[:-1]
    elif wrong == "no staircase":
        rates = [rates[0]] * len(rates)
    elif wrong == "no momentum":
        momentum = 0.0
    elif wrong == "sum":
        scale = 24.0
    latents, errors = reference.project(generator, images, z0, [rate * scale for rate in rates], momentum)
    assert worst_difference(latents, errors, setting) > 1e-3


@pytest.mark.parametrize("radius", [0.0, 1.7])
@pytest.mark.parametrize("keep", [(), ((4, 2),), ((0, 3), (3, 2), (9, 1))], ids=["all", "once", "thrice"])
def test_the_sphere_and_the_dropped_rows_by_hand(setting, radius: float, keep: reference.Keep) -> None:
    """Rows ranked one by one in numpy, each descent resumed from its own latent and velocity."""
    generator, images, _, rates = setting
    z0 = torch.randn(4, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for max_rows in (None, 3):
        found = reference.project_keeping(generator, images, z0, rates, 0.7, keep, max_rows, radius)
        for b, image in enumerate(images):
            x = image.flatten().numpy()
            state = {r: (z0[r].numpy(), 0.0, None) for r in range(4)}
            going, taken = list(range(4)), dict.fromkeys(range(4), 0)
            for begin, (end, rows) in zip(
                (0, *(end for end, _ in keep)), (*keep, (len(rates), 4)), strict=True
            ):
                for r in going:
                    z, _, velocity = state[r]
                    state[r] = by_hand(generator, x, z, rates[begin:end], 0.7, radius, velocity)
                    taken[r] = end
                going = sorted(sorted(going, key=lambda r: (state[r][1], r))[:rows])
            for r in range(4):
                np.testing.assert_allclose(found[0][b, r].numpy(), state[r][0], rtol=0, atol=1e-12)
                assert abs(found[1][b, r].item() - state[r][1]) < 1e-12
                assert found[2][b, r].item() == taken[r]


@pytest.mark.parametrize(
    ("errors", "kept", "going"),
    [
        ([0.3, 0.1, 0.2, 0.1], 2, [1, 3]),
        ([0.1, 0.1, 0.1, 0.1], 2, [0, 1]),
        ([math.nan, math.inf, 0.5, math.nan], 2, [1, 2]),
        ([math.nan, math.nan, math.nan, math.nan], 1, [0]),
        ([0.3, 0.1, 0.2, 0.1], 9, [0, 1, 2, 3]),
    ],
)
def test_which_rows_go_on(errors: list[float], kept: int, going: list[int]) -> None:
    rows = reference._least(torch.tensor([errors, [0.0, 1.0, 2.0, 3.0]]), kept)
    assert rows[0].tolist() == going
    assert rows[1].tolist() == [4 + r for r in range(min(kept, 4))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_sphere(dtype: torch.dtype) -> None:
    """Each row by itself; zero stays zero, what is not finite does not become finite, and 0 leaves all as they are."""
    rows = torch.tensor(
        [[3.0, 4.0], [0.0, 0.0], [1e25, 0.0], [1e-30, 1e-30], [math.inf, 1.0], [math.nan, 1.0]], dtype=dtype
    )
    found = reference.on_sphere(rows, 2.0)
    assert found.dtype == dtype
    root = math.sqrt(2)
    torch.testing.assert_close(
        found[:4], torch.tensor([[1.2, 1.6], [0, 0], [2, 0], [root, root]], dtype=dtype)
    )
    assert found[4:].isnan().any(dim=1).all()
    torch.testing.assert_close(reference.on_sphere(rows, 0.0), rows, rtol=0, atol=0, equal_nan=True)


def test_starting_points_per_image(setting) -> None:
    generator, images, _, rates = setting
    z0 = torch.randn(4, 2, 5, dtype=torch.float64)
    latents, errors = reference.project(generator, images, z0, rates, 0.7)
    assert worst_difference(latents, errors, (generator, images, z0, rates)) < 1e-12


@pytest.mark.parametrize("max_rows", [1, 2, 5, 12, 100])
def test_chunks_give_the_same_values(setting, max_rows: int) -> None:
    generator, images, z0, rates = setting
    latents, errors = reference.project(generator, images, z0, rates, 0.7, max_rows)
    assert worst_difference(latents, errors, setting) < 1e-12


def test_a_convolutional_generator_against_torch_optim() -> None:
    """The same descent by torch.optim.SGD, row by row, in float64; the paper's own geometry."""
    case = make_case("paper")
    twin = copy.deepcopy(case.generator).double()
    images, z0, rates = case.images[:2].double(), case.z0[:2].double(), [case.lr] * 4 + [case.lr / 10]
    latents, errors = reference.project(decoder_of(twin, 16), images, z0, rates, 0.7)
    for b in range(2):
        for r in range(2):
            z = z0[r : r + 1].clone().requires_grad_()
            optimiser = torch.optim.SGD([z], lr=1.0, momentum=0.7)
            for rate in rates:
                optimiser.param_groups[0]["lr"] = rate
                optimiser.zero_grad()
                torch.nn.functional.mse_loss(twin(z), images[b : b + 1]).backward()
                optimiser.step()
            error = torch.nn.functional.mse_loss(twin(z), images[b : b + 1])
            torch.testing.assert_close(latents[b, r], z[0].detach(), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(errors[b, r], error.detach(), rtol=1e-10, atol=1e-14)


def test_inputs_and_parameters_are_left_alone(setting) -> None:
    generator, images, z0, rates = setting
    before = [t.clone() for t in (images, z0, *generator.parameters())]
    for parameter in generator.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    reference.project(generator, images, z0, rates, 0.7)
    for was, now in zip(before, (images, z0, *generator.parameters()), strict=True):
        assert torch.equal(was, now)
    for parameter in generator.parameters():
        assert (parameter.grad == 7).all()
        parameter.grad = None


def test_works_whatever_mode_the_caller_is_in(setting) -> None:
    generator, images, z0, rates = setting
    expected = reference.project(generator, images, z0, rates, 0.7)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = reference.project(generator, images.clone(), z0.clone(), rates, 0.7)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("steps", "decay_at", "first_slow"),
    [
        (200, 0.8, 160),
        (10, 0.8, 8),
        (11, 0.8, 9),
        (1, 0.8, 1),
        (3, 0.8, 3),
        (15, 0.8, 12),
        (10, 0.7, 7),
        (5, 0.0, 0),
        (5, 1.0, 5),
    ],
)
def test_staircase(steps: int, decay_at: float, first_slow: int) -> None:
    """From step ceil(decay_at * L) on the rate is a tenth: 0.7 * 10 is 7 and not 7.000000000000001."""
    rates = reference.learning_rates(steps, 10.0, 0.1, decay_at)
    assert rates == [10.0] * first_slow + [1.0] * (steps - first_slow)


# --- selection ----------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("errors", "best"),
    [
        ([0.3, 0.1, 0.2], 1),
        ([NAN, 0.5, 0.6], 1),
        ([0.5, NAN, 0.4], 2),
        ([INF, NAN, 9e9], 2),
        ([NAN, INF, 3e38], 2),
        ([0.2, 0.1, 0.1], 1),
        ([0.0, 0.0, 0.0], 0),
        ([NAN, NAN, NAN], 0),
        ([INF, INF, INF], 0),
        ([-0.0, 0.0, 1.0], 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_best_restarts(errors: list[float], best: int, dtype: torch.dtype) -> None:
    chosen = reference.best_restarts(torch.tensor([errors, [0.9, 0.8, 0.1]], dtype=dtype))
    assert chosen.tolist() == [best, 2]
    assert chosen.dtype == torch.int64


def test_best_restarts_of_nothing() -> None:
    assert reference.best_restarts(torch.empty(0, 4)).shape == (0,)


# --- starting points ----------------------------------------------------------------------------------------


def test_starting_points_are_standard_normal_over_root_k() -> None:
    k = 128
    points = starting_points(0, 400, k).double() * math.sqrt(k)
    n = points.numel()
    assert abs(points.mean()) < 4 / math.sqrt(n)
    assert abs(points.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((points**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((points**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Neither latent dimensions nor restarts follow each other.
    correlation = torch.corrcoef(points.T) - torch.eye(k, dtype=torch.float64)
    assert correlation.abs().max() < 6 / math.sqrt(400)
    assert (torch.corrcoef(points) - torch.eye(400, dtype=torch.float64)).abs().max() < 6 / math.sqrt(k)
    # Kolmogorov-Smirnov against the normal distribution, 1% level.
    ordered = points.flatten().sort().values
    uniform = torch.special.ndtr(ordered)
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (uniform - steps).abs().max() < 1.63 / math.sqrt(n)


@pytest.mark.parametrize("k", [1, 2, 7, 64, 128])
def test_starting_point_r_depends_on_seed_and_r_alone(k: int) -> None:
    many = starting_points(5, 12, k)
    assert many.shape == (12, k)
    assert many.dtype == torch.float32
    assert torch.isfinite(many).all()
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the point is that global state does not matter
    for restarts in (1, 2, 5, 12):
        assert torch.equal(starting_points(5, restarts, k), many[:restarts])
    assert len({tuple(row.tolist()) for row in many}) == 12
    assert not torch.equal(starting_points(6, 12, k), many)


def test_starting_points_leave_the_global_random_state_alone() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    starting_points(0, 3, 10)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002


ANCHOR_4 = [
    [1.14222074, -0.774725378, 0.962292671, -0.33187592],
    [-0.15190655, -0.375969321, -0.283229202, 0.0400160514],
]
ANCHOR_HASH = "a9fd966123ed4b56993dfb32368a5f8495270524a269c86b7eb58703ae1b1e31"
ANCHOR_NEGATIVE = [-0.669095337, -0.55814445, 1.57857955]


def test_starting_points_of_seed_0_are_these() -> None:
    """An anchor: the same on every machine and in every version of torch and numpy, to libm's last digits."""
    points = starting_points(0, 2, 4)
    expected = torch.tensor(ANCHOR_4)
    torch.testing.assert_close(points, expected, rtol=2e-7, atol=0)
    many = starting_points(0, 10, 128)
    rounded = (many.double() * 1e3).round().to(torch.int32).numpy()
    assert hashlib.sha256(rounded.tobytes()).hexdigest() == ANCHOR_HASH
    torch.testing.assert_close(starting_points(-3, 1, 3), torch.tensor([ANCHOR_NEGATIVE]), rtol=2e-7, atol=0)
