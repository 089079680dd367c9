"""Robust evaluation of random defenses."""

from ..transforms import FixedRandomness
from .evaluate import evaluate
from .protocols import PROTOCOLS, Protocol, quick_attacks
from .resubmission import resubmission_curve, survival
from .summary import Report
from .verdict import Verdict, bootstrap_interval, emulated_verdicts, wilson_interval

__all__ = [
    "PROTOCOLS",
    "FixedRandomness",
    "Protocol",
    "Report",
    "Verdict",
    "bootstrap_interval",
    "emulated_verdicts",
    "evaluate",
    "quick_attacks",
    "resubmission_curve",
    "survival",
    "wilson_interval",
]
