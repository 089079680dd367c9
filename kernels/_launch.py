"""Kernel launches: block size, grid and device. This module holds the tuning numbers of all kernels."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

# With 4 warps, a thread handles 8 elements: two 16-byte accesses in float32, one in bfloat16.
BLOCK = 1024
NUM_WARPS = 4
# In a gather, addresses occupy registers, so a thread handles 4 elements.
GATHER_BLOCK = 512
# Up to this size, 32-bit indices cover the elements of a row up to the end of its last block.
MAX_ROW = 2**31 - BLOCK
# No FMA contraction, for ops that have the same bits in every backend: every operation rounds as in the specification.
EXACT = {"enable_fp_fusion": False}


def launch(
    kernel: Any,
    n: int,
    device: torch.device,
    *args: Any,
    rows: int = 1,
    block: int = BLOCK,
    num_warps: int = NUM_WARPS,
    **options: Any,
) -> None:
    """Run `kernel(*args)` on `device` over `rows` rows of `n` elements, one block of a row per program."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(rows * -(-n // block),)](*args, BLOCK=block, num_warps=num_warps, **options)


def in_layout_of(t: Tensor, model: Tensor) -> Tensor:
    """`t`, or a copy of it with the strides of `model`, a dense tensor of the same shape."""
    return t if t.stride() == model.stride() else torch.empty_like(model).copy_(t)


def stride_of(t: Tensor) -> int:
    """The stride between samples in `t` of shape () or (B,)."""
    return t.stride(0) if t.dim() else 0
