"""Attacks on classifiers, one per file, written over any ``nn.Module`` from images to logits.

An attack on a defended classifier is the same attack on ``nn.Sequential(projector, classifier)``, whose
gradient is the one that the projector was built with. Every attack takes ``(model, images, labels)``, its own
settings, ``seed`` and ``progress``, and returns adversarial images; ``docs/attacks.md`` has a table of them.
"""

from defgan_fast.attacks.carlini_wagner import cw
from defgan_fast.attacks.evade import evade
from defgan_fast.attacks.fgsm import fgsm
from defgan_fast.attacks.hop_skip_jump import hop_skip_jump
from defgan_fast.attacks.latent import latent_cw, latent_lagrange
from defgan_fast.attacks.noise import noise
from defgan_fast.attacks.pgd import pgd
from defgan_fast.attacks.rand_fgsm import rand_fgsm
from defgan_fast.attacks.square import square
from defgan_fast.attacks.substitute import black_box, train_substitute

__all__ = [
    "black_box",
    "cw",
    "evade",
    "fgsm",
    "hop_skip_jump",
    "latent_cw",
    "latent_lagrange",
    "noise",
    "pgd",
    "rand_fgsm",
    "square",
    "train_substitute",
]
