"""The best point of every image so far: what an attack returns, which is seldom the last point that it looked at."""

from __future__ import annotations

import torch
from torch import Tensor


class Record:
    """Keeps, for each image, the point that fooled most copies, and among those the one of the highest score.

    Args:
        images: [N, C, H, W]; an image for which nothing better was offered is returned as it is.

    Attributes:
        points: [N, C, H, W], the best so far.
        wrong: [N] float32, the share of copies that the point fools; -1 where nothing was offered.
        scores: [N] float64.
    """

    def __init__(self, images: Tensor) -> None:
        self.points = images.detach().clone()
        self.wrong = torch.full((len(images),), -1.0, device=images.device)
        self.scores = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)

    @property
    def broken(self) -> Tensor:
        """Which images have a point that fools every copy, [N] bool."""
        return self.wrong == 1

    def offer(self, rows: Tensor, points: Tensor, wrong: Tensor, scores: Tensor, allowed: Tensor) -> Tensor:
        """Takes the points that are better than what is kept.

        Args:
            rows: [M] int64, the images that the points belong to, each at most once.
            points: [M, C, H, W].
            wrong: [M], share of copies fooled.
            scores: [M], more is better.
            allowed: [M] bool, whether a point may be taken at all: whether it is inside the budget.

        Returns:
            Which points were taken, [M] bool.
        """
        scores = scores.double()
        equal = (wrong == self.wrong[rows]) & (scores > self.scores[rows])
        taken = allowed & ((wrong > self.wrong[rows]) | equal)
        chosen = rows[taken]
        self.points[chosen] = points[taken].to(self.points.dtype)
        self.wrong[chosen] = wrong[taken].float()
        self.scores[chosen] = scores[taken]
        return taken
