#!/usr/bin/env python3
"""The README's picture: digits that the shipped generator draws, attacked, and reconstructed by the projector.

    python bench/picture.py docs/defence.png

No image of a data set may be committed, so these digits are the generator's own, of which the classifier is sure.
`defgan-fast demo` draws the same picture of handwritten ones. A number above an image is what the classifier reads.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import defgan_fast as dg
from defgan_fast.attacks import fgsm
from defgan_fast.evaluation.transfer import EPSILON

SURE = 0.99


def draw_digits(generator: torch.nn.Module, classifier: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """One drawn digit of each class, [10, 1, 28, 28], and its labels, [10]."""
    latents = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = generator(latents)
        sureness, classes = classifier(images).softmax(1).max(1)
    first = [int(((classes == digit) & (sureness > SURE)).nonzero()[0]) for digit in range(10)]
    return images[first], classes[first]


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    generator, classifier = dg.load_generator("digits").eval(), dg.load_classifier("digits").eval()
    images, labels = draw_digits(generator, classifier)
    attacked = fgsm(classifier, images, labels, EPSILON)
    with torch.no_grad():
        rows = {"drawn": images, "attacked": attacked, "projected": dg.Projector(generator)(attacked)}
        read = {name: classifier(shown).argmax(1) for name, shown in rows.items()}
    figure, axes = plt.subplots(3, 10, figsize=(8, 3), layout="constrained")
    for line, (name, shown) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for axis, image, answer, label in zip(line, shown, read[name], labels, strict=True):
            axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axis.set_title(str(int(answer)), fontsize=9, color="green" if answer == label else "red", pad=2)
            axis.set(xticks=[], yticks=[])
    drawing = io.BytesIO()
    figure.savefig(drawing, dpi=100)
    Image.open(drawing).convert("RGB").quantize(48).save(sys.argv[1], optimize=True)  # a quarter of the bytes


if __name__ == "__main__":
    main()
