"""The figures against their definitions and other software."""

import pytest
import torch
from scipy.stats import binomtest

from defgan_fast import data
from defgan_fast.evaluation import metrics, transfer
from defgan_fast.evaluation.projection import Reconstructions


@pytest.mark.parametrize(
    ("hits", "count"), [(0, 1), (1, 1), (0, 100), (100, 100), (3, 7), (641, 1000), (1, 10_000)]
)
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_interval_is_wilsons(hits, count, confidence):
    expected = binomtest(hits, count).proportion_ci(confidence, method="wilson")
    assert metrics.interval(hits, count, confidence) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_interval_refuses_what_is_no_share():
    with pytest.raises(ValueError, match=r"hits must be at most 4, got 5"):
        metrics.interval(5, 4)
    with pytest.raises(ValueError, match=r"count must be at least 1, got 0"):
        metrics.interval(0, 0)
    with pytest.raises(ValueError, match=r"confidence must"):
        metrics.interval(1, 2, 1.0)


def test_auc_counts_pairs():
    clean, attacked = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.25, 0.4])
    pairs = [(a > c).item() for c in clean for a in attacked]
    assert metrics.auc(clean, attacked) == pytest.approx(sum(pairs) / len(pairs))


class Brightness(torch.nn.Module):
    """Class 1 where the mean is above one half."""

    def forward(self, images):
        level = images.mean((1, 2, 3))
        return torch.stack((0.5 - level, level - 0.5), 1)


def test_defend_judges_images_before_and_after():
    images = torch.tensor([0.3, 0.6, 0.7]).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    dataset = data.Dataset(images, torch.tensor([0, 1, 0]), (0.0, 1.0))
    attacked = transfer.attacked(Brightness(), dataset, 0.25)
    assert torch.allclose(attacked.images[:, 0, 0, 0], torch.tensor([0.55, 0.35, 0.95]))
    assert attacked.labels is dataset.labels
    found = transfer.defend(
        Brightness(), attacked, lambda given: Reconstructions(1 - given, given.mean((1, 2, 3)))
    )
    assert found.accuracy == 0
    assert found.accuracy_defended == 1
    wide = data.Dataset(images * 2 - 1, dataset.labels, (-1.0, 1.0))
    assert transfer.attacked(Brightness(), wide, 0.9).images.min() == pytest.approx(-0.7)


def test_the_attack_is_made_in_batches_of_one_size():
    images = torch.rand(300, 1, 4, 4)
    sizes = []

    class Watching(Brightness):
        def forward(self, images):
            sizes.append(len(images))
            return super().forward(images)

    transfer.attacked(Watching(), data.Dataset(images, torch.zeros(300, dtype=torch.int64), (0.0, 1.0)))
    assert sizes == [256, 44]
