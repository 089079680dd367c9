"""y = a(f) sigmoid(g) and its gradients, a = elu or relu                                            docs/math.md#gated

Lines are defined as in csrc: h is [lines of f | lines of g] for each image. In NCHW, a line is a channel; in
channels_last, each pixel is treated as an image of one line. Without bias, an image in NCHW is also a single line.
Every load is widened immediately: the interpreter cannot compute in bfloat16, and the specification requires float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops._images import memory_format
from atop_fast.ops.gated import ELU, output_shape

from ._launch import BLOCK as MAX_BLOCK
from ._launch import in_layout_of, launch
from .exp import exp_and_expm1

# In the kernel that sums gradients: outputs per program, outputs at a time, and the maximum number of channels.
PART = 16384
TILE = 1024
MAX_CHANNELS = 64


@triton.jit
def _widen(b):
    return b if b.dtype == tl.float64 else b.to(tl.float32)


@triton.jit
def _activation(f, ELU: tl.constexpr):
    """a(f), and the value that `_times_slope` needs."""
    if ELU:
        e, em1 = exp_and_expm1(tl.where(f > 0.0, 0.0, f))
        return tl.where(f > 0.0, f, em1), e
    else:
        value = tl.where(f <= 0.0, 0.0, f)
        return value, value


@triton.jit
def _times_slope(v, slope, ELU: tl.constexpr):
    """v a'(f); where relu is 0, NaN does not propagate."""
    return v * slope if ELU else tl.where(slope <= 0.0, 0.0, v)


@triton.jit
def _sigmoid(g):
    e, _ = exp_and_expm1(tl.where(g > 0.0, -g, g))
    # Plain float32 division has an error of up to 2 ulp; float64 division is correctly rounded.
    inverse = 1.0 / (1.0 + e) if g.dtype == tl.float64 else tl.div_rn(1.0, 1.0 + e)
    small = e * inverse
    return tl.where(g > 0.0, inverse, small), small * inverse


@triton.jit
def _gradients(b_dy, b_f, b_g, ELU: tl.constexpr):
    b_value, b_slope = _activation(b_f, ELU)
    b_gate, b_gate_slope = _sigmoid(b_g)
    return _times_slope(b_dy * b_gate, b_slope, ELU), b_dy * b_value * b_gate_slope


@triton.jit
def _offsets(LENGTH, LINES, N, IS_LARGE: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """For one block of outputs: their offsets, the offsets of their f, the indices of their biases, and the mask."""
    i_block = tl.program_id(0)
    # 64-bit division costs several times as much as 32-bit division.
    if IS_LARGE:
        i_block = i_block.to(tl.int64)
    o_y = i_block * BLOCK + tl.arange(0, BLOCK)
    i_line = o_y // LENGTH
    i_image = i_line // LINES
    o_f = o_y.to(tl.int64) + i_image.to(tl.int64) * LINES * LENGTH
    return o_y, o_f, (o_y - i_line * LENGTH if LAST else i_line - i_image * LINES), o_y < N


@triton.jit
def _read(h, bias, o_f, o_bias, GAP, CHANNELS, mask):
    b_f, b_g = _widen(tl.load(h + o_f, mask)), _widen(tl.load(h + o_f + GAP, mask))
    if bias is None:
        return b_f, b_g
    else:
        return b_f + tl.load(bias + o_bias, mask), b_g + tl.load(bias + o_bias + CHANNELS, mask)


@triton.jit
def gated_fwd_kernel(
    h,  # [images, 2, LINES, LENGTH]
    bias,  # [2, CHANNELS], or None
    y,  # [images, LINES, LENGTH]
    LENGTH,
    LINES,
    CHANNELS,
    N,
    IS_LARGE: tl.constexpr,
    LAST: tl.constexpr,
    ELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_y, o_f, o_bias, mask = _offsets(LENGTH, LINES, N, IS_LARGE, LAST, BLOCK)
    b_f, b_g = _read(h, bias, o_f, o_bias, LINES * LENGTH, CHANNELS, mask)
    b_value, _ = _activation(b_f, ELU)
    b_gate, _ = _sigmoid(b_g)
    tl.store(y + o_y, (b_value * b_gate).to(y.dtype.element_ty), mask)


@triton.jit
def gated_bwd_kernel(
    dy,  # [images, LINES, LENGTH]
    h,  # [images, 2, LINES, LENGTH]
    bias,  # [2, CHANNELS], or None
    dh,  # [images, 2, LINES, LENGTH]
    LENGTH,
    LINES,
    CHANNELS,
    N,
    IS_LARGE: tl.constexpr,
    LAST: tl.constexpr,
    ELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_y, o_f, o_bias, mask = _offsets(LENGTH, LINES, N, IS_LARGE, LAST, BLOCK)
    b_f, b_g = _read(h, bias, o_f, o_bias, LINES * LENGTH, CHANNELS, mask)
    b_df, b_dg = _gradients(_widen(tl.load(dy + o_y, mask)), b_f, b_g, ELU)
    tl.store(dh + o_f, b_df.to(dh.dtype.element_ty), mask)
    tl.store(dh + o_f + LINES * LENGTH, b_dg.to(dh.dtype.element_ty), mask)


@triton.jit
def gated_sums_kernel(
    dy,  # [images, CHANNELS, PIXELS]
    h,  # [images, 2, CHANNELS, PIXELS]
    bias,  # [2, CHANNELS]
    dh,  # [images, 2, CHANNELS, PIXELS]
    partials,  # [images * PARTS, 2, CHANNELS]
    CHANNELS,
    PIXELS,
    PARTS,
    PART_PIXELS,
    LAST: tl.constexpr,
    ELU: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program handles a part of an image's pixels in BLOCK_C channels. In channels_last, all images count as one."""
    n_columns = tl.cdiv(CHANNELS, BLOCK_C)
    i_part, i_column = tl.program_id(0) // n_columns, tl.program_id(0) % n_columns
    i_image, i_first = (i_part // PARTS).to(tl.int64), (i_part % PARTS).to(tl.int64) * PART_PIXELS
    o_c = i_column * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < CHANNELS
    b_bias_f = tl.load(bias + o_c, m_c, other=0.0)[None, :]
    b_bias_g = tl.load(bias + CHANNELS + o_c, m_c, other=0.0)[None, :]
    channel_step = 1 if LAST else PIXELS
    y_step = CHANNELS if LAST else 1
    f_step = 2 * CHANNELS if LAST else 1
    gap = tl.cast(CHANNELS, tl.int64) * channel_step
    image = i_image * CHANNELS * PIXELS
    BLOCK_P: tl.constexpr = BLOCK // BLOCK_C
    b_sum_f = tl.zeros([BLOCK_P, BLOCK_C], partials.dtype.element_ty)
    b_sum_g = tl.zeros([BLOCK_P, BLOCK_C], partials.dtype.element_ty)
    i_pixel = 0
    while i_pixel < PART_PIXELS:
        o_p = i_pixel + tl.arange(0, BLOCK_P)
        mask = ((o_p < PART_PIXELS) & (i_first + o_p < PIXELS))[:, None] & m_c[None, :]
        o_p = (i_first + o_p)[:, None]
        o_f = 2 * image + o_p * f_step + o_c[None, :].to(tl.int64) * channel_step
        b_dy = _widen(tl.load(dy + image + o_p * y_step + o_c[None, :].to(tl.int64) * channel_step, mask))
        b_f, b_g = _widen(tl.load(h + o_f, mask)) + b_bias_f, _widen(tl.load(h + o_f + gap, mask)) + b_bias_g
        b_df, b_dg = _gradients(b_dy, b_f, b_g, ELU)
        tl.store(dh + o_f, b_df.to(dh.dtype.element_ty), mask)
        tl.store(dh + o_f + gap, b_dg.to(dh.dtype.element_ty), mask)
        b_sum_f += tl.where(mask, b_df, 0.0)
        b_sum_g += tl.where(mask, b_dg, 0.0)
        i_pixel += BLOCK_P
    p_sums = partials + i_part.to(tl.int64) * 2 * CHANNELS + o_c
    tl.store(p_sums, tl.sum(b_sum_f, 0), m_c)
    tl.store(p_sums + CHANNELS, tl.sum(b_sum_g, 0), m_c)


def launch_gated(h: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """The Triton implementation of atop_fast::gated."""
    layout = memory_format(h)
    y = torch.empty(output_shape(h), dtype=h.dtype, device=h.device, memory_format=layout)
    if n := y.numel():
        dense = h.contiguous(memory_format=layout)
        launch(gated_fwd_kernel, n, h.device, dense, _widened(bias, h), y, *_lines(h, bias, n), activation == ELU)
    return y


def launch_gated_bwd(
    dy: Tensor, h: Tensor, bias: Tensor | None, activation: int, with_db: bool
) -> tuple[Tensor, Tensor]:
    """The Triton implementation of atop_fast::gated_bwd."""
    layout = memory_format(h)
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device, memory_format=layout)
    if not (n := dy.numel()):
        return dh, h.new_empty(0) if bias is None or not with_db else torch.zeros_like(bias)
    tensors = (dy.contiguous(memory_format=layout), in_layout_of(h, dh), _widened(bias, h), dh)
    if bias is not None and with_db:
        return dh, _sums(tensors, activation, layout is torch.channels_last).to(bias.dtype)
    launch(gated_bwd_kernel, n, h.device, *tensors, *_lines(h, bias, n), activation == ELU)
    return dh, h.new_empty(0)


def _sums(tensors: tuple[Any, ...], activation: int, last: bool) -> Tensor:
    """Run the kernel that computes the gradients of `h` and sums them, and return the sums."""
    dy, _, bias, _ = tensors
    batch, channels, height, width = dy.shape
    images, pixels = (1, batch * height * width) if last else (batch, height * width)
    block = min(MAX_CHANNELS, max(16, channels & -channels)) if last else 1
    part = min(pixels, max(1, PART // (channels if last else 1)))
    parts = -(-pixels // part)
    partials = bias.new_empty(images * parts, 2 * channels)
    programs = images * parts * -(-channels // block)
    numbers = (channels, pixels, parts, part, last, activation == ELU, block)
    launch(gated_sums_kernel, TILE, dy.device, *tensors, partials, *numbers, rows=programs, block=TILE)
    return partials.sum(0)


def _widened(bias: Tensor | None, h: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(torch.float64 if h.dtype == torch.float64 else torch.float32).contiguous()


def _lines(h: Tensor, bias: Tensor | None, n: int) -> tuple[int, int, int, int, bool, bool]:
    """LENGTH, LINES, CHANNELS, N, IS_LARGE and LAST for `n` outputs."""
    channels, last = h.shape[1] // 2, memory_format(h) is torch.channels_last
    lines = 1 if last or bias is None else channels
    length = channels if last else channels * h.shape[2] * h.shape[3] // lines
    return length, lines, channels, n, n > 2**31 - MAX_BLOCK, last
