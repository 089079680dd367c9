"""How kernels are launched: block size, grid and device. The tuning numbers of all kernels stand here."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

# With 4 warps a thread handles 8 elements: two 16-byte accesses in float32, one in bfloat16.
BLOCK = 1024
NUM_WARPS = 4
# Where the addresses of a gather take the registers, a thread handles 4 elements.
GATHER_BLOCK = 512
# Up to here the elements of a row, and the end of its last block, are counted in 32 bits.
MAX_ROW = 2**31 - BLOCK
# Every operation rounds by itself, as in the specification: for ops that have the same bits in every backend.
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
    """Run `kernel(*args)` on `device` over `rows` rows of `n` elements, one block of a row a program."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(rows * -(-n // block),)](*args, BLOCK=block, num_warps=num_warps, **options)


def in_layout_of(t: Tensor, model: Tensor) -> Tensor:
    """`t`, or a copy of it with the strides of `model`, which has its shape and leaves no gaps."""
    return t if t.stride() == model.stride() else torch.empty_like(model).copy_(t)


def stride_of(t: Tensor) -> int:
    """How far apart the samples' numbers lie in `t` of shape () or (B,)."""
    return t.stride(0) if t.dim() else 0
