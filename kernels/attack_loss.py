"""The losses of an attack, their gradients and correct predictions                         docs/math.md#attack_loss

A program handles ROWS complete samples. NaN is replaced first, because reductions differ in how they order it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops.attack_loss import reference

from ._launch import launch
from .exp import exp_and_expm1
from .log1p import log1p

# A program keeps its rows in registers; beyond this many classes, sorting in the reference is faster than spilling.
MAX_CLASSES = 4096
# Several threads hold copies of a row's scalars, so many short rows per program would take many registers.
MIN_BLOCK = 256


@triton.jit
def _divide(a, b):
    # Plain float32 division has an error of up to 2 ulp; float64 division is correctly rounded.
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _pick(b_z, o_class, b_index):
    """The logit of one class per row, and 0 for an index outside the classes."""
    return tl.sum(tl.where(o_class == b_index[:, None], b_z, 0.0), axis=1)


@triton.jit
def _take(b_z, o_class):
    """The largest logit of every row, its class (the lowest in a tie), and the remaining logits."""
    b_value = tl.max(b_z, axis=1)
    b_index = tl.min(tl.where(b_z == b_value[:, None], o_class, 2147483647), axis=1)
    return b_value, b_index, tl.where(o_class == b_index[:, None], float("-inf"), b_z)


@triton.jit
def _cross_entropy(b_z, o_class, b_y, b_first):
    b_z_y = _pick(b_z, o_class, b_y)
    b_e, _ = exp_and_expm1(b_z - b_first[:, None])
    b_e_y, _ = exp_and_expm1(b_z_y - b_first)
    is_y = o_class == b_y[:, None]
    b_others = tl.sum(tl.where(is_y, 0.0, b_e), axis=1)
    b_loss = (b_first - b_z_y) + log1p(b_others + (b_e_y - 1.0))
    b_scale = _divide(tl.full(b_e_y.shape, 1.0, b_e_y.dtype), b_others + b_e_y)
    return b_loss, tl.where(is_y, -b_others[:, None], b_e) * b_scale[:, None]


@triton.jit
def _ranked(b_z, o_class, b_y, b_target, b_first, b_i1, b_rest, KIND: tl.constexpr, HAS_TARGET: tl.constexpr):
    b_second, b_i2, b_rest = _take(b_rest, o_class)
    if HAS_TARGET:
        b_other, b_z_other = b_target, _pick(b_z, o_class, b_target)
    else:
        b_other = tl.where(b_i1 == b_y, b_i2, b_i1)
        b_z_other = tl.where(b_i1 == b_y, b_second, b_first)
    b_loss = b_z_other - _pick(b_z, o_class, b_y)
    b_move = tl.where(o_class == b_other[:, None], 1.0, 0.0) - tl.where(o_class == b_y[:, None], 1.0, 0.0)
    if KIND == 2:
        b_low, b_i3, b_rest = _take(b_rest, o_class)
        b_spread = tl.where(o_class == b_i3[:, None], 1.0, 0.0)
        if HAS_TARGET:
            b_fourth, b_i4, _ = _take(b_rest, o_class)
            b_low = (b_low + b_fourth) * 0.5
            b_spread = tl.where((o_class == b_i3[:, None]) | (o_class == b_i4[:, None]), 0.5, 0.0)
        b_spread -= tl.where(o_class == b_i1[:, None], 1.0, 0.0)
        b_slope = _divide(tl.full(b_low.shape, 1.0, b_low.dtype), (b_first - b_low) + 1e-12)
        b_loss *= b_slope
        # Separate terms, so that 0 times an infinity from another class does not give NaN.
        b_move = tl.where(b_move == 0.0, 0.0, b_move * b_slope[:, None])
        b_move += tl.where(b_spread == 0.0, 0.0, b_spread * (b_loss * b_slope)[:, None])
    return b_loss, b_move.to(b_z.dtype)


@triton.jit
def _odds(b_z, o_class, b_y, b_other, KIND: tl.constexpr):
    """pm and its parts as log A - log B, see csrc/math/attack_loss.h."""
    IN_A: tl.constexpr = KIND != 5
    IN_B: tl.constexpr = KIND != 4
    WEIGHT: tl.constexpr = 2.0 if KIND == 3 else 1.0
    b_one = tl.full(b_y.shape, 1.0, b_z.dtype)
    is_y, is_other = o_class == b_y[:, None], o_class == b_other[:, None]
    b_third = tl.max(tl.where(is_y | is_other, float("-inf"), b_z), axis=1)
    b_z_y, b_z_o = _pick(b_z, o_class, b_y), _pick(b_z, o_class, b_other)
    if KIND == 5:
        b_z_y = tl.where(b_y == b_other, float("-inf"), b_z_y)
    b_top_a, b_top_b = b_z_o, b_z_y
    b_unit_a, b_unit_b, b_e_o, b_e_y = b_one * 0.0, b_one * 0.0, b_one, b_one
    if IN_A:
        b_top_a = tl.where(b_third > b_z_o, b_third, b_z_o)
        b_unit = b_top_a
        b_e_o, _ = exp_and_expm1(b_z_o - b_top_a)
    if IN_B:
        b_top_b = tl.where(b_third > b_z_y, b_third, b_z_y)
        b_unit = b_top_b
        b_e_y, _ = exp_and_expm1(b_z_y - b_top_b)
    if IN_A and IN_B:
        b_unit = tl.where(b_top_a < b_top_b, b_top_a, b_top_b)
    if IN_A:
        b_unit_a, _ = exp_and_expm1(b_unit - b_top_a)
    if IN_B:
        b_unit_b, _ = exp_and_expm1(b_unit - b_top_b)
    b_e, _ = exp_and_expm1(b_z - b_unit[:, None])
    b_e = tl.where(is_y | is_other, 0.0, b_e)
    b_rest = tl.sum(b_e, axis=1)
    b_a, b_b = WEIGHT * b_e_o + b_rest * b_unit_a, WEIGHT * b_e_y + b_rest * b_unit_b
    b_log_a = log1p((WEIGHT * b_e_o - 1.0) + b_rest * b_unit_a)
    b_log_b = log1p((WEIGHT * b_e_y - 1.0) + b_rest * b_unit_b)
    b_loss = (b_top_a - b_top_b) + (b_log_a - b_log_b)
    if IN_A and IN_B:
        # A and B may be nearly equal: compute their difference as A - B = 2 (e_o - e_y).
        is_above = b_z_y > b_z_o
        _, b_gap = exp_and_expm1(tl.where(is_above, b_z_o - b_z_y, b_z_y - b_z_o))
        b_difference = -WEIGHT * b_gap * tl.where(is_above, b_unit_a * b_e_y, b_unit_b * b_e_o)
        b_at_rest = _divide(tl.where(is_above, b_difference, -b_difference), b_a * b_b)
        b_growth = log1p(_divide(b_difference, tl.where(is_above, b_a, b_b) * (b_unit_a * b_unit_b)))
        is_near = (b_unit_a > 9.5367431640625e-07) & (b_unit_b > 9.5367431640625e-07)
        b_loss = tl.where(is_near, tl.where(is_above, -b_growth, b_growth), b_loss)
    elif IN_A:
        b_at_rest = _divide(b_unit_a, b_a)
    else:
        b_at_rest = -_divide(b_unit_b, b_b)
    b_move = tl.where(is_y, -_divide(WEIGHT * b_e_y, b_b)[:, None], 0.0)
    b_move += tl.where(is_other, _divide(WEIGHT * b_e_o, b_a)[:, None], 0.0)
    return b_loss, (b_e * b_at_rest[:, None] + b_move).to(b_z.dtype)


@triton.jit
def attack_loss_kernel(
    logits,  # [B, K]
    labels,  # [B]
    targets,  # [B], or None
    losses,  # [B]
    gradient,  # [B, K]
    correct,  # [B]
    B,
    K,
    KIND: tl.constexpr,  # the index in LOSSES
    COLUMNS: tl.constexpr,  # K or more
    BLOCK: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK // COLUMNS
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_class = tl.arange(0, COLUMNS)[None, :]
    is_row = o_row < B
    mask = is_row[:, None] & (o_class < K)
    o_z = o_row[:, None] * K + o_class
    b_z = tl.load(logits + o_z, mask, other=float("-inf"))
    b_z = b_z if b_z.dtype == tl.float64 else b_z.to(tl.float32)
    b_nan = tl.min(tl.where(b_z != b_z, o_class, 2147483647), axis=1)
    b_z = tl.where(b_z != b_z, float("-inf"), b_z)
    b_y = tl.load(labels + o_row, is_row, other=0)
    is_broken = (b_y < 0) | (b_y >= K)
    b_first, b_i1, b_rest = _take(b_z, o_class)
    if KIND == 0:
        b_loss, b_gradient = _cross_entropy(b_z, o_class, b_y, b_first)
    elif KIND == 4 or (KIND > 2 and targets is None):
        # The ranks cannot be used: if all other logits are -inf, they would return the first class again.
        is_y = o_class == b_y[:, None]
        b_others = tl.where(is_y, float("-inf"), b_z)
        is_greatest = (b_others == tl.max(b_others, axis=1)[:, None]) & (is_y == 0)
        b_other = tl.min(tl.where(is_greatest, o_class, 2147483647), axis=1)
        b_loss, b_gradient = _odds(b_z, o_class, b_y, b_other, KIND)
    elif targets is None:
        b_loss, b_gradient = _ranked(b_z, o_class, b_y, b_y, b_first, b_i1, b_rest, KIND, False)
    else:
        b_target = tl.load(targets + o_row, is_row, other=0)
        is_broken = is_broken | (b_target < 0) | (b_target >= K)
        if KIND > 2:
            b_loss, b_gradient = _odds(b_z, o_class, b_y, b_target, KIND)
        else:
            b_loss, b_gradient = _ranked(b_z, o_class, b_y, b_target, b_first, b_i1, b_rest, KIND, True)
    b_loss = tl.where(is_broken | (b_nan < K), float("nan"), b_loss)
    # The gradient is NaN if the cross-entropy is NaN, or another loss is not finite.
    is_lost = b_loss != b_loss if KIND == 0 else b_loss - b_loss != 0.0
    b_gradient = tl.where(is_lost[:, None], float("nan"), b_gradient)
    is_right = (tl.where(b_nan < K, b_nan, b_i1) == b_y) & (is_broken == 0)
    tl.store(gradient + o_z, b_gradient, mask)
    tl.store(losses + o_row, b_loss, is_row)
    tl.store(correct + o_row, is_right.to(tl.int8), is_row)


def launch_attack_loss(
    logits: Tensor, labels: Tensor, targets: Tensor | None, kind: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton implementation of atop_fast::attack_loss."""
    batch, classes = logits.shape
    if classes > MAX_CLASSES:
        return reference(logits, labels, targets, kind)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.empty(batch, dtype=wide, device=logits.device)
    gradient = torch.empty((batch, classes), dtype=wide, device=logits.device)
    correct = torch.empty(batch, dtype=torch.bool, device=logits.device)
    if batch:
        columns = max(2, triton.next_power_of_2(classes))
        block = max(MIN_BLOCK, columns)
        inputs = (logits.contiguous(), labels.contiguous(), None if targets is None else targets.contiguous())
        outputs = (losses, gradient, correct.view(torch.int8))
        launch(
            attack_loss_kernel, batch * columns, logits.device, *inputs, *outputs, batch, classes, kind, columns,
            block=block,
        )  # fmt: skip
    return losses, gradient, correct
