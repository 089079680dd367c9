"""Shared by ops on images (B, C, H, W): dtypes, the layout of a result, and the check of its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.checks import message

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def widen(t: Tensor) -> Tensor:
    """Convert `t` to the type of the computation: float64 for float64, float32 otherwise."""
    return t if t.dtype == torch.float64 else t.float()


def memory_format(h: Tensor) -> torch.memory_format:
    """The memory format of the result for `h`."""
    if not h.is_contiguous() and h.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def check_dy(function: str, dy: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raise unless `dy` has the `shape` of the result and the dtype and device of `like`."""
    if dy.shape != tuple(shape):
        raise ValueError(message(function, "dy", f"of the shape of y {tuple(shape)}", tuple(dy.shape)))
    if dy.dtype != like.dtype:
        raise TypeError(message(function, "dy", f"of the dtype of y {like.dtype}", dy.dtype))
    if dy.device != like.device:
        raise ValueError(message(function, "dy", f"on the device of y {like.device}", dy.device))
