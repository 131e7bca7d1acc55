"""MagNet (Meng and Chen, "MagNet: a two-pronged defense against adversarial examples", CCS 2017).

The reformer replaces an image by its reconstruction, with an autoencoder drawn at random from a collection for each
image, so that an attacker does not know which one he attacks. The detector calls an image an attack where an
autoencoder reconstructs it badly. Both pass gradients: Carlini and Wagner ("MagNet and efficient defenses against
adversarial attacks are not robust", 2017) broke MagNet through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defgan_fast import arguments

NORMS = {"l1": 1, "l2": 2}


class Reformer(nn.Module):
    """MagNet's defence: each image through one autoencoder of a collection, drawn at random.

    Args:
        members: at least one autoencoder, all for images of the same shape; put in eval mode.
        seed: of the draws. An int: member i of the batch meets the same autoencoder at every call, so that
            results can be repeated. None: a fresh draw at each call, from torch's global random state.

    Raises:
        ValueError: there is no member.

    Example:
        >>> defended = nn.Sequential(Reformer([first, second]), classifier)
    """

    def __init__(self, members: Sequence[nn.Module], seed: int | None = 0) -> None:
        super().__init__()
        if not members:
            raise ValueError("members must hold at least one autoencoder, got none")
        self.members = nn.ModuleList(members)
        self.seed = arguments.seed(seed)
        self.eval()

    def train(self, mode: bool = True) -> Reformer:
        """Stays in eval mode, as a defence must when an attack library switches modes."""
        return super().train(False)

    def choose(self, count: int) -> Tensor:
        """Returns the member for each image, [count] int64."""
        source = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        return torch.randint(len(self.members), (count,), generator=source)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the reformed images, [N, C, H, W]; differentiable, with each image's own member."""
        chosen = self.choose(len(images)).to(images.device)
        result = torch.empty_like(images)
        for index, member in enumerate(self.members):
            rows = (chosen == index).nonzero().squeeze(1)
            if len(rows):
                result = result.index_copy(0, rows, member(images[rows]))
        return result


class MagnetDetector(nn.Module):
    """MagNet's detector by reconstruction error: an image is an attack where any autoencoder finds it too far away.

    Each autoencoder has a threshold of its own, and the false-positive rate is shared out equally among them, as in
    the paper. The score of an image is the largest of its errors in units of their thresholds, so that it is an attack
    above 1.

    Args:
        members: at least one autoencoder; put in eval mode.
        norm: of the error, "l1" or "l2": the mean over the pixels of the difference to the power 1 or 2.

    Attributes:
        thresholds: [M] float32, part of the state; NaN until `fit`.

    Example:
        >>> detector = MagnetDetector([first, second]).fit(clean_images, fpr=0.01)
        >>> detector.predict(images)
    """

    thresholds: Tensor

    def __init__(self, members: Sequence[nn.Module], norm: str = "l1") -> None:
        super().__init__()
        if not members:
            raise ValueError("members must hold at least one autoencoder, got none")
        self.members = nn.ModuleList(members)
        self.norm = arguments.choice("norm", norm, NORMS)
        self.register_buffer("thresholds", torch.full((len(members),), math.nan))
        self.eval()

    def train(self, mode: bool = True) -> MagnetDetector:
        """Stays in eval mode, as a defence must when an attack library switches modes."""
        return super().train(False)

    def errors(self, images: Tensor) -> Tensor:
        """Returns the error of each autoencoder, images [N, C, H, W] -> [N, M]; differentiable."""
        power = NORMS[self.norm]
        found = [(member(images) - images).abs().pow(power).flatten(1).mean(1) for member in self.members]
        return torch.stack(found, 1)

    @torch.no_grad()
    def fit(self, clean_images: Tensor, fpr: float = 0.05) -> MagnetDetector:
        """Sets each threshold to the least error that at most its share of the clean images exceeds.

        Args:
            clean_images: [N, C, H, W], N at least 1.
            fpr: false-positive rate of all autoencoders together, in (0, 1).

        Returns:
            The detector itself.
        """
        fpr = arguments.number("fpr", fpr, above=0, below=1)
        if not len(clean_images):
            raise ValueError("clean_images must hold at least one image, got 0")
        errors = self.errors(clean_images)
        if not bool(errors.isfinite().all()):
            raise ValueError("clean_images must have finite reconstruction errors, got some that are not")
        allowed = math.floor(fpr / len(self.members) * len(errors))
        self.thresholds.copy_(errors.sort(0).values[len(errors) - 1 - allowed])
        return self

    def score(self, images: Tensor) -> Tensor:
        """Returns the largest error in units of its threshold, [N, C, H, W] -> [N]; differentiable.

        Raises:
            RuntimeError: `fit` has not been called.
        """
        if bool(self.thresholds.isnan().any()):
            raise RuntimeError("the detector has no thresholds yet: call fit(clean_images) first")
        return (self.errors(images) / self.thresholds).amax(1)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Returns which images are attacks, [N, C, H, W] -> [N] bool; NaN counts as one."""
        return ~(self.score(images) <= 1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the same as `predict`."""
        return self.predict(images)
