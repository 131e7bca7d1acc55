"""The draw of candidates, and that it left the random starting points as they were."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from defgan_fast.candidates import candidate_latents, candidates_that_fit, sure_candidates
from defgan_fast.starts import starting_points


@pytest.mark.parametrize("latent_size", [1, 7, 128])
def test_a_candidate_depends_on_seed_and_index_alone(latent_size: int) -> None:
    many = candidate_latents(5, 3000, latent_size)
    for count in (0, 1, 1024, 1025):
        assert torch.equal(candidate_latents(5, count, latent_size), many[:count])
    assert not torch.equal(candidate_latents(6, 10, latent_size), many[:10])
    assert many.unique(dim=0).shape[0] == 3000


def test_a_candidate_is_what_philox_counts() -> None:
    words = np.random.Philox(key=np.array([5, 2**64 - 1], dtype=np.uint64)).random_raw(3 * 8)[2 * 8 :]
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    length, angle = np.sqrt(-2 * np.log(uniform[:4])), 2 * np.pi * uniform[4:]
    wanted = np.concatenate([length * np.cos(angle), length * np.sin(angle)])[:7]
    assert torch.allclose(candidate_latents(5, 3, 7)[2], torch.from_numpy(wanted).float(), rtol=1e-6)


def test_candidates_are_normal_and_no_restarts() -> None:
    latents = candidate_latents(0, 4096, 64, std=2.0)
    assert abs(latents.mean().item()) < 0.02
    assert abs(latents.std().item() - 2.0) < 0.02
    assert abs(torch.corrcoef(latents.T).fill_diagonal_(0)).max() < 0.1
    restarts = starting_points(0, 16, 64) * 8
    assert not torch.isclose(candidate_latents(0, 16, 64)[:, None], restarts[None]).all(2).any()


def test_candidates_on_a_sphere() -> None:
    latents = candidate_latents(0, 500, 30, radius=5.5)
    assert torch.allclose(latents.norm(dim=1), torch.full((500,), 5.5), rtol=1e-6)
    assert torch.allclose(
        latents, 5.5 * nn.functional.normalize(candidate_latents(0, 500, 30)), rtol=1e-5, atol=1e-6
    )


def test_what_fits() -> None:
    assert candidates_that_fit((1, 28, 28)) > 100_000
    assert candidates_that_fit((3, 64, 64)) == 8533


def test_the_draw_is_an_op() -> None:
    torch.library.opcheck(torch.ops.defgan_fast.candidate_latents.default, (3, 20, 5, 1.0, 2.0))


def test_starting_points_keep_their_bits() -> None:
    digest = hashlib.sha256()
    for seed in (0, 5, -3, 2**63):
        for restarts, latent_size in ((1, 1), (10, 128), (33, 7), (3, 64), (10, 100)):
            digest.update(starting_points(seed, restarts, latent_size).numpy().tobytes())
    assert digest.hexdigest() == "967fc8b4ab3808c4dea401b71c616796b21bf15950e21428246a8dd2a9163f6b"


class Sure(nn.Module):
    """Sure where an image is bright, by the mean of its pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = images.flatten(1).mean(1)
        return torch.stack([40 * (bright - 0.5), torch.zeros_like(bright)], 1)


@pytest.mark.parametrize("radius", ["auto", None, 2.0])
def test_sure_candidates_are_those_of_the_draw_that_the_classifier_is_sure_of(radius) -> None:
    generator = nn.Sequential(nn.Linear(4, 9), nn.Sigmoid(), nn.Unflatten(1, (1, 3, 3)))
    found = sure_candidates(generator, Sure(), 30, probability=0.9, seed=5, radius=radius)
    drawn = candidate_latents(5, 3000, 4, radius=2.0 if radius is not None else None)
    expected = drawn[Sure()(generator(drawn)).softmax(1).amax(1) >= 0.9]
    assert torch.equal(found, expected[:30])
    assert not torch.equal(found, drawn[:30]), "some must be left out"
    fewer = sure_candidates(generator, Sure(), 7, probability=0.9, seed=5, radius=radius)
    assert torch.equal(fewer, found[:7])


def test_too_few_sure_candidates_are_an_error_of_one_line() -> None:
    generator = nn.Sequential(nn.Linear(4, 9), nn.Sigmoid(), nn.Unflatten(1, (1, 3, 3)))
    with pytest.raises(
        ValueError, match=r"^count must be .* got 5: of 2048 draws it gives \d a probability"
    ) as caught:
        sure_candidates(generator, Sure(), 5, probability=1 - 1e-9, most_draws=2048)
    assert "\n" not in str(caught.value)
    for arguments in ({"count": 0}, {"probability": 1.0}, {"radius": -1.0}, {"most_draws": 3}, {"seed": 0.5}):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(arguments))} must "):
            sure_candidates(generator, Sure(), **{"count": 5, **arguments})
