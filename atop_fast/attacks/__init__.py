"""Attacks: called `attack(images, labels)`, built on one gradient estimator."""

from .gradient import GRADIENT_MODES, GradientEstimator, Model, draw_logits, frozen
from .pgd import FGSM, NORMS, PGD

__all__ = ["FGSM", "GRADIENT_MODES", "NORMS", "PGD", "GradientEstimator", "Model", "draw_logits", "frozen"]
