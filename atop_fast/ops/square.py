"""The candidates of Square Attack: images with a modified square."""

from __future__ import annotations

import torch
from torch import Tensor

from ._registry import define


def square_linf(x: Tensor, x0: Tensor, signs: Tensor, rows: Tensor, columns: Tensor, eps: float) -> Tensor:
    """Images x, with x0 + eps * signs, clipped to [0, 1], in the square where both masks are 1.

    Args:
        x, x0: (B, C, H, W), float32 or float64, contiguous.
        signs: (B, C, 1, 1), -1 or 1.
        rows, columns: (B, 1, H, 1) and (B, 1, 1, W), 0 or 1.
        eps: radius.

    Returns:
        (B, C, H, W).

    Reference:
        Andriushchenko et al., ECCV 2020, algorithm 2.
    """
    # torch.lerp with weight 0 or 1 is exact, and on CPUs many times faster than torch.where.
    return torch.lerp(x, torch.add(x0, signs, alpha=eps).clamp_(0, 1), rows * columns)


def square_bump(
    x: Tensor,
    x0: Tensor,
    signs: Tensor,
    rows: Tensor,
    columns: Tensor,
    other_rows: Tensor,
    other_columns: Tensor,
    top: Tensor,
    left: Tensor,
    bump: Tensor,
    bumps: Tensor,
    eps: float,
    l2: bool,
) -> Tensor:
    """Add a bump to the first square and reset the second square to x0.

    The bump is scaled to the norm that both squares and the unused budget allow.

    Args:
        x, x0, signs, rows, columns: as in square_linf.
        other_rows, other_columns: the masks of the second square.
        top, left: position of the first square, (B, 1, 1, 1), int64.
        bump: index into `bumps`, (B, 1, 1, 1), int64.
        bumps: (N, S, S), each bump in its top left corner.
        eps: radius in the L2 norm or the L1 norm.
        l2: whether the norm is L2.

    Returns:
        (B, C, H, W): for L2, scaled to the norm eps and clipped to [0, 1]; for L1, neither.

    Reference:
        Andriushchenko et al., ECCV 2020, algorithm 3; for L1, AutoAttack's variant.
    """
    p = 2 if l2 else 1
    delta, channels, side = x - x0, x.shape[1], bumps.shape[1]
    row = (torch.arange(x.shape[2], device=x.device)[:, None] - top).clamp_(0, side - 1)
    column = (torch.arange(x.shape[3], device=x.device) - left).clamp_(0, side - 1)
    shape = bumps.take((bump * side + row) * side + column)
    inside, cleared = rows * columns, other_rows * other_columns
    power = delta * delta if l2 else delta.abs()
    spare = (eps**p - power.sum(dim=(1, 2, 3), keepdim=True)).clamp_min(0) / channels
    here = (power * inside).sum(dim=(2, 3), keepdim=True)
    budget = spare + power.mul_(torch.maximum(inside, cleared)).sum(dim=(2, 3), keepdim=True)
    new = torch.addcmul(delta / (here ** (1 / p) + 1e-12), shape, signs).mul_(inside)
    size = (new * new if l2 else new.abs()).sum(dim=(2, 3), keepdim=True) ** (1 / p)
    # For L1, the original gives every channel the whole budget; the projection removes the excess.
    scale = budget.sqrt() if l2 else budget * channels
    delta = torch.lerp(delta * (1 - cleared), new.mul_(scale / (size + 1e-12)), inside)
    if not l2:
        return x0 + delta
    norm = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return (x0 + delta * (eps / (norm + 1e-12))).clamp_(0, 1)


OP_LINF = define(
    "square_linf(Tensor x, Tensor x0, Tensor signs, Tensor rows, Tensor columns, float eps) -> Tensor",
    square_linf,
    check=None,
    kernels=None,
)
OP_BUMP = define(
    "square_bump(Tensor x, Tensor x0, Tensor signs, Tensor rows, Tensor columns, Tensor other_rows,"
    " Tensor other_columns, Tensor top, Tensor left, Tensor bump, Tensor bumps, float eps, bool l2) -> Tensor",
    square_bump,
    check=None,
    kernels=None,
)
