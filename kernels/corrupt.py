"""y = [(2 clip(resize(x) + sigma n, 0, 1) - 1) (1 - m), 1, m] and its gradient                     docs/math.md#corrupt

The noise of an element is computed once for all copies. 16-bit images are computed in float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops._images import memory_format
from atop_fast.ops.corrupt import reference, reference_bwd, reference_live
from atop_fast.randomness import Tag

from ._blocks import offsets, place, read_owners, unit_of
from ._launch import BLOCK as MAX_BLOCK
from ._launch import EXACT, GATHER_BLOCK, MAX_ROW, launch, stride_of
from .philox import normals_of_elements, normals_of_groups, read_key

# Up to this height and width, the positions of a resize fit in 32 bits.
MAX_SIDE = 2**15 - 1


@triton.jit
def _widen(b):
    """Images in [0, 1], float32 or float64."""
    if b.dtype == tl.uint8:
        return tl.div_rn(b.to(tl.float32), 255.0)
    return b if b.dtype == tl.float64 else b.to(tl.float32)


@triton.jit
def _taps(i, GIVEN, WANTED, dtype: tl.constexpr):
    """Two source pixels of pixel i along one axis, and the weight of the second."""
    position = (2 * i + 1) * GIVEN - WANTED
    position = tl.where(position < 0, 0, position)
    i_0 = position // (2 * WANTED)
    i_1 = tl.where(i_0 + 1 < GIVEN, i_0 + 1, i_0)
    rest, whole = (position % (2 * WANTED)).to(dtype), tl.cast(2 * WANTED, dtype)
    return i_0, i_1, rest / whole if dtype == tl.float64 else tl.div_rn(rest, whole)


@triton.jit
def _read_resized(x, i_sample, c, o_pixel, mask, C, GIVEN_H, GIVEN_W, H, W, IS_LAST: tl.constexpr):
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    i_0, i_1, w_row = _taps(o_pixel // W, GIVEN_H, H, dtype)
    j_0, j_1, w_column = _taps(o_pixel % W, GIVEN_W, W, dtype)
    HW = GIVEN_H * GIVEN_W
    b_00 = _widen(tl.load(x + offsets(i_sample, c, i_0 * GIVEN_W + j_0, C, HW, IS_LAST), mask))
    b_01 = _widen(tl.load(x + offsets(i_sample, c, i_0 * GIVEN_W + j_1, C, HW, IS_LAST), mask))
    b_10 = _widen(tl.load(x + offsets(i_sample, c, i_1 * GIVEN_W + j_0, C, HW, IS_LAST), mask))
    b_11 = _widen(tl.load(x + offsets(i_sample, c, i_1 * GIVEN_W + j_1, C, HW, IS_LAST), mask))
    b_0 = b_00 * (1.0 - w_column) + b_01 * w_column
    b_1 = b_10 * (1.0 - w_column) + b_11 * w_column
    return b_0 * (1.0 - w_row) + b_1 * w_row


@triton.jit(do_not_specialize=["SIGMA_STRIDE", "DRAW_STRIDE", "TAG"])
def corrupt_fwd_kernel(
    x,  # [B, C, GIVEN_H, GIVEN_W]
    blocks,  # [B, H / PATCH * W / PATCH]
    sigma,  # [B] or []
    seed,  # []
    sample_ids,  # [B]
    draws,  # [B] or []
    y,  # [B, COPIES, C + 2, H, W], or None
    live,  # [B, C, ceil(H W / 8)], or None
    SIGMA_STRIDE,
    DRAW_STRIDE,
    TAG,
    PATCH,
    GIVEN_H,
    GIVEN_W,
    H,
    W,
    C: tl.constexpr,
    COPIES: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,  # divides H W
    IS_RESIZED: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Tells the compiler how wide the accesses may be.
    HW = H * W // ALIGN * ALIGN
    i_sample, i_first, o_pixel, mask = place(HW, BLOCK)
    b_owner = read_owners(blocks, i_sample, i_first, H, W, PATCH, UNIT, BLOCK)
    b_sigma = tl.load(sigma + i_sample * SIGMA_STRIDE)
    b_seed, c1, c2, c3 = read_key(seed, sample_ids, draws, DRAW_STRIDE, TAG, i_sample)
    for c in range(C):
        if IS_RESIZED:
            b_x = _read_resized(x, i_sample, c, o_pixel, mask, C, GIVEN_H, GIVEN_W, H, W, IS_LAST)
        else:
            b_x = _widen(tl.load(x + offsets(i_sample, c, o_pixel, C, HW, IS_LAST), mask))
        if ALIGN >= 4:
            o_group = (c * HW + i_first) // 4 + tl.arange(0, BLOCK // 4)
            b_noise = normals_of_groups(o_group, b_seed, c1, c2, c3)
        else:
            b_noise = normals_of_elements(c * HW + o_pixel, b_seed, c1, c2, c3)
        b_v = b_x + b_sigma.to(b_x.dtype) * b_noise.to(b_x.dtype)
        if live is not None:
            is_inside = (b_v >= 0.0) & (b_v <= 1.0) & mask
            if COPIES == 1:
                is_inside = is_inside & (b_owner != 0)
            _store_bits(live, i_sample * C + c, i_first, HW, is_inside, BLOCK)
        if y is not None:
            # Comparisons instead of tl.clamp, so that NaN passes as in torch.clamp.
            b_v = tl.where(b_v < 0.0, 0.0, b_v)
            b_t = tl.where(b_v > 1.0, 1.0, b_v) * 2.0 - 1.0
            for n in range(COPIES):
                o_y = offsets(i_sample * COPIES + n, c, o_pixel, C + 2, HW, IS_LAST)
                tl.store(y + o_y, tl.where(b_owner == n, 0.0, b_t).to(y.dtype.element_ty), mask)
    if y is not None:
        for n in range(COPIES):
            b_mask = tl.where(b_owner == n, 1.0, 0.0).to(y.dtype.element_ty)
            o_ones = offsets(i_sample * COPIES + n, C, o_pixel, C + 2, HW, IS_LAST)
            o_mask = offsets(i_sample * COPIES + n, C + 1, o_pixel, C + 2, HW, IS_LAST)
            tl.store(y + o_ones, tl.full([BLOCK], 1.0, tl.float32).to(y.dtype.element_ty), mask)
            tl.store(y + o_mask, b_mask, mask)


@triton.jit
def _store_bits(live, i_plane, i_first, HW, is_inside, BLOCK: tl.constexpr):
    b_bits = is_inside.to(tl.int32).reshape(BLOCK // 8, 8) << tl.arange(0, 8)[None, :]
    o_byte, n_bytes = i_first // 8 + tl.arange(0, BLOCK // 8), tl.cdiv(HW, 8)
    tl.store(live + i_plane * n_bytes + o_byte, tl.sum(b_bits, axis=1).to(tl.uint8), o_byte < n_bytes)


@triton.jit
def _load_bits(live, i_plane, i_first, HW, BLOCK: tl.constexpr):
    o_byte, n_bytes = i_first // 8 + tl.arange(0, BLOCK // 8), tl.cdiv(HW, 8)
    b_byte = tl.load(live + i_plane * n_bytes + o_byte, o_byte < n_bytes).to(tl.int32)
    return ((b_byte[:, None] >> tl.arange(0, 8)[None, :]) & 1).reshape(BLOCK) != 0


@triton.jit
def corrupt_bwd_kernel(
    dy,  # [B, COPIES, C + 2, H, W]
    live,  # [B, C, ceil(H W / 8)]
    blocks,  # [B, H / PATCH * W / PATCH]
    dx,  # [B, C, H, W]
    PATCH,
    H,
    W,
    C: tl.constexpr,
    COPIES: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HW = H * W // ALIGN * ALIGN
    i_sample, i_first, o_pixel, mask = place(HW, BLOCK)
    b_owner = read_owners(blocks, i_sample, i_first, H, W, PATCH, UNIT, BLOCK)
    for c in range(C):
        b_sum = _unmasked(dy, i_sample * COPIES, 0, c, o_pixel, mask, b_owner, C, HW, IS_LAST)
        for n in range(1, COPIES):
            b_sum += _unmasked(dy, i_sample * COPIES, n, c, o_pixel, mask, b_owner, C, HW, IS_LAST)
        is_inside = _load_bits(live, i_sample * C + c, i_first, HW, BLOCK)
        b_dx = tl.where(is_inside, b_sum * 2.0, 0.0).to(dx.dtype.element_ty)
        tl.store(dx + offsets(i_sample, c, o_pixel, C, HW, IS_LAST), b_dx, mask)


@triton.jit
def _unmasked(dy, i_image, n, c, o_pixel, mask, b_owner, C, HW, IS_LAST: tl.constexpr):
    b_dy = _widen(tl.load(dy + offsets(i_image + n, c, o_pixel, C + 2, HW, IS_LAST), mask))
    return tl.where(b_owner == n, 0.0, b_dy)


def launch_corrupt(
    x: Tensor,
    blocks: Tensor,
    sigma: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    draws: Tensor,
    patch: int,
    copies: int,
    size: Sequence[int],
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The Triton implementation of atop_fast::corrupt."""
    key = (sigma, seed, sample_ids, draws)
    if _is_large(x, size):
        return reference(x, blocks, *key, patch, copies, size, dtype, save)
    (B, C), (H, W) = x.shape[:2], size
    y = torch.empty((B * copies, C + 2, H, W), dtype=dtype, device=x.device, memory_format=memory_format(x))
    live = blocks.new_empty((B, C, -(-H * W // 8) if save else 0))
    _launch(x, blocks, key, y, live if save else None, patch, copies, size)
    return y, live


def launch_corrupt_live(
    x: Tensor,
    blocks: Tensor,
    sigma: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    draws: Tensor,
    patch: int,
    copies: int,
    size: Sequence[int],
) -> Tensor:
    """The Triton implementation of atop_fast::corrupt_live."""
    key = (sigma, seed, sample_ids, draws)
    if _is_large(x, size):
        return reference_live(x, blocks, *key, patch, copies, size)
    live = blocks.new_empty((*x.shape[:2], -(-size[0] * size[1] // 8)))
    _launch(x, blocks, key, None, live, patch, copies, size)
    return live


def launch_corrupt_bwd(dy: Tensor, live: Tensor, blocks: Tensor, patch: int, copies: int, dtype: torch.dtype) -> Tensor:
    """The Triton implementation of atop_fast::corrupt_bwd."""
    (_, planes, H, W), layout, B = dy.shape, memory_format(dy), len(blocks)
    if planes * H * W > MAX_ROW:
        return reference_bwd(dy, live, blocks, patch, copies, dtype)
    dx = torch.empty((B, planes - 2, H, W), dtype=dtype, device=dy.device, memory_format=layout)
    if dx.numel():
        dense = (dy.contiguous(memory_format=layout), live.contiguous(), blocks.contiguous())
        numbers = (patch, H, W, planes - 2, copies, unit_of((H, W), patch), _alignment(H * W))
        args = (*dense, dx, *numbers, layout is torch.channels_last)
        launch(corrupt_bwd_kernel, H * W, dy.device, *args, rows=B, **EXACT)
    return dx


def _launch(
    x: Tensor,
    blocks: Tensor,
    key: tuple[Tensor, Tensor, Tensor, Tensor],
    y: Tensor | None,
    live: Tensor | None,
    patch: int,
    copies: int,
    size: Sequence[int],
) -> None:
    sigma, seed, sample_ids, draws = key
    (B, C, *given), (H, W), layout = x.shape, size, memory_format(x)
    if B:
        tensors = (x.contiguous(memory_format=layout), blocks.contiguous(), sigma, seed, sample_ids.contiguous(), draws)
        strides = (stride_of(sigma), stride_of(draws))
        is_resized = given != [H, W]
        tiles = (C, copies, unit_of(size, patch), _alignment(H * W), is_resized, layout is torch.channels_last)
        args = (*tensors, y, live, *strides, int(Tag.NOISE), patch, *given, H, W, *tiles)
        block = GATHER_BLOCK if is_resized else MAX_BLOCK
        launch(corrupt_fwd_kernel, H * W, x.device, *args, rows=B, block=block, **EXACT)


def _is_large(x: Tensor, size: Sequence[int]) -> bool:
    rows = (x.shape[1] * x.shape[2] * x.shape[3], (x.shape[1] + 2) * size[0] * size[1])
    return max(rows) > MAX_ROW or max(*x.shape[2:], *size) > MAX_SIDE


def _alignment(pixels: int) -> int:
    return next(n for n in (8, 4, 1) if pixels % n == 0)
