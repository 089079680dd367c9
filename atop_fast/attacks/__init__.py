"""Attacks: called `attack(images, labels)`, built on one gradient estimator and one queue."""

from .apgd import APGD, APGDT
from .base import NORMS, Attack
from .cw import CW
from .gradient import GRADIENT_MODES, Estimate, GradientEstimator, Passes, counted_passes, draw_logits
from .network import Model, folded, frozen, prepared
from .pgd import FGSM, MIFGSM, PGD
from .stadv import StAdv

__all__ = [
    "APGD",
    "APGDT",
    "CW",
    "FGSM",
    "GRADIENT_MODES",
    "MIFGSM",
    "NORMS",
    "PGD",
    "Attack",
    "Estimate",
    "GradientEstimator",
    "Model",
    "Passes",
    "StAdv",
    "counted_passes",
    "draw_logits",
    "folded",
    "frozen",
    "prepared",
]
