"""Defences to compare with, in one shape: an ``nn.Module`` from images to images that stands before the classifier.

No defence is ``torch.nn.Identity()``, or ``defence=None`` in an evaluation. MagNet's reformer and detector are here.
Adversarial training is no module of its own but a classifier, ``defgan-fast train classifier --adversarial 0.3``, and
so are Defense-GAN-Orig and -Rec: the same projector before a classifier that was trained on images, or on their
reconstructions.
"""

from defgan_fast.baselines.magnet import MagnetDetector, Reformer

__all__ = ["MagnetDetector", "Reformer"]
