"""The nearest point on a hyperplane inside a box, the target of FAB's steps.

It is the root of a monotone, piecewise linear function of one number per row, found by bisection or, for the L1 norm,
whose function has jumps, by sorting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.checks import check_choice, message
from ._checks import check_dtype
from ._registry import define


def formula(x: Tensor, w: Tensor, change: Tensor, norm: str) -> Tensor:
    """The op as a user would write it."""
    # Reduce to w >= 0 by flipping signs, and scale so that w * w neither overflows nor underflows.
    direction = w.sign() * torch.where(change < 0, -1.0, 1.0)[:, None]
    scale = w.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    change, w = change.abs()[:, None] / scale, w.abs() / scale
    room = torch.where(direction > 0, 1 - x, x).masked_fill(w == 0, 0)
    if norm == "L1":
        return direction * _fill(w, room, change)
    if norm == "L2":
        # Coordinates that contribute nothing would have huge caps.
        w = w.masked_fill(w < 1e-8, 0)
        cap = torch.where(w > 0, room / w.clamp_min(1e-8), 0)
        return direction * torch.minimum(_level(w * w, cap, change) * w, room)
    return direction * torch.minimum(_level(w, room, change), room)


def _level(weight: Tensor, cap: Tensor, total: Tensor) -> Tensor:
    """The l (B, 1) with sum_i weight_i min(l, cap_i) = total; the largest cap if total is out of reach.

    Bisection on bit patterns between 0 and the largest cap, since floats >= 0 have the same order as their bits: exact
    to the last bit at any scale, and several times faster than sorting the caps.
    """
    bits = {4: torch.int32, 8: torch.int64}[cap.element_size()]
    high = cap.amax(dim=1, keepdim=True).view(bits)
    low = torch.zeros_like(high)
    for _ in range(8 * cap.element_size()):
        middle = low + ((high - low) >> 1)
        short = (weight * torch.minimum(cap, middle.view(cap.dtype))).sum(dim=1, keepdim=True) < total
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return high.view(cap.dtype)


def _fill(weight: Tensor, room: Tensor, total: Tensor) -> Tensor:
    """The d, 0 <= d <= room, of smallest sum with sum_i weight_i d_i = total; d = room if total is out of reach."""
    weight, order = weight.sort(dim=1, descending=True)
    room = room.gather(1, order)
    gain = weight * room
    before = gain.cumsum(dim=1, dtype=torch.float64) - gain
    part = ((total - before) / weight.clamp_min(1e-30)).to(room.dtype)
    return torch.empty_like(room).scatter_(1, order, torch.minimum(part.clamp_min(0), room))


def reference(x: Tensor, w: Tensor, change: Tensor, l2: bool) -> Tensor:
    """The specification for the norms L2 and Linf."""
    return formula(x, w, change, "L2" if l2 else "Linf").contiguous()


def check_arguments(function: str, x: Tensor, w: Tensor, change: Tensor, l2: bool = False) -> None:
    """Raise unless the arguments are as the docstring describes."""
    check_dtype(function, "x", x, torch.float32, torch.float64)
    if x.dim() != 2:
        raise ValueError(message(function, "x", "of shape (B, n)", tuple(x.shape)))
    if w.shape != x.shape or w.dtype != x.dtype:
        expected = f"of dtype and shape of x, {tuple(x.shape)}"
        raise ValueError(message(function, "w", expected, f"{tuple(w.shape)}, {w.dtype}"))
    if change.shape != x.shape[:1] or change.dtype != x.dtype:
        expected = f"of dtype of x and shape {tuple(x.shape[:1])}"
        raise ValueError(message(function, "change", expected, f"{tuple(change.shape)}, {change.dtype}"))


OP = define(
    "hyperplane_step(Tensor x, Tensor w, Tensor change, bool l2) -> Tensor",
    reference,
    check=check_arguments,
    kernels=None,
)


def hyperplane_step(norm: str, x: Tensor, w: Tensor, change: Tensor) -> Tensor:
    """The smallest step from x to the hyperplane, inside the box.

        argmin |d|_p   subject to   w . d = change,   0 <= x + d <= 1           Croce & Hein, ICML 2020, equation 4

    Coordinate i can move by at most r_i towards the hyperplane. The solution moves it by min(l, r_i) (Linf) or
    min(l |w_i|, r_i) (L2), with the same l for all coordinates; for L1, it moves the coordinates with the largest |w_i|
    as far as possible until the hyperplane is reached.

    Args:
        norm: "Linf", "L2" or "L1".
        x: points (B, n) in [0, 1], float32 or float64.
        w: normals (B, n), finite, of the dtype of `x`.
        change: the required value of w . d, (B,), finite, of the dtype of `x`.

    Returns:
        Steps (B, n). If the box does not meet the hyperplane, the step that comes nearest to it; 0 where w is 0.

    Raises:
        TypeError: If a dtype is not as described.
        ValueError: If `norm` or a shape is not as described.

    Notes:
        C++ on the CPU, except for L1; eager mode otherwise. Not differentiable.

    Example:
        >>> x, w = torch.full((1, 2), 0.5), torch.tensor([[3.0, 1.0]])
        >>> atop_fast.ops.hyperplane_step("Linf", x, w, torch.tensor([1.0]))
        tensor([[0.2500, 0.2500]])
    """
    check_choice("hyperplane_step", "norm", norm, ("Linf", "L2", "L1"))
    if norm != "L1":
        return OP(x, w, change, norm == "L2")
    check_arguments("hyperplane_step", x, w, change)
    return formula(x, w, change, norm)
