"""Tensor ops with one specification each and several implementations; see `_registry` for how they come together."""

from . import _registry
from .gated_elu import gated_elu
from .pgd_step_linf import pgd_step_linf, pgd_step_linf_

_registry.load()

__all__ = ["gated_elu", "pgd_step_linf", "pgd_step_linf_"]
