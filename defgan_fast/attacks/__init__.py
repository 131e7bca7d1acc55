"""Attacks on classifiers, one per file, written over any ``nn.Module`` from images to logits.

An attack on a defended classifier is the same attack on ``nn.Sequential(projector, classifier)``, whose
gradient is the one that the projector was built with.
"""

from defgan_fast.attacks.fgsm import fgsm
from defgan_fast.attacks.pgd import pgd

__all__ = ["fgsm", "pgd"]
