"""An error of one line for every bad image, starting point, seed, argument and generator."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from projectors import BACKENDS, K, at, make_generator, make_projector, one_line, same
from torch import Tensor, nn

from defgan_fast import Projector
from defgan_fast.starts import starting_points


def grey(*shape: int, **options) -> Tensor:
    return torch.full(shape, 0.5, **options)


def with_value(value: float) -> Tensor:
    x = grey(2, 1, 28, 28)
    x[1, 0, 3, 4] = value
    return x


BAD_IMAGES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "rank 2": (lambda: grey(28, 28), ValueError, r"images must have shape \[B, .*\], got \[28, 28\]"),
    "rank 3": (lambda: grey(1, 28, 28), ValueError, r"images must have shape \[B, .*\], got \[1, 28, 28\]"),
    "rank 5": (lambda: grey(1, 1, 1, 28, 28), ValueError, r"images must have shape \[B, .*\], got \[1, 1, 1, 28, 28\]"),
    "channels": (lambda: grey(2, 3, 28, 28), ValueError, r"(?=.*images)(?=.*[\[ ]1, 28, 28\]).*[\[ ]3, 28, 28\]"),
    "height": (lambda: grey(2, 1, 27, 28), ValueError, r"(?=.*images)(?=.*[\[ ]1, 28, 28\]).*[\[ ]1, 27, 28\]"),
    "width": (lambda: grey(2, 1, 28, 32), ValueError, r"(?=.*images)(?=.*[\[ ]1, 28, 28\]).*[\[ ]1, 28, 32\]"),
    "uint8": (
        lambda: torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
        TypeError,
        r"^images must have dtype float32, bfloat16 or float16, got uint8$",
    ),
    "int64": (
        lambda: torch.zeros(2, 1, 28, 28, dtype=torch.int64),
        TypeError,
        r"^images must have dtype float32, bfloat16 or float16, got int64$",
    ),
    "complex": (lambda: torch.zeros(2, 1, 28, 28, dtype=torch.complex64), TypeError, r"images must .*got complex64"),
    "numpy": (lambda: np.zeros((2, 1, 28, 28), dtype=np.float32), TypeError, r"images must be a .*Tensor, got ndarray"),
    "none": (lambda: None, TypeError, r"images must be a .*Tensor, got NoneType"),
    "device": (lambda: grey(2, 1, 28, 28, device="meta"), ValueError, r"images must be on .*\(cpu\), got meta"),
    "nan": (lambda: with_value(math.nan), ValueError, r"^images must be finite"),
    "inf": (lambda: with_value(math.inf), ValueError, r"^images must be finite"),
    "-inf": (lambda: with_value(-math.inf), ValueError, r"^images must be finite"),
    "bytes": (
        lambda: with_value(255.0),
        ValueError,
        r"^images must lie in the generator's range \[0, 1\], got \[0.5, 255\] \(with validate=False ",
    ),
    "negative": (lambda: with_value(-1.0), ValueError, r"range \[0, 1\], got \[-1, 0.5\] \(with validate=False "),
    "beyond the slack": (lambda: with_value(1.011), ValueError, r"range \[0, 1\], got \[0.5, 1.011\]"),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(BAD_IMAGES))
def test_bad_images(backend: str, name: str) -> None:
    build, error, message = BAD_IMAGES[name]
    projector = make_projector(backend=backend)
    for call in (projector, projector.project):
        with pytest.raises(error, match=message) as caught:
            call(build())
        one_line(caught)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_range_of_sigmoid_and_tanh(backend: str, dtype: torch.dtype) -> None:
    for end, low, high in ((nn.Sigmoid(), 0, 1), (nn.Tanh(), -1, 1)):
        projector = make_projector(make_generator(end), steps=1, restarts=1, backend=backend)
        x = torch.linspace(low, high, 784, dtype=dtype).view(1, 1, 28, 28)
        slack = 0.01 * (high - low) if dtype != torch.bfloat16 else 0.0078
        for fine in (
            x,
            x * (1 + (slack / 2 if low == 0 else slack)),
            x.clamp(low + slack),
            x - slack * (low == 0),
        ):
            projector(fine)
        with pytest.raises(ValueError, match=rf"range \[{low}, 1\], got \[0, 255\]") as caught:
            projector(torch.linspace(0, 255, 784, dtype=dtype).view(1, 1, 28, 28))
        one_line(caught)
    with pytest.raises(ValueError, match=r"images must lie in the generator's range \[0, 1\], got \[-1, 1\]"):
        make_projector(backend=backend)(torch.linspace(-1, 1, 784).view(1, 1, 28, 28).to(dtype))
    # Any pixel may come where the last layer bounds nothing.
    make_projector(make_generator(nn.Identity()), steps=1, restarts=1, lr=1e-6, backend=backend)(
        torch.full((1, 1, 28, 28), 255.0, dtype=dtype)
    )


class EndsInFunction(nn.Module):
    """The range is that of the last thing done: a function here, although a Tanh is registered last."""

    latent_size = K

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.last, self.between, self.end = nn.Linear(K, 6), nn.Linear(6, 12), nn.Tanh(), end

    def forward(self, z: Tensor) -> Tensor:
        return self.end(self.last(self.between(self.linear(z)))).view(-1, 1, 3, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_range_is_that_of_the_last_layer_run(backend: str, dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 3, 4), 3.0, dtype=dtype)
    make_projector(EndsInFunction(lambda h: h), steps=1, restarts=1, backend=backend)(x)
    with pytest.raises(ValueError, match=r"range \[0, 1\], got \[3, 3\]"):
        make_projector(EndsInFunction(torch.sigmoid), steps=1, restarts=1, backend=backend)(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_unvalidated_rows_show_it_and_leave_others_alone(images: Tensor, backend: str, value: float) -> None:
    for max_rows in (None, 1, 4):
        projector = make_projector(backend=backend, validate=False, max_rows=max_rows)
        expected = projector.project(images)
        x = images.clone()
        x[1, 0, 14, 14] = value
        p = projector.project(x)
        assert not torch.isfinite(p.all_errors[1]).any()
        assert not torch.isfinite(p.errors[1])
        others = [0, 2, 3]
        if backend == "cpu":
            assert same(at(p, others), at(expected, others))
        else:
            torch.testing.assert_close(p.images[others], expected.images[others], rtol=1e-3, atol=1e-4)
        if backend == "cpu":  # nothing of it stays in working memory either
            assert same(projector.project(images), expected)
    with pytest.raises(ValueError, match="finite"):
        make_projector(backend=backend, validate=True)(x)
    make_projector(backend=backend, validate=False)(images * 255)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38, -3e38])
def test_a_restart_that_overflows_never_wins(images: Tensor, backend: str, bad: float) -> None:
    for end in (nn.Sigmoid(), nn.Identity()):
        projector = make_projector(make_generator(end), backend=backend, validate=False, lr=1e-3)
        z0 = starting_points(0, 3, K)
        finite = projector.project(images, z0=z0[1:])
        z0[0] = bad
        p = projector.project(images, z0=z0)
        assert not torch.isfinite(p.all_errors[:, 0]).any()
        assert (p.restarts != 0).all()
        torch.testing.assert_close(p.restarts, finite.restarts + 1)
        torch.testing.assert_close(p.images, finite.images, rtol=1e-4, atol=1e-4)
        assert torch.isfinite(p.errors).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_that_overflows_shows_in_the_errors(images: Tensor, backend: str) -> None:
    """Every restart of every image runs away: the errors say so instead of a plausible number."""
    projector = make_projector(make_generator(nn.Identity()), backend=backend, lr=1e30, steps=10)
    p = projector.project(images)
    assert not torch.isfinite(p.all_errors).any()
    assert not torch.isfinite(p.errors).any()
    assert p.images.shape == images.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_starting_points(images: Tensor, backend: str) -> None:
    projector = make_projector(backend=backend)
    bad = {
        r"z0 must have shape \[R, 8\] or \[4, R, 8\].*got \[3, 7\]": torch.randn(3, 7),
        r"z0 must have shape .*got \[8\]": torch.randn(8),
        r"z0 must have shape .*got \[3, 2, 8\]": torch.randn(3, 2, 8),
        r"z0 must have shape .*got \[0, 8\]": torch.randn(0, 8),
        r"z0 must have shape .*got \[1, 4, 2, 8\]": torch.randn(1, 4, 2, 8),
        r"z0 must be finite": torch.full((2, 8), math.nan),
        r"z0 must be on the images' device \(cpu\), got meta": torch.empty(2, 8, device="meta"),
    }
    for message, z0 in bad.items():
        with pytest.raises(ValueError, match=message) as caught:
            projector.project(images, z0=z0)
        one_line(caught)
    for message, z0 in {
        r"z0 must have .*dtype.*got int64": torch.ones(2, 8, dtype=torch.int64),
        r"z0 must be a .*Tensor, got list": [[0.0] * 8],
    }.items():
        with pytest.raises(TypeError, match=message) as caught:
            projector.project(images, z0=z0)
        one_line(caught)


@pytest.mark.parametrize("bad", [1.5, "a", True])
def test_bad_seed_of_a_call(images: Tensor, bad: object) -> None:
    with pytest.raises(TypeError, match=r"seed must be an int.*got") as caught:
        make_projector().project(images, seed=bad)
    one_line(caught)


@pytest.mark.parametrize("seed", [-1, 2**40, 2**63, 2**64 - 1])
def test_any_int_is_a_seed(images: Tensor, seed: int) -> None:
    assert same(make_projector(seed=seed).project(images), make_projector().project(images, seed=seed))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": -3}, ValueError, "steps must be at least 1, got -3"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float"),
        ({"steps": True}, TypeError, "steps must be an int, got bool"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1, got 0"),
        ({"restarts": 1.5}, TypeError, "restarts must be an int, got float"),
        ({"max_rows": 0}, ValueError, "max_rows must be at least 1, got 0"),
        ({"max_rows": 2.5}, TypeError, "max_rows must be an int, got float"),
        ({"lr": 0}, ValueError, "lr must be .*, got 0"),
        ({"lr": -1.0}, ValueError, "lr must be .*, got -1"),
        ({"lr": math.nan}, ValueError, "lr must be .*, got nan"),
        ({"lr": "10"}, TypeError, "lr must be a number, got str"),
        ({"momentum": 1.0}, ValueError, "momentum must lie in .*, got 1"),
        ({"momentum": -0.1}, ValueError, r"momentum must lie in .*, got -0\.1"),
        ({"lr_decay": -1}, ValueError, "lr_decay must be .*, got -1"),
        ({"decay_at": 1.5}, ValueError, r"decay_at must lie in .*, got 1\.5"),
        ({"seed": 0.5}, TypeError, "seed must be an int or None, got float"),
        ({"precision": "float64"}, ValueError, "precision must be one of auto, .*bfloat16.*, got 'float64'"),
        ({"gradient": "bpda"}, ValueError, "gradient must be one of straight_through, .*, got 'bpda'"),
        ({"gradient": None}, ValueError, "gradient must be one of .*, got None"),
        ({"backend": "gpu"}, ValueError, "backend must be one of auto, .*, reference, got 'gpu'"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Projector(make_generator(), **arguments)
    one_line(caught)


def test_generator_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"generator must be a .*Module, got function") as caught:
        Projector(lambda z: z)
    one_line(caught)


class Gives(nn.Module):
    """Returns what it is told to."""

    latent_size = K

    def __init__(self, give: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.give = nn.Linear(K, 12), give

    def forward(self, z: Tensor) -> object:
        return self.give(self.linear(z))


@pytest.mark.filterwarnings("ignore:running on the reference path")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("give", "came"),
    [
        (lambda h: (h.view(-1, 1, 3, 4), h), "tuple"),
        (lambda h: {"image": h}, "dict"),
        (lambda h: h.view(-1, 1, 2, 6), r"\[.*1, 2, 6\]"),
        (lambda h: h.view(-1, 12), r"\[.*12\]"),
        (lambda h: h.view(-1, 3, 4), r"\[.*3, 4\]"),
        (lambda h: h.mean(0).view(1, 1, 3, 4), r"."),
    ],
    ids=["tuple", "dict", "other shape", "flat", "three dimensions", "rows lost"],
)
def test_generators_that_return_something_else_are_named(backend: str, give: Callable, came: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"(?=.*Gives).*{came}") as caught:
        make_projector(Gives(give), backend=backend)(grey(2, 1, 3, 4))
    one_line(caught)


class NoLayers(nn.Module):
    """Says nothing of its latent; takes any number of them above two."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z[:, :2].repeat(1, 6).view(-1, 1, 3, 4) + z.mean())


class Matrix(NoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 12))

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z @ self.weight).view(-1, 1, 3, 4)


@pytest.mark.filterwarnings("ignore:running on the reference path")
@pytest.mark.parametrize("generator", [NoLayers(), Matrix()], ids=["no layers", "a matrix of its own"])
def test_latent_size_unknown(generator: nn.Module) -> None:
    projector = make_projector(generator)
    x = grey(2, 1, 3, 4)
    with pytest.raises(ValueError, match=rf"{type(generator).__name__}.*latent.*z0.*latent_size") as caught:
        projector(x)
    one_line(caught)
    p = projector.project(x, z0=torch.randn(4, 5))  # read from z0
    assert p.latents.shape == (2, 5)
    assert p.all_errors.shape == (2, 4)
    generator = copy.deepcopy(generator)
    generator.latent_size = 5
    assert make_projector(generator).project(x).latents.shape == (2, 5)


def test_warnings_of_a_projection_are_none(images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projector = make_projector()
        x = images.clone().requires_grad_()
        projector(x).sum().backward()
        make_projector(backend="reference", gradient="unrolled")(x).sum().backward()


def test_numbers_of_numpy_are_numbers(images: Tensor) -> None:
    rng = np.random.default_rng(0)
    seed = rng.integers(9)
    projector = Projector(
        make_generator(),
        steps=np.int64(5),
        restarts=np.uint8(3),
        lr=np.float32(8),
        momentum=np.float64(0.7),
        seed=seed,
        max_rows=np.int32(4),
    )
    assert type(projector.steps) is type(projector.restarts) is type(projector.seed) is int
    assert type(projector.lr) is type(projector.momentum) is float
    assert same(projector.project(images), make_projector(seed=int(seed)).project(images))
    assert same(projector.project(images, seed=np.int64(3)), projector.project(images, seed=3))
