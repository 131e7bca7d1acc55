"""Latents on a sphere, and rows that are dropped on the way: the CPU kernels against float64, and their promises.

What is checked of the kernels is checked of wrong descents too, which must not pass: each is the specification with
one planted fault.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from generators import Case, make_case
from torch import Tensor

from defgan_fast import reference
from defgan_fast.kernels import extension, ops
from defgan_fast.plan import decoder_of, lower

pytestmark = pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")

_module = extension.module()
SETS: list[str] = _module.instruction_sets() if _module else []
NAMES = ("paper", "linear-a", "latent-as-map", "many-positions-and-taps", "three-channels-64")
KEEPS = {"once": ((2, 2),), "at the start and later": ((0, 5), (1, 3), (4, 1)), "nobody": ((3, 9),)}
STEPS = 6
Found = tuple[Tensor, Tensor, Tensor]
Descent = Callable[[Tensor, Tensor, reference.Keep], Found]


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DEFGAN_CPU_ISA", request.param)
    return request.param


class Problem:
    """Holds a generator with images of its own and starting points, what float64 and the kernels make of it."""

    def __init__(self, name: str, images: int, restarts: int) -> None:
        self.case: Case = make_case(name)
        self.k = self.case.latent_size
        self.radius = 0.7 * math.sqrt(self.k)
        self.rates = [self.case.lr] * STEPS
        drawn = torch.Generator().manual_seed(images * 100 + restarts)
        self.decoder = decoder_of(self.case.generator, self.k)
        self.double = decoder_of(copy.deepcopy(self.case.generator).double(), self.k)
        with torch.no_grad():
            shape = self.decoder(torch.zeros(1, self.k)).shape[1:]
            latents = torch.randn(images, self.k, generator=drawn)
            self.images = self.decoder(latents) if images else torch.empty(0, *shape)
        self.z0 = torch.randn(restarts, self.k, generator=drawn)
        plan = lower(self.case.generator, self.k)
        self.generator = ([p.detach() for p in plan.tensors(self.case.generator)], plan.text)

    def kernels(
        self, images: Tensor, z0: Tensor, keep: reference.Keep, precision: str = "float32", max_rows: int = 0
    ) -> Found:
        settings = (self.rates, self.case.momentum, precision, max_rows, False, self.radius)
        return ops.project_keeping(images, z0, *self.generator, *settings, keep)

    def kernels_all(self, images: Tensor, z0: Tensor, steps: int, precision: str = "float32") -> Found:
        rates = self.rates[:steps]
        settings = (rates, self.case.momentum, precision, 0, False, self.radius)
        return *ops.project(images, z0, *self.generator, *settings), torch.tensor(steps)

    def exact(self, keep: reference.Keep) -> Found:
        settings = (self.rates, self.case.momentum, keep, None, self.radius)
        return reference.project_keeping(self.double, self.images.double(), self.z0.double(), *settings)


@functools.cache
def problem(name: str, images: int = 3, restarts: int = 7) -> Problem:
    return Problem(name, images, restarts)


def check(given: Problem, descent: Descent, keep: reference.Keep) -> None:
    """Checks a descent against float64: which rows go on, where all of them end, and with which errors."""
    latents, errors, steps = descent(given.images, given.z0, keep)
    z, expected, taken = given.exact(keep)
    # Two rows whose errors are nearer than float32 tells them may change places; in these problems there are none.
    assert torch.equal(steps, taken), "other rows go on"
    start = reference.on_sphere(given.z0.double(), given.radius)
    travelled = (z - start).norm(dim=-1)
    distance = (latents - z).norm(dim=-1) / travelled.where(travelled > 0, given.radius)
    off = (errors - expected).abs() / expected
    for count in taken.unique():  # medians of them all would not tell of the few that go on
        far, wide = distance[taken == count].median(), off[taken == count].median()
        assert far < 1e-4, f"after {count} steps latents are {far:.1e} of their way off"
        assert wide < 1e-4, f"after {count} steps errors are {wide:.1e} off"
    torch.testing.assert_close(
        latents.norm(dim=-1) / given.radius, torch.ones_like(errors), rtol=3e-7, atol=0
    )


@pytest.mark.parametrize("keep", [(), *KEEPS.values()], ids=["all", *KEEPS])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_do_what_float64_does(name: str, keep: reference.Keep, instruction_set: str) -> None:
    given = problem(name)
    check(given, given.kernels, keep)


def wrong(given: Problem, fault: str, images: Tensor, z0: Tensor, keep: reference.Keep) -> Found:
    """Returns what the specification gives in float32 with a fault planted."""
    restarts = len(z0)
    targets = images.repeat_interleave(restarts, 0)

    def on_sphere(latents: Tensor) -> Tensor:
        return reference.on_sphere(latents, given.radius)

    z = z0.repeat(len(images), 1)
    z = z if fault == "start" else on_sphere(z)
    velocity, going = torch.zeros_like(z), torch.ones(len(z), dtype=torch.bool)
    taken = torch.zeros(len(z), dtype=torch.int64)
    for step in range(STEPS + 1):
        for at, rows in keep:
            if at != step or rows >= int(going.sum()) // max(1, len(images)):
                continue
            decoder = given.decoder
            if fault == "precision":
                narrow = decoder_of(copy.deepcopy(given.case.generator).bfloat16(), given.k)
                decoder = lambda z, narrow=narrow: narrow(z.bfloat16()).float()  # noqa: E731
            with torch.no_grad():
                errors = reference.reconstruction_errors(decoder, z, targets)
            errors = errors.where(going, math.inf if fault != "worst" else -math.inf).view(-1, restarts)
            order = errors.argsort(dim=1, stable=True, descending=fault == "worst")[:, :rows]
            going = torch.zeros_like(errors, dtype=torch.bool).scatter(1, order, True).flatten()
            if fault == "velocity":
                velocity = torch.zeros_like(velocity)
        if step == STEPS:
            break
        gradient = reference.latent_gradient(given.decoder, z.detach().requires_grad_(), targets)
        new_velocity = given.case.momentum * velocity + gradient
        if fault == "norm before the step":
            moved = on_sphere(z) - given.rates[step] * new_velocity
        else:
            moved = z - given.rates[step] * new_velocity
            moved = moved if fault == "step" else on_sphere(moved)
        if fault == "velocity scaled":
            new_velocity = (
                new_velocity
                * (moved.norm(dim=1) / (z - given.rates[step] * new_velocity).norm(dim=1))[:, None]
            )
        z = moved.where(going[:, None], z)
        velocity = new_velocity.where(going[:, None], velocity)
        taken += going
    with torch.no_grad():
        errors = reference.reconstruction_errors(given.decoder, z, targets)
    shape = (len(images), restarts)
    return z.view(*shape, -1), errors.view(shape), taken.view(shape)


FAULTS = ("start", "step", "norm before the step", "velocity scaled", "velocity", "worst")


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_planted_faults_are_seen(fault: str) -> None:
    given = problem("linear-a")
    descent = functools.partial(wrong, given, fault)
    if fault == "none":
        check(given, descent, KEEPS["once"])
        return
    with pytest.raises(AssertionError):
        check(given, descent, KEEPS["once"])


def near_rows(given: Problem) -> Tensor:
    """Returns 33 starting points so near to each other that bfloat16 does not tell their errors apart."""
    noise = torch.randn(33, given.k, generator=torch.Generator().manual_seed(5))
    return given.z0[:1] + 1e-3 * noise


def check_ranking(given: Problem, descent: Descent) -> None:
    """Checks that the rows that go on are those of least float32 error, though bfloat16 would choose others."""
    z0 = near_rows(given)
    _, errors, steps = descent(given.images, z0, ((0, 4),))
    start = reference.on_sphere(z0, given.radius).repeat(len(given.images), 1)
    targets = given.images.repeat_interleave(33, 0)
    with torch.no_grad():
        exact = reference.reconstruction_errors(given.double, start.double(), targets.double()).view(-1, 33)
    best = exact.argsort(dim=1)[:, :4].sort(dim=1).values
    chosen = (steps > 0).nonzero()[:, 1].view(-1, 4)
    assert torch.equal(chosen, best), "the rows that go on are not those of least error"
    dropped = steps == 0
    torch.testing.assert_close(errors[dropped].double(), exact[dropped], rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_are_ranked_by_float32_errors(precision: str, instruction_set: str) -> None:
    given = problem("paper")
    check_ranking(given, lambda images, z0, keep: given.kernels(images, z0, keep, precision))


def test_a_ranking_by_bfloat16_errors_is_seen() -> None:
    given = problem("paper")
    check_ranking(given, functools.partial(wrong, given, "none"))
    with pytest.raises(AssertionError, match="not those of least error"):
        check_ranking(given, functools.partial(wrong, given, "precision"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("images", "restarts"), [(1, 1), (3, 7), (5, 13), (0, 4)])
def test_bits_are_those_of_a_descent_without_drops(
    images: int, restarts: int, precision: str, instruction_set: str
) -> None:
    """A row that goes on has the bits that it would have had, and a dropped one those of a shorter descent."""
    given = problem("paper", images, restarts)
    keep = ((1, 4), (3, 2))
    latents, errors, steps = given.kernels(given.images, given.z0, keep, precision)
    assert latents.shape == (images, restarts, given.k)
    assert errors.shape == steps.shape == (images, restarts)
    for taken in (1, 3, STEPS):
        z, loss, _ = given.kernels_all(given.images, given.z0, taken, precision)
        rows = steps == taken
        assert torch.equal(latents[rows], z[rows]), f"rows of {taken} steps"
        assert torch.equal(errors[rows], loss[rows]), f"rows of {taken} steps"
    counts = [(steps == taken).sum(1).unique().tolist() for taken in (1, 3, STEPS)]
    kept = [restarts, min(restarts, 4), min(restarts, 2), 0]
    expected = [[kept[0] - kept[1]], [kept[1] - kept[2]], [kept[2]]] if images else [[], [], []]
    assert counts == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bits_depend_on_no_batch_chunk_or_team(precision: str, instruction_set: str) -> None:
    given = problem("linear-a", 3, 7)
    keep = KEEPS["at the start and later"]
    whole = given.kernels(given.images, given.z0, keep, precision)
    before = torch.get_num_threads()
    try:
        for threads, max_rows in ((2, 0), (3, 0), (2, 1), (1, 3)):
            torch.set_num_threads(threads)
            again = given.kernels(given.images, given.z0, keep, precision, max_rows)
            assert all(map(torch.equal, again, whole)), f"{threads} threads, max_rows={max_rows}"
            for i in range(3):
                alone = given.kernels(given.images[i : i + 1], given.z0, keep, precision, max_rows)
                assert all(torch.equal(a, w[i : i + 1]) for a, w in zip(alone, whole, strict=True)), (
                    f"image {i}"
                )
    finally:
        torch.set_num_threads(before)


def test_the_lowest_index_goes_on_among_equals() -> None:
    given = problem("linear-a")
    z0 = given.z0[:2].repeat(3, 1)
    for keep, going in ((((1, 1),), 1), (((0, 4), (2, 1)), 1)):
        _, _, steps = given.kernels(given.images, z0, keep)
        last = (steps == STEPS).nonzero()[:, 1].view(-1, going)
        assert (last < 2).all(), "a later one of equal rows has gone on"


def test_rows_that_are_not_finite_come_last_and_disturb_nobody() -> None:
    given = problem("linear-a")
    keep, z0 = ((1, 5),), given.z0.clone()
    clean = given.kernels(given.images, z0, ((1, 5),))
    z0[0, 1], z0[3, 0] = math.nan, math.inf
    latents, errors, steps = given.kernels(given.images, z0, keep)
    bad = torch.tensor([True, False, False, True, False, False, False])
    assert (steps[:, bad] == 1).all()
    assert (steps[:, ~bad] == STEPS).all()
    assert errors[:, bad].isnan().all()
    z, loss, _ = given.kernels_all(given.images, given.z0, STEPS)
    assert torch.equal(latents[:, ~bad], z[:, ~bad])
    assert torch.equal(errors[:, ~bad], loss[:, ~bad])
    assert torch.isfinite(clean[1]).all()


def test_a_latent_of_norm_zero_stays_zero() -> None:
    given = problem("linear-a")
    z0 = given.z0.clone()
    z0[2] = 0
    z, errors, _ = given.kernels_all(given.images, z0, 0)
    assert (z[:, 2] == 0).all()
    assert torch.isfinite(errors).all()
    z, _, _ = given.kernels_all(given.images, z0, 1)
    torch.testing.assert_close(z.norm(dim=-1), torch.full((3, 7), given.radius), rtol=3e-7, atol=0)
    expected, _, _ = given.kernels_all(given.images, given.z0, 1)
    assert torch.equal(z[:, :2], expected[:, :2])


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_norms_neither_overflow_nor_vanish(scale: float) -> None:
    """Squares of these numbers are beyond float32's range; the row's direction is not."""
    given = problem("linear-a")
    z, _, _ = given.kernels_all(given.images, given.z0 * scale, 0)
    expected = reference.on_sphere(given.z0.double(), given.radius)
    torch.testing.assert_close(z.double(), expected.expand_as(z), rtol=1e-6, atol=1e-7)


def test_no_step_is_a_codebook(instruction_set: str) -> None:
    """Only the final errors, of the starting points as they are or on the sphere."""
    given = problem("paper")
    for radius in (0.0, given.radius):
        settings = ([], 0.7, "bfloat16", 0, False, radius)
        z, errors = ops.project(given.images, given.z0, *given.generator, *settings)
        expected = reference.on_sphere(given.z0.double(), radius)
        torch.testing.assert_close(z.double(), expected.expand_as(z), rtol=1e-6, atol=0)
        loss = reference.project(given.double, given.images.double(), expected, [], 0.7)[1]
        torch.testing.assert_close(errors.double(), loss, rtol=2e-5, atol=0)
