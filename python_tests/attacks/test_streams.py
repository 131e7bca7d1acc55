"""Random numbers of an image's own: the same wherever the image is, others for every other image and seed."""

import pytest
import torch

from defgan_fast.attacks._streams import Streams

ROWS = torch.arange(3)


def images():
    return torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_numbers_belong_to_image_seed_and_purpose():
    x = images()
    drawn = Streams(x, 1, "a").uniform(ROWS, (5,))
    assert torch.equal(drawn, Streams(x, 1, "a").uniform(ROWS, (5,)))
    assert torch.equal(drawn[2:], Streams(x[2:], 1, "a").uniform(ROWS[:1], (5,)))
    assert torch.equal(drawn, Streams(x.double(), 1, "a").uniform(ROWS, (5,)))
    assert len(drawn.flatten().unique()) == 15, "images share no numbers"
    assert not torch.equal(drawn, Streams(x, 2, "a").uniform(ROWS, (5,)))
    assert not torch.equal(drawn, Streams(x, 1, "b").uniform(ROWS, (5,)))


def test_a_stream_moves_on_only_when_its_image_draws():
    x = images()
    whole, parts = Streams(x, 0, "a"), Streams(x, 0, "a")
    first, second = whole.uniform(ROWS, (4,)), whole.uniform(ROWS, (4,))
    assert not torch.equal(first, second)
    parts.uniform(ROWS, (4,))
    assert torch.equal(parts.uniform(ROWS[1:2], (4,)), second[1:2])
    assert torch.equal(parts.uniform(ROWS[[0, 2]], (4,)), second[[0, 2]])


def test_distributions():
    streams = Streams(images(), 0, "a")
    uniform, normal = streams.uniform(ROWS, (2, 20_000)), streams.normal(ROWS, (39_999,))
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.005)
    assert uniform.var() == pytest.approx(1 / 12, abs=0.002)
    assert normal.shape == (3, 39_999)
    assert normal.mean() == pytest.approx(0, abs=0.01)
    assert normal.std() == pytest.approx(1, abs=0.01)
    assert normal.pow(4).mean() == pytest.approx(3, abs=0.1)
    with pytest.raises(ValueError, match="seed must be an int, got None"):
        Streams(images(), None, "a")
