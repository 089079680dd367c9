"""How kernels are launched: block size, grid and device. The tuning numbers of all kernels stand here."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

# With 4 warps a thread handles 8 elements: two 16-byte accesses in float32, one in bfloat16.
BLOCK = 1024
NUM_WARPS = 4


def launch(kernel: Any, n: int, device: torch.device, *args: Any) -> None:
    """Run `kernel(*args)` over `n` elements, one block a program, on `device`."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(-(-n // BLOCK),)](*args, BLOCK=BLOCK, num_warps=NUM_WARPS)


def in_layout_of(t: Tensor, model: Tensor) -> Tensor:
    """`t`, or a copy of it with the strides of `model`, which has its shape and leaves no gaps."""
    return t if t.stride() == model.stride() else torch.empty_like(model).copy_(t)
