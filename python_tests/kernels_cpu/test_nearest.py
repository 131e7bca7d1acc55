"""The op `nearest` against its specification in float64, on every instruction set."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from defgan_fast import reference
from defgan_fast.candidates import candidate_latents
from defgan_fast.kernels import extension, ops
from defgan_fast.plan import lower

pytestmark = pytest.mark.skipif(not ops.kernels_available, reason="needs the compiled kernels")

# Pixels on the kernels' levels (csrc/candidate_pixels.h): their distances are exact, so ties are ties.
LEVELS = 8191


@pytest.fixture(params=extension.module().instruction_sets() if ops.kernels_available else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = os.environ.get("DEFGAN_CPU_ISA")
    os.environ["DEFGAN_CPU_ISA"] = request.param
    yield request.param
    os.environ.pop("DEFGAN_CPU_ISA")
    if before is not None:
        os.environ["DEFGAN_CPU_ISA"] = before


class Case:
    """A generator, its candidates and what the op is called with."""

    def __init__(self, generator: nn.Module, latents: Tensor) -> None:
        self.generator, self.latents = generator.eval(), latents
        self.plan = lower(generator, latents.shape[1])

    def decoded(self) -> Tensor:
        parameters = [p.detach() for p in self.plan.tensors(self.generator)]
        return ops.decode(self.latents, parameters, self.plan.text, 0)

    def nearest(self, images: Tensor, restarts: int, draws: Tensor | None = None) -> Tensor:
        parameters = [p.detach() for p in self.plan.tensors(self.generator)]
        return ops.nearest(images, self.latents, parameters, self.plan.text, restarts, draws)


def exact_case(candidates: Tensor) -> Case:
    """Candidates whose decoded images are exactly these, of at most 8,191 levels: [N, C, H, W] whole numbers."""
    count, *shape = candidates.shape
    flat = candidates.flatten(1)
    # Coordinate 0 selects the brightest image, which sets the scale to one level a unit.
    generator = nn.Sequential(nn.Linear(count, flat.shape[1], bias=False), nn.Unflatten(1, shape))
    with torch.no_grad():
        generator[0].weight.copy_(flat.T)
    return Case(generator, torch.eye(count))


def whole_numbers(*shape: int, seed: int = 1, most: int = 40) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=source).float()


def exact_images(count: int, *shape: int, seed: int = 1) -> Tensor:
    """Candidates with few distinct values, hence ties, and one pixel that sets the scale."""
    images = whole_numbers(count, *shape, seed=seed, most=2)
    images[0].view(-1)[0] = LEVELS
    return images


SHAPES = [(1, 4, 4), (1, 5, 5), (3, 7, 9), (1, 28, 28)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("count", "batch"), [(1, 1), (15, 3), (16, 8), (131, 9), (300, 17)])
def test_exact_order_with_ties(instruction_set: str, shape: tuple[int, ...], count: int, batch: int) -> None:
    candidates = exact_images(count, *shape)
    images = whole_numbers(batch, *shape, seed=2, most=2)
    case = exact_case(candidates)
    assert torch.equal(case.decoded(), candidates)
    draws = torch.randint(-(2**62), 2**62, (batch,))
    for restarts in sorted({1, min(10, count), count}):
        wanted = reference.nearest(images, candidates, restarts)
        assert torch.equal(case.nearest(images, restarts), wanted)
        assert torch.equal(
            case.nearest(images, restarts, draws), reference.nearest(images, candidates, restarts, draws)
        )


def test_the_test_has_ties() -> None:
    candidates, images = exact_images(300, 1, 4, 4), whole_numbers(17, 1, 4, 4, seed=2, most=2)
    distances = (candidates[None] - images[:, None]).square().flatten(2).sum(2)
    found = distances.gather(1, reference.nearest(images, candidates, 300))
    assert (found[:, 1:] == found[:, :-1]).float().mean() > 0.5


def test_copies_come_in_order_of_index(instruction_set: str) -> None:
    one = exact_images(1, 1, 6, 6)
    case = exact_case(one.repeat(45, 1, 1, 1))
    assert torch.equal(case.nearest(one, 45), torch.arange(45)[None])


def generator_of(*layers: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*layers)


def sigmoid_generator() -> nn.Module:
    return generator_of(
        nn.Linear(12, 60), nn.ReLU(), nn.Linear(60, 3 * 64), nn.Unflatten(1, (3, 8, 8)), nn.Sigmoid()
    )


def tanh_generator() -> nn.Module:
    return generator_of(
        nn.Linear(12, 60), nn.ReLU(), nn.Linear(60, 81), nn.Unflatten(1, (1, 9, 9)), nn.Tanh()
    )


def unbounded_generator() -> nn.Module:
    return generator_of(nn.Linear(12, 60), nn.ReLU(), nn.Linear(60, 81), nn.Unflatten(1, (1, 9, 9)))


GENERATORS = [sigmoid_generator, tanh_generator, unbounded_generator]


def case_of(make: object, count: int = 500) -> Case:
    return Case(make(), candidate_latents(3, count, 12, std=3.0))  # type: ignore[operator]


@pytest.mark.parametrize("make", GENERATORS)
def test_distances_are_the_least(instruction_set: str, make: object) -> None:
    case = case_of(make)
    decoded = case.decoded()
    images = decoded[torch.arange(0, 500, 37)] + 0.05 * torch.randn(14, *decoded.shape[1:])
    distances = (decoded.double()[None] - images.double()[:, None]).square().flatten(2).mean(2)
    found = case.nearest(images, 500)
    assert torch.equal(found.sort(1).values, torch.arange(500).expand(14, 500))
    # A level is 1/8191 of half of the range; an error of half a level in both, against the distance's root.
    level = decoded.abs().max().item() / LEVELS
    tolerance = 2 * level * distances.sqrt() + level**2
    assert ((distances.gather(1, found) - distances.sort(1).values).abs() <= tolerance).all()


@pytest.mark.parametrize("make", GENERATORS)
def test_an_image_alone_has_the_same_indices(make: object) -> None:
    case = case_of(make)
    images = case.decoded()[:23] + 0.2 * torch.randn(23, *case.decoded().shape[1:])
    draws = torch.randint(-(2**62), 2**62, (23,))
    for own in (None, draws):
        whole = case.nearest(images, 7, own)
        for i in range(23):
            alone = case.nearest(images[i : i + 1], 7, None if own is None else own[i : i + 1])
            assert torch.equal(alone[0], whole[i])
        assert torch.equal(
            case.nearest(images.flip(0), 7, None if own is None else own.flip(0)), whole.flip(0)
        )
        assert torch.equal(case.nearest(images, 3, own), whole[:, :3])


def test_every_instruction_set_and_thread_count_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, images = exact_images(333, 1, 9, 9), whole_numbers(21, 1, 9, 9, seed=2)
    case = exact_case(candidates)
    before = torch.get_num_threads()
    results = []
    try:
        for name in extension.module().instruction_sets():
            monkeypatch.setenv("DEFGAN_CPU_ISA", name)
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(case.nearest(images, 20))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_many_images_in_blocks() -> None:
    candidates, images = exact_images(40, 1, 4, 4), whole_numbers(1100, 1, 4, 4, seed=2)
    case = exact_case(candidates)
    assert torch.equal(case.nearest(images, 5), reference.nearest(images, candidates, 5))


@pytest.mark.parametrize("change", ["in place", "data", "numpy", "load_state_dict", "optimiser"])
def test_changed_weights_are_noticed(change: str) -> None:
    case = exact_case(exact_images(50, 1, 5, 5))
    images = whole_numbers(6, 1, 5, 5, seed=2)
    before = case.nearest(images, 4)
    layer = case.generator[0]  # type: ignore[index]
    other = exact_images(50, 1, 5, 5, seed=9).flatten(1).T.contiguous()
    with torch.no_grad():
        if change == "in place":
            layer.weight.copy_(other)
        elif change == "data":
            layer.weight.data = other
        elif change == "numpy":
            layer.weight.detach().numpy()[:] = other.numpy()
        elif change == "load_state_dict":
            layer.load_state_dict({"weight": other})
        else:
            layer.weight.grad = layer.weight - other
            torch.optim.SGD([layer.weight], lr=1.0).step()
    after = case.nearest(images, 4)
    assert not torch.equal(after, before)
    assert torch.equal(after, reference.nearest(images, case.decoded(), 4))


def test_one_changed_candidate_is_noticed() -> None:
    case = exact_case(exact_images(50, 1, 5, 5))
    images = case.decoded()[20:21].clone()
    assert case.nearest(images, 1).item() == 20
    case.latents[20], case.latents[41] = case.latents[41].clone(), case.latents[20].clone()
    assert case.nearest(images, 1).item() == 41


def test_images_that_are_not_finite_harm_nobody(instruction_set: str) -> None:
    candidates = exact_images(64, 1, 5, 5)
    case = exact_case(candidates)
    images = whole_numbers(5, 1, 5, 5, seed=2)
    wanted = case.nearest(images, 6)
    images[1, 0, 2, 2], images[3, 0, 0, 0] = torch.nan, torch.inf
    found = case.nearest(images, 6)
    assert torch.equal(found[[0, 2, 4]], wanted[[0, 2, 4]])
    assert torch.equal(found[[1, 3]], torch.arange(6).expand(2, 6))
    assert torch.equal(found, reference.nearest(images, candidates, 6))


def test_candidates_that_are_not_finite_come_last() -> None:
    case = case_of(unbounded_generator, 40)
    case.latents[::3] = torch.inf
    images = torch.randn(4, 1, 9, 9)
    draws = torch.arange(4)
    for own in (None, draws):
        found = case.nearest(images, 40, own)
        assert (found[:, :26] % 3 != 0).all()
        assert (found[:, 26:] % 3 == 0).all()
        assert torch.equal(found[:, 26:], reference.nearest(images, case.decoded(), 40, own)[:, 26:])


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-3, 3.0, 1e4, 1e20])
def test_images_of_any_magnitude(factor: float) -> None:
    candidates = exact_images(200, 1, 5, 5)
    case = exact_case(candidates)
    images = factor * whole_numbers(8, 1, 5, 5, seed=2)
    found = case.nearest(images, 200)
    distances = (candidates.double()[None] - images.double()[:, None]).square().flatten(2).sum(2)
    # By the score, since |x|^2 of a bright image leaves no digits for the rest in float64.
    scores = (
        candidates.double().flatten(1).square().sum(1)
        - 2 * images.double().flatten(1) @ candidates.double().flatten(1).T
    )
    unit = max(1.0, images.abs().max().item() / LEVELS)
    tolerance = 2 * unit * candidates.double().flatten(1).abs().sum(1).max()
    assert distances.shape == found.shape
    assert ((scores.gather(1, found) - scores.sort(1).values).abs() <= tolerance).all()


def test_empty_batch() -> None:
    case = exact_case(exact_images(10, 1, 5, 5))
    assert case.nearest(torch.zeros(0, 1, 5, 5), 3).shape == (0, 3)
    assert case.nearest(torch.zeros(0, 1, 5, 5), 3, torch.zeros(0, dtype=torch.int64)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_images_and_strides(dtype: torch.dtype) -> None:
    candidates = exact_images(60, 3, 4, 6)
    case = exact_case(candidates)
    images = whole_numbers(4, 3, 4, 6, seed=2)
    wanted = reference.nearest(images, candidates, 5)
    assert torch.equal(case.nearest(images.to(dtype), 5), wanted)
    assert torch.equal(case.nearest(images.to(memory_format=torch.channels_last), 5), wanted)


def test_half_of_the_candidates_is_drawn() -> None:
    draws = torch.tensor([0, 1, 2, -1, 2**62])
    part = reference.takes_part(draws, 1000)
    assert (part.sum(1) == 500).all()
    assert (part[:, ::2] ^ part[:, 1::2]).all()
    agreement = (part[:, None] == part[None]).float().mean(2)[~torch.eye(5, dtype=torch.bool)]
    assert ((agreement > 0.4) & (agreement < 0.6)).all()
    # Over many draws each candidate takes part in a half of them.
    share = reference.takes_part(torch.arange(4000), 300).float().mean(0)
    assert ((share > 0.46) & (share < 0.54)).all()


def test_a_drawn_candidate_comes_before_all_others() -> None:
    case = exact_case(exact_images(64, 1, 5, 5))
    images, draws = whole_numbers(9, 1, 5, 5, seed=2), torch.arange(9)
    part = reference.takes_part(draws, 64)
    found = case.nearest(images, 64, draws)
    assert part.gather(1, found[:, :32]).all()
    assert not part.gather(1, found[:, 32:]).any()


def test_opcheck() -> None:
    case = exact_case(exact_images(20, 1, 4, 4))
    parameters = [p.detach() for p in case.plan.tensors(case.generator)]
    for draws in (None, torch.arange(3)):
        arguments = (whole_numbers(3, 1, 4, 4), case.latents, parameters, case.plan.text, 2, draws)
        torch.library.opcheck(torch.ops.defgan_fast.nearest.default, arguments)


def test_fork() -> None:
    case = exact_case(exact_images(50, 1, 5, 5))
    images = whole_numbers(6, 1, 5, 5, seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = case.nearest(images, 4)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(case.nearest(images, 4), wanted) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 1, 5, 4)}, r"images must have shape \[B, 1, 5, 5\], got \[2, 1, 5, 4\]"),
        ({"images": torch.zeros(2, 1, 5, 5, dtype=torch.uint8)}, "images must have dtype .*, got uint8"),
        ({"candidates": torch.zeros(0, 10)}, r"candidates must have shape \[N, 10\] with N at least 1"),
        ({"candidates": torch.zeros(3, 9)}, r"candidates must have shape \[N, 10\] .*, got \[3, 9\]"),
        (
            {"restarts": 11},
            r"restarts must be at least 1 and at most the number of candidates \(10\), got 11",
        ),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"draws": torch.zeros(3, dtype=torch.int64)}, r"draws must have shape \[2\], got \[3\]"),
        ({"draws": torch.zeros(2)}, "draws must have dtype int64, got float32"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    case = exact_case(exact_images(10, 1, 5, 5))
    arguments: dict[str, object] = {
        "images": torch.zeros(2, 1, 5, 5),
        "candidates": case.latents,
        "parameters": [p.detach() for p in case.plan.tensors(case.generator)],
        "plan": case.plan.text,
        "restarts": 2,
        "draws": None,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.defgan_fast.nearest(**(arguments | change))
