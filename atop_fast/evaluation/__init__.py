"""Robust evaluation of random defences."""

from .evaluate import Report, evaluate, quick_attacks
from .verdict import Verdict, wilson_interval

__all__ = ["Report", "Verdict", "evaluate", "quick_attacks", "wilson_interval"]
