"""The steps between the matrix products of contextual attention                      docs/math.md#contextual_attention

Matrices are [B, COUNT, COUNT], row p and column l, for the COUNT = HEIGHT WIDTH positions of a sample. A program
handles a tile of one matrix: LINES rows by BLOCK / LINES columns. It reads along diagonals, which the rows of a tile
largely share. The products themselves are computed by torch.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops._images import memory_format, widen
from atop_fast.ops.contextual_attention import (
    MIN_NORM,
    SCALE,
    no_autocast,
    parities,
    rounded,
)

from ._launch import launch
from .exp import exp_and_expm1

# The size of a tile in sums along diagonals, and its maximum number of columns.
TILE = 1024
MAX_COLUMNS = 64
# A softmax tile holds whole rows or, if a row is longer, a part of one row at a time.
ROW_TILE = 2048
ROW_WARPS = 8
NEIGHBORS = ((-1, 0, 1), (-1, 0, 1))
_SCALE = tl.constexpr(SCALE)


@triton.jit
def _exp(x):
    e, _ = exp_and_expm1(x)
    return e


@triton.jit
def _tile(COUNT, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """The program's sample, the index of its row tile among all samples, its rows and its columns."""
    COLUMNS: tl.constexpr = BLOCK // LINES
    n_columns, n_lines = tl.cdiv(COUNT, COLUMNS), tl.cdiv(COUNT, LINES)
    i_line = tl.program_id(0) // n_columns
    o_p = i_line % n_lines * LINES + tl.arange(0, LINES)
    o_l = tl.program_id(0) % n_columns * COLUMNS + tl.arange(0, COLUMNS)
    return (i_line // n_lines).to(tl.int64), i_line, o_p, o_l


@triton.jit
def _read(matrix, o_p, o_l, m_p, m_l, COUNT):
    """A tile of one sample's matrix, zero-padded."""
    p_row = matrix + o_p[:, None].to(tl.int64) * COUNT
    return tl.load(p_row + o_l[None, :], m_p[:, None] & m_l[None, :], other=0.0)


@triton.jit
def _beside(o, row_step, column_step, HEIGHT, WIDTH):
    """The positions shifted by the given rows and columns, and the mask of valid positions."""
    i_row, i_column = o // WIDTH + row_step, o % WIDTH + column_step
    return i_row * WIDTH + i_column, (i_row >= 0) & (i_row < HEIGHT) & (i_column >= 0) & (i_column < WIDTH)


@triton.jit
def _after(o, step, COUNT, WIDTH, BY_ROWS: tl.constexpr):
    """The next (step 1) or previous (-1) positions in row-major or column-major order, and the mask of valid ones."""
    if BY_ROWS:
        o_next = o + step
    else:
        o_next = o + step * WIDTH
        # In column-major order, the last row is followed by the first row of the next column, and vice versa.
        o_next += tl.where(o_next < 0, COUNT - 1, tl.where(o_next >= COUNT, 1 - COUNT, 0))
    # The first and the last position are the same in both orders.
    return o_next, (o + step >= 0) & (o + step < COUNT)


@triton.jit
def _fuse(matrix, o_p, o_l, COUNT, WIDTH, IS_TRANSPOSED: tl.constexpr):
    """A tile of the matrix fused by rows and then by columns, or in the opposite order if transposed."""
    b_sum = tl.zeros([o_p.shape[0], o_l.shape[0]], matrix.dtype.element_ty)
    for i in tl.static_range(-1, 2):
        o_p_1, m_p_1 = _after(o_p, i, COUNT, WIDTH, IS_TRANSPOSED)
        o_l_1, m_l_1 = _after(o_l, i, COUNT, WIDTH, IS_TRANSPOSED)
        for j in tl.static_range(-1, 2):
            o_p_2, m_p_2 = _after(o_p_1, j, COUNT, WIDTH, not IS_TRANSPOSED)
            o_l_2, m_l_2 = _after(o_l_1, j, COUNT, WIDTH, not IS_TRANSPOSED)
            b_sum += _read(matrix, o_p_2, o_l_2, m_p_1 & m_p_2, m_l_1 & m_l_2, COUNT)
    return b_sum


@triton.jit(do_not_specialize=["ROW_STEP", "COLUMN_STEP"])
def diagonals_kernel(
    matrix,  # [B, COUNT, COUNT]
    divisors,  # [B, COUNT] by columns, or None
    sums,  # [B, COUNT, COUNT]
    HEIGHT,
    WIDTH,
    ROW_STEP,  # the first of STEPS shifts of both positions
    COLUMN_STEP,
    STEPS: tl.constexpr,
    ADDS: tl.constexpr,  # whether to accumulate into `sums`
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COUNT = HEIGHT * WIDTH
    i_sample, _, o_p, o_l = _tile(COUNT, LINES, BLOCK)
    m_p, m_l = o_p < COUNT, o_l < COUNT
    matrix += i_sample * COUNT * COUNT
    b_sum = tl.zeros([LINES, BLOCK // LINES], sums.dtype.element_ty)
    for i in tl.static_range(STEPS):
        for j in tl.static_range(STEPS):
            o_p_moved, m_p_moved = _beside(o_p, ROW_STEP + i, COLUMN_STEP + j, HEIGHT, WIDTH)
            o_l_moved, m_l_moved = _beside(o_l, ROW_STEP + i, COLUMN_STEP + j, HEIGHT, WIDTH)
            b_sum += _read(matrix, o_p_moved, o_l_moved, m_p_moved, m_l_moved, COUNT)
    if divisors is not None:
        b_sum /= tl.load(divisors + i_sample * COUNT + o_l, m_l, other=1.0)[None, :]
    p_sums = sums + i_sample * COUNT * COUNT + o_p[:, None].to(tl.int64) * COUNT + o_l[None, :]
    mask = m_p[:, None] & m_l[None, :]
    if ADDS:
        b_sum += tl.load(p_sums, mask)
    tl.store(p_sums, b_sum, mask)


@triton.jit
def _scaled_scores(scores, valid, o_p, o_l, COUNT, WIDTH):
    """The logits of softmax in a tile, -infinity beyond the matrix; and the flags."""
    m_l = o_l < COUNT
    b_valid = tl.load(valid + o_l, m_l, other=0).to(scores.dtype.element_ty)[None, :]
    b_z = _SCALE * _fuse(scores, o_p, o_l, COUNT, WIDTH, False) * b_valid
    return tl.where(m_l[None, :], b_z, float("-inf")), b_valid


@triton.jit
def weigh_fwd_kernel(
    scores,  # [B, COUNT, COUNT]
    valid,  # [B, COUNT]
    weights,  # [B, COUNT, COUNT]
    COUNT,
    WIDTH,
    IS_WHOLE: tl.constexpr,  # whether a tile holds whole rows
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weights = valid softmax(10 valid fuse(scores)) by rows. Rows that span several tiles are fused twice."""
    COLUMNS: tl.constexpr = BLOCK // LINES
    n_lines = tl.cdiv(COUNT, LINES)
    i_sample = (tl.program_id(0) // n_lines).to(tl.int64)
    o_p = tl.program_id(0) % n_lines * LINES + tl.arange(0, LINES)
    scores += i_sample * COUNT * COUNT
    valid += i_sample * COUNT
    b_z, b_valid = _scaled_scores(scores, valid, o_p, tl.arange(0, COLUMNS), COUNT, WIDTH)
    b_greatest = tl.max(b_z, 1)
    b_e = _exp(b_z - b_greatest[:, None])
    b_total = tl.sum(b_e, 1)
    if not IS_WHOLE:
        i_first = COLUMNS
        while i_first < COUNT:
            b_z, b_valid = _scaled_scores(scores, valid, o_p, i_first + tl.arange(0, COLUMNS), COUNT, WIDTH)
            b_new = tl.maximum(b_greatest, tl.max(b_z, 1))
            b_e = _exp(b_z - b_new[:, None])
            b_less = _exp(b_greatest - b_new)
            b_total = b_total * b_less + tl.sum(b_e, 1)
            b_greatest = b_new
            i_first += COLUMNS
    b_inverse = 1.0 / b_total
    p_row = weights + i_sample * COUNT * COUNT + o_p[:, None].to(tl.int64) * COUNT
    i_first = 0
    while i_first < COUNT:
        o_l = i_first + tl.arange(0, COLUMNS)
        if not IS_WHOLE:
            b_z, b_valid = _scaled_scores(scores, valid, o_p, o_l, COUNT, WIDTH)
            b_e = _exp(b_z - b_greatest[:, None])
        mask = (o_p < COUNT)[:, None] & (o_l < COUNT)[None, :]
        tl.store(p_row + o_l[None, :], b_e * b_inverse[:, None] * b_valid, mask)
        i_first += COLUMNS


@triton.jit
def weigh_bwd_kernel(
    weights,  # [N, COUNT]
    d,  # [N, COUNT], the gradient in the weights, overwritten by the gradient in the fused scores
    N,  # the number of rows in all samples
    COUNT,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d = 10 weights (d - the sum of weights d) by rows; weights are 0 where valid is 0."""
    COLUMNS: tl.constexpr = BLOCK // LINES
    o_row = tl.program_id(0) * LINES + tl.arange(0, LINES)
    m_row = o_row < N
    b_dot = tl.zeros([LINES], d.dtype.element_ty)
    i_first = 0
    while i_first < COUNT:
        o_l = i_first + tl.arange(0, COLUMNS)
        b_weights = _read(weights, o_row, o_l, m_row, o_l < COUNT, COUNT)
        b_dot += tl.sum(b_weights * _read(d, o_row, o_l, m_row, o_l < COUNT, COUNT), 1)
        i_first += COLUMNS
    i_first = 0
    while i_first < COUNT:
        o_l = i_first + tl.arange(0, COLUMNS)
        b_weights = _read(weights, o_row, o_l, m_row, o_l < COUNT, COUNT)
        b_d = _SCALE * b_weights * (_read(d, o_row, o_l, m_row, o_l < COUNT, COUNT) - b_dot[:, None])
        p_d = d + o_row[:, None].to(tl.int64) * COUNT + o_l[None, :]
        tl.store(p_d, b_d, m_row[:, None] & (o_l < COUNT)[None, :])
        i_first += COLUMNS


@triton.jit
def fuse_bwd_kernel(
    d,  # [B, COUNT, COUNT], the gradient in the fused scores
    scores,  # [B, COUNT, COUNT]
    norms,  # [B, COUNT]
    dproducts,  # [B, COUNT, COUNT]
    partials,  # [B * tiles of a sample's rows, COUNT]
    COUNT,
    WIDTH,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient in the products for constant norms and, per column, -norm times its part of the norms' gradient."""
    i_sample, i_line, o_p, o_l = _tile(COUNT, LINES, BLOCK)
    m_p, m_l = o_p < COUNT, o_l < COUNT
    b_d = _fuse(d + i_sample * COUNT * COUNT, o_p, o_l, COUNT, WIDTH, True)
    b_scores = _read(scores + i_sample * COUNT * COUNT, o_p, o_l, m_p, m_l, COUNT)
    tl.store(partials + i_line.to(tl.int64) * COUNT + o_l, tl.sum(b_d * b_scores, 0), m_l)
    b_norms = tl.load(norms + i_sample * COUNT + o_l, m_l, other=1.0)[None, :]
    p_row = dproducts + i_sample * COUNT * COUNT + o_p[:, None].to(tl.int64) * COUNT
    tl.store(p_row + o_l[None, :], b_d / b_norms, m_p[:, None] & m_l[None, :])


def launch_contextual_attention(features: Tensor, valid: Tensor) -> Tensor:
    """The Triton implementation of atop_fast::contextual_attention."""
    if not features.numel():
        return torch.empty_like(features, memory_format=memory_format(features))
    with no_autocast(features):
        return rounded(_forward(widen(features), valid), features)


def launch_contextual_attention_bwd(dy: Tensor, features: Tensor, valid: Tensor) -> Tensor:
    """The Triton implementation of atop_fast::contextual_attention_bwd."""
    if not features.numel():
        return torch.empty_like(features, memory_format=memory_format(features))
    with no_autocast(features):
        return rounded(_backward(widen(dy), widen(features), valid), features)


def _forward(b: Tensor, valid: Tensor) -> Tensor:
    _, _, weights = _attend(b, valid)
    y = torch.empty_like(b, memory_format=torch.contiguous_format)
    for (*steps, part), (_, _, to) in zip(parities(b), parities(y), strict=True):
        shared = _diagonals(weights, valid.shape[1:], steps)
        torch.mul((part.flatten(2) @ shared.mT).view_as(part), 0.25, out=to)
    return y


def _backward(dy: Tensor, b: Tensor, valid: Tensor) -> Tensor:
    size = valid.shape[1:]
    scores, norms, weights = _attend(b, valid)
    db = torch.empty_like(b, memory_format=torch.contiguous_format)
    dweights: Tensor | None = None
    for (*steps, part), (_, _, dpart), (_, _, to) in zip(parities(b), parities(dy), parities(db), strict=True):
        dpart = 0.25 * dpart.flatten(2)
        # As values: pasting is linear in them, and its transpose is pasting with the transposed weights.
        to.copy_((dpart @ _diagonals(weights, size, steps)).view_as(to))
        # As keys: through the weights to the scores.
        back = [[-step for step in axis] for axis in steps]
        dweights = _diagonals(dpart.mT @ part.flatten(2), size, back, sums=dweights)
    dproducts = _attend_bwd(dweights, weights, scores, norms, size)
    x, dx = b[:, :, ::2, ::2].flatten(2), db[:, :, ::2, ::2]
    dx += (x @ dproducts).add_(x @ dproducts.mT).view_as(dx)
    return db


def _attend(b: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [p, l] before fusing, the norms of the keys, and the weights [p, l]."""
    batch, height, width = valid.shape
    count = height * width
    x = b[:, :, ::2, ::2].flatten(2)
    products = x.mT @ x
    squares = products.diagonal(dim1=1, dim2=2).reshape(batch, 1, height, width)
    norms = F.avg_pool2d(squares, 3, stride=1, padding=1, divisor_override=1).sqrt().clamp(min=MIN_NORM).flatten(1)
    scores = _diagonals(products, (height, width), NEIGHBORS, norms)
    # The products are no longer needed.
    weights, (lines, columns) = products, _tile_of(count, ROW_TILE, ROW_TILE)
    tensors = (scores, valid.contiguous().view(torch.uint8), weights)
    programs, numbers = batch * -(-count // lines), (count, width, count <= columns, lines)
    launch(weigh_fwd_kernel, ROW_TILE, b.device, *tensors, *numbers, rows=programs, block=ROW_TILE, num_warps=ROW_WARPS)
    return scores, norms, weights


def _attend_bwd(dweights: Tensor, weights: Tensor, scores: Tensor, norms: Tensor, size: Sequence[int]) -> Tensor:
    """The gradient in the products of pixels; overwrites `dweights`."""
    batch, count = norms.shape
    lines, _ = _tile_of(count, ROW_TILE, ROW_TILE)
    rows = (weights, dweights, batch * count, count, lines)
    programs = -(-batch * count // lines)
    launch(weigh_bwd_kernel, ROW_TILE, norms.device, *rows, rows=programs, block=ROW_TILE, num_warps=ROW_WARPS)
    lines, columns = _tile_of(count, TILE, MAX_COLUMNS)
    parts = -(-count // lines)
    dproducts, partials = torch.empty_like(scores), scores.new_empty(batch, parts, count)
    tensors, numbers = (dweights, scores, norms, dproducts, partials), (count, size[1], lines)
    programs = batch * parts * -(-count // columns)
    launch(fuse_bwd_kernel, TILE, norms.device, *tensors, *numbers, rows=programs, block=TILE)
    # Scores are divided by the norm of their key, whose square is on the diagonal of the products.
    diagonal = dproducts.diagonal(dim1=1, dim2=2)
    diagonal -= torch.where(norms > MIN_NORM, partials.sum(1) / (2 * norms * norms), 0)
    return _diagonals(dproducts, size, NEIGHBORS)


def _diagonals(
    matrix: Tensor,
    size: Sequence[int],
    steps: Sequence[Sequence[int]],
    divisors: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Sum over `steps` along rows and columns, equal for both positions; accumulated into `sums`, if given."""
    count, adds = size[0] * size[1], sums is not None
    lines, columns = _tile_of(count, TILE, MAX_COLUMNS)
    programs = len(matrix) * -(-count // lines) * -(-count // columns)
    sums = torch.empty_like(matrix) if sums is None else sums
    numbers = (*size, min(steps[0]), min(steps[1]), len(steps[0]), adds, lines)
    launch(diagonals_kernel, TILE, matrix.device, matrix, divisors, sums, *numbers, rows=programs, block=TILE)
    return sums


def _tile_of(count: int, block: int, most: int) -> tuple[int, int]:
    """The numbers of rows and columns of a tile of `block` numbers, with at most `most` columns."""
    columns = min(most, max(16, triton.next_power_of_2(count)))
    return block // columns, columns
