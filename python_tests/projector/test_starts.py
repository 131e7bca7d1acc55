"""Where descents begin: the nearest candidates, the norm of latents, the rows that are kept, on both paths."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from projectors import BACKENDS, K, at, kernels, make_generator, make_images, make_projector, one_line, same
from torch import Tensor, nn

from defgan_fast import Projector, candidates, reference
from defgan_fast.candidates import candidate_latents
from defgan_fast.starts import starting_points

NEAREST = {"starts": "nearest", "candidates": 60, "restarts": 3}
RADIUS = math.sqrt(K)


def nearest_of(latents: Tensor, images: Tensor, generator: nn.Module, restarts: int = 3) -> Tensor:
    """Returns the starting points by the definition, image by image."""
    with torch.no_grad():
        known = generator(latents).double()
    rows = [(known - image).square().flatten(1).mean(1).argsort()[:restarts] for image in images.double()]
    return latents[torch.stack(rows)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_steps_the_nearest_candidates_come_back(images: Tensor, backend: str) -> None:
    generator = make_generator()
    found = make_projector(generator, backend=backend, steps=0, **NEAREST).project(images)
    expected = nearest_of(candidate_latents(0, 60, K), images, generator)
    assert torch.equal(found.latents, expected[:, 0])
    assert (found.restarts == 0).all()
    assert (found.all_errors.diff(dim=1) >= 0).all()
    torch.testing.assert_close(found.images, generator(found.latents).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("radius", [None, "auto", 1.5])
def test_a_descent_from_the_nearest_is_one_from_their_latents(images: Tensor, backend: str, radius) -> None:
    generator = make_generator()
    norm = {None: None, "auto": RADIUS}.get(radius, radius)
    drawn = candidate_latents(0, 60, K, radius=norm)
    if norm is not None:
        torch.testing.assert_close(drawn.norm(dim=1), torch.full((60,), norm))
    start = nearest_of(drawn, images, generator)
    found = make_projector(generator, backend=backend, radius=radius, **NEAREST).project(images)
    assert same(make_projector(generator, backend=backend, radius=radius).project(images, z0=start), found)
    norms = found.latents.norm(dim=1)
    assert bool(((norms - RADIUS).abs() < 1e-5).all()) == (radius == "auto")
    own = make_projector(generator, backend=backend, radius=radius, **{**NEAREST, "candidates": drawn * 2})
    if radius is not None:  # one's own latents are scaled before they are compared with the image
        torch.testing.assert_close(own.project(images).latents, found.latents, rtol=1e-3, atol=1e-3)


def test_candidates_have_the_standard_deviation_that_is_asked_for() -> None:
    wide = make_projector(start_std=3.0, **{**NEAREST, "candidates": 4000, "steps": 0})
    assert abs(float(wide._latents.std()) - 3) < 0.1
    points = make_projector(start_std=0.5, restarts=2)
    expected = starting_points(0, 2, K) * 0.5 * math.sqrt(K)
    torch.testing.assert_close(points._latents, expected)
    images = make_images(make_generator())
    assert same(points.project(images), make_projector(restarts=2).project(images, z0=points._latents))
    torch.manual_seed(0)
    fresh = make_projector(seed=None, start_std=7.0, steps=1, lr=1e-12, restarts=1)
    many = fresh.project(images[:1].expand(300, -1, -1, -1)).latents
    assert abs(float(many.std()) / 7 - 1) < 0.1


@kernels
@pytest.mark.parametrize(
    "settings",
    [NEAREST, {**NEAREST, "radius": "auto"}, {**NEAREST, "radius": 2.0, "keep": ((2, 2), (3, 1))}],
    ids=["free", "sphere", "keep"],
)
@pytest.mark.parametrize("every", [False, True])
def test_an_image_has_the_bits_that_it_has_in_a_batch(images: Tensor, settings: dict, every: bool) -> None:
    projector = make_projector(**settings)
    whole = projector.project(images, every=every)
    for i in range(len(images)):
        assert same(projector.project(images[i : i + 1], every=every), at(whole, slice(i, i + 1)))
    assert same(projector.project(images[:0], every=every), at(whole, slice(0, 0)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_longer_list_begins_with_a_shorter_one(images: Tensor, backend: str) -> None:
    settings = {**NEAREST, "steps": 0, "restarts": 1, "backend": backend}
    errors = [
        make_projector(**{**settings, "candidates": count}).project(images).errors for count in (5, 60, 400)
    ]
    assert (errors[0] >= errors[1]).all()
    assert (errors[1] >= errors[2]).all()
    assert (errors[0] > errors[2]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_candidates_go_by_their_index(images: Tensor, backend: str) -> None:
    own = candidate_latents(3, 8, K).repeat(3, 1)
    projector = make_projector(backend=backend, steps=0, starts="nearest", candidates=own, restarts=3)
    found = projector.project(images, every=True)
    assert torch.equal(found.every_image[:, 0], found.every_image[:, 1])
    assert (found.restarts == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_seed_a_fresh_half_takes_part(images: Tensor, backend: str) -> None:
    generator = make_generator()
    projector = make_projector(generator, backend=backend, seed=None, steps=0, **NEAREST)
    torch.manual_seed(3)
    first = projector.project(images)
    torch.manual_seed(3)
    assert same(projector.project(images), first)
    drawn = candidate_latents(0, 60, K)
    found = [projector.project(images[:1].expand(40, -1, -1, -1)).latents for _ in range(2)]
    for latents in found:
        index = (latents[:, None] == drawn).all(2).int().argmax(1)
        assert torch.equal(drawn[index], latents), "the candidates are those of seed 0"
        best = nearest_of(drawn, images[:1], generator, 1)[0, 0]
        share = (latents == best).all(1).float().mean()
        assert 0.2 < share < 0.8, "half of the images must miss the nearest candidate"
    assert not torch.equal(*found)
    fixed = make_projector(generator, backend=backend, seed=4, steps=0, **NEAREST)
    assert same(projector.project(images, seed=4), fixed.project(images))
    assert not torch.equal(fixed.project(images).latents, make_projector(steps=0, **NEAREST)(images))


def by_optimiser(generator: nn.Module) -> None:
    for parameter in generator.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(generator.parameters(), 0.05).step()


def by_state(generator: nn.Module) -> None:
    generator.load_state_dict({key: value * 0.5 for key, value in generator.state_dict().items()})


def by_data(generator: nn.Module) -> None:
    generator.linear.weight.data.mul_(0.5)


def by_numpy(generator: nn.Module) -> None:
    generator.linear.weight.detach().numpy()[:] *= 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [by_optimiser, by_state, by_data, by_numpy])
def test_changed_weights_decode_candidates_anew(images: Tensor, backend: str, change) -> None:
    generator = make_generator()
    projector = make_projector(generator, backend=backend, steps=0, **NEAREST)
    before = projector.project(images)
    change(generator)
    after = projector.project(images)
    assert torch.equal(after.latents, nearest_of(candidate_latents(0, 60, K), images, generator)[:, 0])
    assert not torch.equal(before.latents, after.latents)


CHANGES = [
    {"seed": 5},
    {"restarts": 2},
    {"candidates": 20},
    {"candidates": candidate_latents(9, 30, K)},
    {"start_std": 2.0},
    {"radius": 2.0},
    {"keep": ((2, 1),)},
    {"steps": 0},
    {"starts": "random"},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_changed_settings_are_noticed(images: Tensor, backend: str, change: dict) -> None:
    settings = {**NEAREST, "backend": backend}
    projector = make_projector(**settings)
    before = projector.project(images)
    for name, value in change.items():
        setattr(projector, name, value)
    after = projector.project(images)
    assert same(after, make_projector(**{**settings, **change}).project(images))
    assert not same(before, after)


def test_ones_own_candidates_changed_in_place_are_noticed(images: Tensor) -> None:
    own = candidate_latents(9, 30, K)
    projector = make_projector(starts="nearest", candidates=own, radius="auto")
    before = projector.project(images)
    own.zero_()
    assert same(projector.project(images), before), "they are copied"
    projector.candidates[:15] = candidate_latents(1, 15, K)
    expected = make_projector(starts="nearest", candidates=projector.candidates, radius="auto")
    assert same(projector.project(images), expected.project(images))
    assert not same(projector.project(images), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"starts": "near"}, r"starts must be one of random, nearest, got 'near'"),
        ({"start_std": 0}, r"start_std must be above 0, got 0"),
        ({"candidates": 0}, r"candidates must be at least 1, got 0"),
        ({"candidates": 2.5}, r"candidates must be an int, got float"),
        ({"candidates": torch.ones(3)}, r"candidates must be a count or latents \[N, k\].* got shape \[3\]"),
        ({"candidates": torch.ones(3, K, dtype=torch.int64)}, r"candidates must have a floating dtype"),
        ({"candidates": torch.full((3, K), math.nan)}, r"candidates must be finite"),
        (
            {"starts": "nearest", "candidates": torch.ones(3, 5)},
            rf"candidates must have shape \[N, {K}\], got \[3, 5\]",
        ),
        ({"starts": "nearest", "candidates": 2}, r"candidates must be at least restarts \(3\), got 2"),
        ({"radius": "big"}, r"radius must be None, \"auto\" or a number, got 'big'"),
        ({"radius": -1.0}, r"radius must lie in \(0, 1e\+18\], got -1"),
        ({"keep": 3}, r"keep must be None or pairs \(step, rows\), got int"),
        ({"keep": (3, 1)}, r"keep must hold pairs \(step, rows\), got 3"),
        ({"keep": ((5, 1),)}, r"keep's steps must ascend and lie below steps \(5\)"),
        ({"keep": ((2, 2), (2, 1))}, r"keep's steps must ascend and lie below steps \(5\)"),
        ({"keep": ((2, 3),)}, r"keep's rows must descend and lie below restarts \(3\)"),
        ({"keep": ((1, 2), (2, 2))}, r"keep's rows must descend and lie below restarts \(3\)"),
        ({"keep": ((1, 0),)}, r"keep's rows must be at least 1, got 0"),
        ({"steps": 0}, r"steps must be at least 1, got 0"),
        ({"latent_size": 5}, r"latent_size must be one that the generator takes: with latents \[3, 5\] it"),
    ],
)
def test_settings_out_of_their_range(settings: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}") as caught:
        make_projector(**settings)
    one_line(caught)
    projector, images = make_projector(), make_images(make_generator())
    if "latent_size" not in settings:
        for name, value in settings.items():
            setattr(projector, name, value)
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            projector(images)


def test_starting_points_of_the_callers_own_exclude_the_nearest(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r'^z0 must be None with starts="nearest"') as caught:
        make_projector(**NEAREST).project(images, z0=torch.zeros(3, K))
    one_line(caught)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [500, candidate_latents(0, 500, K)], ids=["drawn", "own"])
def test_candidates_beyond_the_memory_are_left_out_and_said_once(
    images: Tensor, backend: str, given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "MAX_BYTES", 60 * 2 * 28 * 28)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        projector = make_projector(backend=backend, **{**NEAREST, "candidates": given})
        found = projector.project(images)
    assert [str(one.message)[:31] for one in caught] == ["candidates: 60 of 500 are used,"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(projector.project(images), found)
        assert same(make_projector(backend=backend, **NEAREST).project(images), found)
    with pytest.raises(ValueError, match=r"at least restarts \(61\), got 60 that fit in 200 MB .*\(of 500\)"):
        make_projector(backend=backend, **{**NEAREST, "candidates": given, "restarts": 61})(images)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("own", [False, True])
def test_copies_files_and_state(images: Tensor, backend: str, own: bool) -> None:
    given = candidate_latents(9, 30, K) if own else 60
    settings = {**NEAREST, "candidates": given, "radius": "auto", "backend": backend}
    generator = make_generator()
    projector = make_projector(generator, **settings)
    assert all(key.startswith("generator.") for key in projector.state_dict())
    assert not list(projector.buffers(recurse=False))
    expected = projector.project(images)
    for twin in (copy.deepcopy(projector), pickle.loads(pickle.dumps(projector))):
        assert same(twin.project(images), expected)
    projector.to(torch.float64).to(torch.float32)
    assert same(projector.project(images), expected)
    with torch.device("meta"):
        assert same(make_projector(generator, **settings).project(images), expected)
    with torch.inference_mode():
        assert same(make_projector(generator, **settings).project(images), expected)
    assert ("<30 latents>" if own else "candidates=60") in repr(projector)
    assert "starts='nearest'" in repr(projector)
    assert "radius=auto" in repr(projector)
    moved = make_projector(generator, **settings)
    moved._apply(lambda tensor: tensor.to("meta"))
    kept = moved.candidates if own else moved._latents
    assert kept.device.type == "cpu", "on the meta device they would be lost"


class Hidden(nn.Module):
    """Does not tell its latent size."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_generator()

    def forward(self, z: Tensor) -> Tensor:
        return self.inner(z * torch.ones(1, K))

    def modules(self):
        return iter(())


@pytest.mark.filterwarnings("ignore:running on the reference path")
def test_a_latent_size_given_by_hand(images: Tensor) -> None:
    silent = Projector(Hidden(), steps=2, restarts=2)
    with pytest.raises(ValueError, match="does not tell its latent size"):
        silent(images)
    told = Projector(Hidden(), steps=2, restarts=2, latent_size=K).project(images)
    expected = make_projector(steps=2, restarts=2, lr=10.0, backend="reference").project(images)
    torch.testing.assert_close(told.all_errors, expected.all_errors, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rows_that_are_kept_are_the_best_ones(images: Tensor, backend: str) -> None:
    generator = make_generator()
    keep = ((2, 3), (4, 1))
    found = make_projector(generator, backend=backend, steps=7, restarts=5, keep=keep).project(images)
    rates = reference.learning_rates(7, 8.0, 0.1, 0.8)
    z0 = starting_points(0, 5, K).double()
    twin = copy.deepcopy(generator).double()
    _, expected, steps = reference.project_keeping(twin, images.double(), z0, rates, 0.7, keep)
    assert steps.sort(dim=1).values.tolist() == [[2, 2, 4, 4, 7]] * 4
    torch.testing.assert_close(found.all_errors.double(), expected, rtol=1e-3, atol=1e-6)
    for i, image in enumerate(images):  # by one descent for each number of steps
        for restart, taken in enumerate(steps[i].tolist()):
            _, error = reference.project(
                twin, image[None].double(), z0[restart : restart + 1], rates[:taken], 0.7
            )
            torch.testing.assert_close(expected[i, restart], error[0, 0])


@kernels
@pytest.mark.parametrize("seed", [0, None])
def test_compiled_and_exported_with_a_dynamic_batch(images: Tensor, seed: int | None) -> None:
    settings = {**NEAREST, "radius": "auto", "keep": ((2, 1),), "seed": seed}
    projector = make_projector(**settings)
    torch._dynamo.reset()
    compiled = torch.compile(projector, fullgraph=True, dynamic=True, backend="aot_eager")
    batch = torch.export.Dim("batch")
    exported = torch.export.export(projector, (images,), dynamic_shapes=({0: batch},))
    for x in (images, images[:3], images.repeat(2, 1, 1, 1)):
        torch.manual_seed(1)
        expected = projector(x)
        if seed is not None:
            assert torch.equal(compiled(x), expected)
            assert torch.equal(exported.module()(x), expected)
        else:
            assert compiled(x).shape == exported.module()(x).shape == expected.shape
    other = torch.compile(lambda x: projector.project(x, seed=5).latents, fullgraph=True, backend="aot_eager")
    assert torch.equal(other(images), projector.project(images, seed=5).latents)


class Nearest(torch.utils.data.Dataset):
    """Projects inside the worker."""

    def __init__(self, projector: Projector, images: Tensor) -> None:
        self.projector, self.images = projector, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.projector(self.images[i : i + 1])[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inside_forked_workers(images: Tensor, backend: str) -> None:
    """The parent has decoded the candidates before the fork; the children find them, and decode after a change."""
    projector = make_projector(backend=backend, radius="auto", **NEAREST)
    for scale in (1.0, 0.5):
        projector.generator.linear.weight.data.mul_(scale)
        expected = projector(images) if scale == 1 else None
        loader = torch.utils.data.DataLoader(
            Nearest(projector, images), 2, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        found = torch.cat(list(loader))
        expected = projector(images) if expected is None else expected
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
