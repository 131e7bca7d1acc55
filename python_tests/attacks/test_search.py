"""The attacks without gradients, on a linear model whose best adversarial image is known."""

import pytest
import torch
from torch import nn

from defgan_fast.attacks import hop_skip_jump, noise, square
from defgan_fast.attacks.square import share_left

EPSILON = 0.1


class Ramp(nn.Module):
    """Logits (0, weights . change) - so that class 0 loses most by a change of epsilon times the weights' signs."""

    def __init__(self, threshold=50.0):
        super().__init__()
        self.weights = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.threshold = threshold

    def forward(self, images):
        score = ((images - 0.5) * self.weights).flatten(1).sum(1) - self.threshold
        return torch.stack((torch.zeros_like(score), score), 1)

    def gain(self, images):
        """Share of the largest possible change of the margin."""
        most = EPSILON * self.weights.abs().sum()
        return ((images - 0.5) * self.weights).flatten(1).sum(1) / most


IMAGES, LABELS = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.int64)


def test_square_gathers_its_gains_and_its_squares_shrink():
    model = Ramp()
    found = square(model, IMAGES, LABELS, EPSILON, queries=1500)
    assert (model.gain(found) > 0.9).all()
    assert model.gain(noise(model, IMAGES, LABELS, EPSILON, tries=1500)).max() < 0.6
    assert torch.allclose((found - IMAGES).abs(), torch.tensor(EPSILON)), (
        "every pixel is at an end of its interval"
    )


def test_the_shares_of_the_authors_schedule():
    shares = {0: 1.0, 10: 1.0, 11: 0.5, 51: 0.25, 201: 0.125, 8001: 2.0**-9}
    assert {query: share_left(query, 10_000) for query in shares} == shares
    assert share_left(6, 1000) == 0.25


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_hop_skip_jump_walks_to_the_nearest_point(norm):
    """The boundary is a plane: its nearest point is the threshold over the dual norm of the weights away."""
    model = Ramp(threshold=1.0)
    nearest = 1 / (model.weights.abs().sum() if norm == "linf" else model.weights.norm())
    for steps, slack in ((1, 2.0), (12, 1.1)):
        found = hop_skip_jump(model, IMAGES[:1], LABELS[:1], norm=norm, steps=steps, first_probes=200)
        change = (found - IMAGES[:1]).flatten()
        far = change.abs().max() if norm == "linf" else change.norm()
        assert nearest <= far * 1.0001
        assert far <= slack * nearest, (steps, float(far / nearest))


def test_hop_skip_jump_without_a_start_leaves_the_image():
    class Steadfast(nn.Module):
        def forward(self, images):
            return torch.tensor([[1.0, 0.0]]).expand(len(images), 2)

    assert torch.equal(hop_skip_jump(Steadfast(), IMAGES, LABELS, 0.3, start_tries=3), IMAGES)
    with pytest.raises(ValueError, match="starts must have the images' shape"):
        hop_skip_jump(Steadfast(), IMAGES, LABELS, 0.3, starts=IMAGES[:1])


def test_hop_skip_jump_takes_given_starts():
    """Only pictures of one pixel's pattern are broken, which noise does not find."""

    class Narrow(nn.Module):
        def forward(self, images):
            score = (images.flatten(1).std(1) < 1e-3).float() * (images.flatten(1).mean(1) > 0.8) - 0.5
            return torch.stack((torch.zeros_like(score), score), 1)

    start = torch.full_like(IMAGES, 0.95)
    assert torch.equal(hop_skip_jump(Narrow(), IMAGES, LABELS, start_tries=3, steps=0), IMAGES)
    found = hop_skip_jump(Narrow(), IMAGES, LABELS, starts=start, steps=0)
    assert torch.allclose(found, torch.tensor(0.8), atol=1e-3)
