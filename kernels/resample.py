"""y = sum over k of r_k (sum over l of c_l x[i + k, j + l]), the taps of two sparse matrices   docs/math.md#resample

or, with rows first, the sum over l of c_l (the sum over k of r_k x).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops._images import memory_format
from atop_fast.ops.resample import Taps, reference, rows_first

from ._launch import EXACT, GATHER_BLOCK, MAX_ROW, launch


@triton.jit(do_not_specialize=["ROW_STRIDE", "COLUMN_STRIDE"])
def resample_kernel(
    x,  # [B, C, GIVEN_H, GIVEN_W] or [B, GIVEN_H, GIVEN_W, C]
    row_start,  # [B, H] or [1, H]
    row_weight,  # [B, H, ROW_TAPS] or [1, H, ROW_TAPS]
    column_start,  # [B, W] or [1, W]
    column_weight,  # [B, W, COLUMN_TAPS] or [1, W, COLUMN_TAPS]
    y,  # [B, C, H, W] or [B, H, W, C]
    ROW_STRIDE,
    COLUMN_STRIDE,
    C,
    GIVEN_H,
    GIVEN_W,
    H,
    W,
    N,  # C H W
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    IS_LAST: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block, n_blocks = tl.program_id(0), tl.cdiv(N, BLOCK)
    i_sample = (i_block // n_blocks).to(tl.int64)
    # In the order of memory.
    o_y = i_block % n_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = o_y < N
    o_pixel = o_y // C if IS_LAST else o_y % (H * W)
    o_channel = o_y % C if IS_LAST else o_y // (H * W) * (GIVEN_H * GIVEN_W)
    X_STRIDE = C if IS_LAST else 1
    o_row = i_sample * ROW_STRIDE + o_pixel // W
    o_column = i_sample * COLUMN_STRIDE + o_pixel % W
    b_row, b_column = tl.load(row_start + o_row, mask), tl.load(column_start + o_column, mask)
    o_x = i_sample * C * GIVEN_H * GIVEN_W + o_channel + (b_row * GIVEN_W + b_column) * X_STRIDE
    dtype: tl.constexpr = row_weight.dtype.element_ty
    b_y = tl.zeros([BLOCK], dtype)
    # The inner axis is summed first.
    p_row, p_column = row_weight + o_row * ROW_TAPS, column_weight + o_column * COLUMN_TAPS
    p_outer, p_inner = (p_column, p_row) if ROWS_FIRST else (p_row, p_column)
    for k in range(COLUMN_TAPS if ROWS_FIRST else ROW_TAPS):
        b_t = tl.zeros([BLOCK], dtype)
        for i in range(ROW_TAPS if ROWS_FIRST else COLUMN_TAPS):
            b_weight = tl.load(p_inner + i, mask)
            o_tap = i * GIVEN_W + k if ROWS_FIRST else k * GIVEN_W + i
            b_x = tl.load(x + o_x + o_tap * X_STRIDE, mask).to(dtype)
            # A tap of weight 0 does not read its pixel, which may be NaN.
            b_t += tl.where(b_weight == 0.0, 0.0, b_weight * b_x)
        b_weight = tl.load(p_outer + k, mask)
        b_y += tl.where(b_weight == 0.0, 0.0, b_weight * b_t)
    tl.store(y + i_sample * N + o_y, b_y.to(y.dtype.element_ty), mask)


def launch_resample(
    x: Tensor,
    row_start: Tensor,
    row_weight: Tensor,
    column_start: Tensor,
    column_weight: Tensor,
    row_start_t: Tensor,
    row_weight_t: Tensor,
    column_start_t: Tensor,
    column_weight_t: Tensor,
) -> Tensor:
    """The Triton implementation of atop_fast::resample; the transposed matrices are for the backward pass."""
    taps = (row_start, row_weight, column_start, column_weight)
    (B, C, *given), H, W, layout = x.shape, row_start.shape[1], column_start.shape[1], memory_format(x)
    if C * max(H * W, given[0] * given[1]) > MAX_ROW:
        return reference(x, *taps, row_start_t, row_weight_t, column_start_t, column_weight_t)
    y = torch.empty((B, C, H, W), dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel():
        n = C * H * W
        tensors = (x.contiguous(memory_format=layout), *(t.contiguous() for t in taps), y)
        strides = (H if len(row_start) > 1 else 0, W if len(column_start) > 1 else 0)
        order = rows_first(x, Taps(row_start, row_weight))
        tiles = (row_weight.shape[2], column_weight.shape[2], layout is torch.channels_last, order)
        args = (*tensors, *strides, C, *given, H, W, n, *tiles)
        launch(resample_kernel, n, x.device, *args, rows=B, block=GATHER_BLOCK, **EXACT)
    return y
