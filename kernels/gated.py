"""y = elu(f) sigmoid(g) and its gradients                                                     docs/math.md#gated_elu

Rows as in csrc: h is [ROWS, 2, INNER], where a row is an image in NCHW and a pixel in channels_last. Every load is
widened at once: the interpreter cannot compute in bfloat16, and the specification asks for float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops.gated_elu import check_dy, check_h, memory_format

from ._launch import BLOCK as MAX_BLOCK
from ._launch import in_layout_of, launch
from .exp import exp_and_expm1


@triton.jit
def _widen(b):
    return b if b.dtype == tl.float64 else b.to(tl.float32)


@triton.jit
def _elu(f):
    e, em1 = exp_and_expm1(tl.where(f > 0.0, 0.0, f))
    return tl.where(f > 0.0, f, em1), e


@triton.jit
def _sigmoid(g):
    e, _ = exp_and_expm1(tl.where(g > 0.0, -g, g))
    # The plain division of float32 is only good to 2 ulp; that of float64 is exact.
    inverse = 1.0 / (1.0 + e) if g.dtype == tl.float64 else tl.div_rn(1.0, 1.0 + e)
    small = e * inverse
    return tl.where(g > 0.0, inverse, small), small * inverse


@triton.jit
def _offsets(INNER, N, IS_LARGE: tl.constexpr, BLOCK: tl.constexpr):
    """Of one block of outputs: where they lie in [ROWS, INNER], where f lies in [ROWS, 2, INNER], and the mask."""
    i_block = tl.program_id(0)
    # Division of 64 bits costs several times that of 32.
    if IS_LARGE:
        i_block = i_block.to(tl.int64)
    o_y = i_block * BLOCK + tl.arange(0, BLOCK)
    i_row = o_y // INNER
    return o_y, o_y.to(tl.int64) + i_row.to(tl.int64) * INNER, o_y < N


@triton.jit
def gated_elu_fwd_kernel(
    h,  # [ROWS, 2, INNER]
    y,  # [ROWS, INNER]
    INNER,
    N,
    IS_LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_y, o_f, mask = _offsets(INNER, N, IS_LARGE, BLOCK)
    b_f = _widen(tl.load(h + o_f, mask))
    b_g = _widen(tl.load(h + o_f + INNER, mask))
    b_elu, _ = _elu(b_f)
    b_gate, _ = _sigmoid(b_g)
    tl.store(y + o_y, (b_elu * b_gate).to(y.dtype.element_ty), mask)


@triton.jit
def gated_elu_bwd_kernel(
    dy,  # [ROWS, INNER]
    h,  # [ROWS, 2, INNER]
    dh,  # [ROWS, 2, INNER]
    INNER,
    N,
    IS_LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_y, o_f, mask = _offsets(INNER, N, IS_LARGE, BLOCK)
    b_dy = _widen(tl.load(dy + o_y, mask))
    b_f = _widen(tl.load(h + o_f, mask))
    b_g = _widen(tl.load(h + o_f + INNER, mask))
    b_elu, b_slope = _elu(b_f)
    b_gate, b_gate_slope = _sigmoid(b_g)
    tl.store(dh + o_f, (b_dy * b_gate * b_slope).to(dh.dtype.element_ty), mask)
    tl.store(dh + o_f + INNER, (b_dy * b_elu * b_gate_slope).to(dh.dtype.element_ty), mask)


def launch_gated_elu(h: Tensor) -> Tensor:
    """The Triton implementation of atop_fast::gated_elu."""
    check_h("gated_elu", h)
    layout, inner = _rows(h)
    B, C2, H, W = h.shape
    y = torch.empty((B, C2 // 2, H, W), dtype=h.dtype, device=h.device, memory_format=layout)
    if n := y.numel():
        dense = h.contiguous(memory_format=layout)
        launch(gated_elu_fwd_kernel, n, h.device, dense, y, inner, n, _is_large(n))
    return y


def launch_gated_elu_bwd(dy: Tensor, h: Tensor) -> Tensor:
    """The Triton implementation of atop_fast::gated_elu_bwd."""
    check_h("gated_elu_bwd", h)
    check_dy("gated_elu_bwd", dy, h)
    layout, inner = _rows(h)
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device, memory_format=layout)
    if n := dy.numel():
        dense_dy, dense_h = dy.contiguous(memory_format=layout), in_layout_of(h, dh)
        launch(gated_elu_bwd_kernel, n, h.device, dense_dy, dense_h, dh, inner, n, _is_large(n))
    return dh


def _rows(h: Tensor) -> tuple[torch.memory_format, int]:
    channels, chosen = h.shape[1] // 2, memory_format(h)
    return chosen, channels * (1 if chosen is torch.channels_last else h.shape[2] * h.shape[3])


def _is_large(n: int) -> bool:
    return n > 2**31 - MAX_BLOCK
