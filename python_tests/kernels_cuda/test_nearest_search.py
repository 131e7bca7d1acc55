"""The CUDA kernels that find the nearest candidates, executed on the CPU, against the specification in float64."""

from __future__ import annotations

import pytest
import torch
from on_cpu import Kept, kernels
from torch import Tensor, nn

from defgan_fast import reference
from defgan_fast.candidates import candidate_latents
from defgan_fast.plan import lower

LEVELS = 8191


class Case:
    """A generator whose decoded candidates are exactly these images of whole numbers, [N, C, H, W]."""

    def __init__(self, candidates: Tensor) -> None:
        count, *shape = candidates.shape
        self.candidates, self.latents, self.kept = candidates, torch.eye(count), Kept()
        self.generator = nn.Sequential(
            nn.Linear(count, candidates[0].numel(), bias=False), nn.Unflatten(1, shape)
        ).eval()
        with torch.no_grad():
            self.generator[0].weight.copy_(candidates.flatten(1).T)
        self.plan = lower(self.generator, count)

    def nearest(self, images: Tensor, restarts: int, draws: Tensor | None = None, **options: int) -> Tensor:
        parameters = self.plan.tensors(self.generator)
        return kernels().nearest(
            images, self.latents, parameters, self.plan.text, restarts, draws, self.kept, **options
        )


def whole_numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def exact_images(count: int, *shape: int, seed: int = 1) -> Tensor:
    """Few distinct values, hence ties, and one pixel that sets the scale to one level a unit."""
    images = whole_numbers(count, *shape, seed=seed)
    images[0].view(-1)[0] = LEVELS
    return images


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 5, 5), (3, 13, 14)])
@pytest.mark.parametrize(("count", "batch"), [(1, 1), (31, 3), (32, 8), (133, 9)])
def test_exact_order_with_ties(shape: tuple[int, ...], count: int, batch: int) -> None:
    candidates, images = exact_images(count, *shape), whole_numbers(batch, *shape, seed=2)
    draws = torch.arange(batch) * 2**40 - 5
    case = Case(candidates)
    for restarts in sorted({1, min(5, count)}):
        wanted = reference.nearest(images, candidates, restarts)
        assert torch.equal(case.nearest(images, restarts, seed=3), wanted)
        wanted = reference.nearest(images, candidates, restarts, draws)
        assert torch.equal(case.nearest(images, restarts, draws, blocks=3), wanted)


def test_all_restarts() -> None:
    candidates, images = exact_images(40, 1, 5, 5), whole_numbers(3, 1, 5, 5, seed=2)
    draws = torch.arange(3)
    assert torch.equal(Case(candidates).nearest(images, 40), reference.nearest(images, candidates, 40))
    assert torch.equal(
        Case(candidates).nearest(images, 40, draws), reference.nearest(images, candidates, 40, draws)
    )


def test_kept_candidates_are_decoded_once_and_anew_after_any_change() -> None:
    case = Case(exact_images(50, 1, 5, 5))
    images = whole_numbers(4, 1, 5, 5, seed=2)
    wanted = reference.nearest(images, case.candidates, 4)
    assert case.kept.valid.item() == 0
    assert torch.equal(case.nearest(images, 4), wanted)
    assert case.kept.valid.item() == 1
    # Nothing is decoded anew: what was kept is used although somebody spoilt it.
    kept = case.kept.memory.clone()
    words = 25 * 50 + 50 * 50  # the copy of the weights and latents comes first
    case.kept.memory[(4 * words + 255) // 256 * 32 :] = 0
    assert torch.equal(case.nearest(images, 4), torch.arange(4).expand(4, 4))
    case.kept.memory.copy_(kept)
    assert torch.equal(case.nearest(images, 4), wanted)
    # The last weight alone, then a latent alone.
    other = exact_images(50, 1, 5, 5)
    other[49, 0, 4, 4] = 700
    with torch.no_grad():
        case.generator[0].weight.copy_(other.flatten(1).T)
    assert torch.equal(case.nearest(images, 50), reference.nearest(images, other, 50))
    case.latents[7], case.latents[8] = case.latents[8].clone(), case.latents[7].clone()
    other[7], other[8] = other[8].clone(), other[7].clone()
    assert torch.equal(case.nearest(images, 50), reference.nearest(images, other, 50))


def test_images_that_are_not_finite_harm_nobody() -> None:
    candidates, images = exact_images(40, 1, 5, 5), whole_numbers(4, 1, 5, 5, seed=2)
    images[1, 0, 2, 2], images[3, 0, 0, 0] = torch.nan, torch.inf
    for draws in (None, torch.arange(4)):
        found = Case(candidates).nearest(images, 6, draws)
        assert torch.equal(found, reference.nearest(images, candidates, 6, draws))


@pytest.mark.parametrize("last", [nn.Sigmoid(), nn.Tanh(), nn.Identity()], ids=lambda m: type(m).__name__)
def test_bounded_and_unbounded_pixels(last: nn.Module) -> None:
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 49), nn.Unflatten(1, (1, 7, 7)), last
    )
    latents = candidate_latents(0, 70, 6, std=4.0)
    if isinstance(last, nn.Identity):
        latents[::9] = torch.inf
    plan = lower(generator.eval(), 6)
    decoded = generator(latents).detach()
    images = (decoded[1:8] + 0.05 * torch.randn(7, 1, 7, 7)).contiguous()
    found = kernels().nearest(images, latents, plan.tensors(generator), plan.text, 20)
    usable = decoded.flatten(1).isfinite().all(1)
    distances = (decoded.double()[None] - images.double()[:, None]).square().flatten(2).mean(2)
    distances[:, ~usable] = torch.inf
    level = decoded[usable].abs().max().item() / LEVELS
    least, chosen = distances.sort(1).values[:, :20], distances.gather(1, found)
    # Half a level in both images, and what float32 products of the decoding differ by.
    assert ((chosen - least).abs() <= 2 * level * least.sqrt() + level**2 + 1e-6 * least).all()
    assert (found[:, 0] == torch.arange(1, 8)).any()
