"""Attacks: called `attack(images, labels)`, built on one gradient estimator and one queue."""

from .apgd import APGD
from .apgdt import APGDT
from .autoattack import AutoAttack
from .ball import NORMS, Ball
from .base import Attack
from .bpda import BPDA
from .cw import CW
from .draws import draw_logits
from .fab import FAB
from .gradient import GRADIENT_MODES, Estimate, GradientEstimator
from .network import Model, frozen, prepared
from .passes import Passes, counted_passes
from .pgd import FGSM, MIFGSM, PGD
from .pma import PMA
from .square import Square
from .stadv import StAdv
from .trace import TraceStep

__all__ = [
    "APGD",
    "APGDT",
    "BPDA",
    "CW",
    "FAB",
    "FGSM",
    "GRADIENT_MODES",
    "MIFGSM",
    "NORMS",
    "PGD",
    "PMA",
    "Attack",
    "AutoAttack",
    "Ball",
    "Estimate",
    "GradientEstimator",
    "Model",
    "Passes",
    "Square",
    "StAdv",
    "TraceStep",
    "counted_passes",
    "draw_logits",
    "frozen",
    "prepared",
]
