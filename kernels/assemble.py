"""y = sum over the copies of [owner = n] copy_n, and its gradient                              docs/math.md#assemble"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops._images import memory_format
from atop_fast.ops.assemble import reference, reference_bwd

from ._blocks import offsets, place, read_owners, unit_of
from ._launch import MAX_ROW, launch


@triton.jit
def assemble_fwd_kernel(
    copies,  # [B, N, C, H, W]
    blocks,  # [B, H / PATCH * W / PATCH]
    y,  # [B, C, H, W]
    N,
    PATCH,
    H,
    W,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HW = H * W // UNIT * UNIT
    i_sample, i_first, o_pixel, mask = place(HW, BLOCK)
    b_owner = read_owners(blocks, i_sample, i_first, H, W, PATCH, UNIT, BLOCK)
    # These hints allow loads as wide as a run of UNIT pixels.
    i_image, is_owned = tl.max_constancy(i_sample * N + b_owner, UNIT), tl.max_constancy(b_owner < N, UNIT)
    for c in range(C):
        b_y = tl.load(copies + offsets(i_image, c, o_pixel, C, HW, IS_LAST), mask & is_owned, other=0.0)
        tl.store(y + offsets(i_sample, c, o_pixel, C, HW, IS_LAST), b_y, mask)


@triton.jit
def assemble_bwd_kernel(
    dy,  # [B, C, H, W]
    blocks,  # [B, H / PATCH * W / PATCH]
    dcopies,  # [B, COPIES, C, H, W]
    PATCH,
    H,
    W,
    C: tl.constexpr,
    COPIES: tl.constexpr,
    UNIT: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HW = H * W // UNIT * UNIT
    i_sample, i_first, o_pixel, mask = place(HW, BLOCK)
    b_owner = read_owners(blocks, i_sample, i_first, H, W, PATCH, UNIT, BLOCK)
    for c in range(C):
        b_dy = tl.load(dy + offsets(i_sample, c, o_pixel, C, HW, IS_LAST), mask)
        for n in range(COPIES):
            o_copy = offsets(i_sample * COPIES + n, c, o_pixel, C, HW, IS_LAST)
            tl.store(dcopies + o_copy, tl.where(b_owner == n, b_dy, 0.0), mask)


def launch_assemble(copies: Tensor, blocks: Tensor, patch: int) -> Tensor:
    """The Triton implementation of atop_fast::assemble."""
    (_, C, H, W), layout, batch = copies.shape, memory_format(copies), len(blocks)
    if C * H * W > MAX_ROW:
        return reference(copies, blocks, patch)
    y = torch.empty((batch, C, H, W), dtype=copies.dtype, device=copies.device, memory_format=layout)
    if y.numel():
        dense = copies.contiguous(memory_format=layout)
        numbers = (len(copies) // batch, patch, H, W, C, unit_of((H, W), patch), layout is torch.channels_last)
        launch(assemble_fwd_kernel, H * W, y.device, dense, blocks.contiguous(), y, *numbers, rows=batch)
    return y


def launch_assemble_bwd(dy: Tensor, blocks: Tensor, patch: int, copies: int) -> Tensor:
    """The Triton implementation of atop_fast::assemble_bwd."""
    (batch, C, H, W), layout = dy.shape, memory_format(dy)
    if C * H * W > MAX_ROW:
        return reference_bwd(dy, blocks, patch, copies)
    dcopies = torch.empty((batch * copies, C, H, W), dtype=dy.dtype, device=dy.device, memory_format=layout)
    if dcopies.numel():
        dense = dy.contiguous(memory_format=layout)
        numbers = (patch, H, W, C, copies, unit_of((H, W), patch), layout is torch.channels_last)
        launch(assemble_bwd_kernel, H * W, dy.device, dense, blocks.contiguous(), dcopies, *numbers, rows=batch)
    return dcopies
