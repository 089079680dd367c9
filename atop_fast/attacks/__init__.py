"""Attacks: called `attack(images, labels)`, built on one gradient estimator and one queue."""

from .base import NORMS, Attack
from .fab import FAB
from .gradient import GRADIENT_MODES, Estimate, GradientEstimator, Passes, counted_passes, draw_logits
from .network import Model, folded, frozen, prepared
from .pgd import FGSM, MIFGSM, PGD
from .square import Square

__all__ = [
    "FAB",
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
    "Square",
    "counted_passes",
    "draw_logits",
    "folded",
    "frozen",
    "prepared",
]
