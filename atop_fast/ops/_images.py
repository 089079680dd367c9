"""Shared by ops on images (B, C, H, W): the type of the computation, and the layout of a result."""

from __future__ import annotations

import torch
from torch import Tensor


def widen(t: Tensor) -> Tensor:
    """Convert `t` to the type of the computation: float64 for float64, float32 otherwise."""
    return t if t.dtype == torch.float64 else t.float()


def memory_format(h: Tensor) -> torch.memory_format:
    """The memory format of the result for `h`."""
    if not h.is_contiguous() and h.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
