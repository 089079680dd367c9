"""A separable sparse linear map of images, on which every resize and its gradient are based."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.checks import message
from ._checks import FLOATS, check_dtype, check_same_device
from ._images import memory_format
from ._registry import LIBRARY, NAMESPACE, define


class Taps(NamedTuple):
    """The rows of a sparse matrix along one axis: row i is `weight[i, k]` at columns `start[i] + k`.

    start int64 (G, n), weight (G, n, K), where G is 1 or the number of samples. All columns are valid indices, even if
    their weight is 0.
    """

    start: Tensor
    weight: Tensor


def reference(
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
    """The specification: one axis after the other, each sum in the order of its taps.

    The column matrix is applied first, unless the row matrix reduces the number of rows, which saves work. A tap of
    weight 0 does not read its pixel. The last four arguments, the transposed matrices, are for the backward pass.
    16-bit images are computed in float32 and rounded once.
    """
    rows, columns = Taps(row_start, row_weight), Taps(column_start, column_weight)
    wide = x if x.dtype == torch.float64 else x.float()
    if rows_first(x, rows):
        y = _apply(_apply(wide, rows, 2), columns, 3)
    else:
        y = _apply(_apply(wide, columns, 3), rows, 2)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def rows_first(x: Tensor, rows: Taps) -> bool:
    """Whether the row matrix is applied before the column matrix."""
    return rows.start.shape[1] < x.shape[2]


def _apply(x: Tensor, taps: Taps, dim: int) -> Tensor:
    """Apply the matrix of `taps` along axis `dim` of x (B, C, H, W)."""
    shape = [taps.start.shape[0], 1, 1, 1]
    shape[dim] = taps.start.shape[1]
    size = list(x.shape)
    size[dim] = taps.start.shape[1]
    y = x.new_zeros(size)
    for k in range(taps.weight.shape[2]):
        pixels = x.gather(dim, (taps.start + k).view(shape).expand(size))
        weight = taps.weight[:, :, k].view(shape)
        y = y + torch.where(weight == 0, 0, weight * pixels)
    return y


def check_arguments(function: str, x: Tensor, *taps: Tensor) -> None:
    """Raise unless images and taps match. The caller guarantees that the columns are valid indices."""
    check_dtype(function, "x", x, *FLOATS)
    if x.dim() != 4:
        raise ValueError(message(function, "x", "images of shape (B, C, H, W)", tuple(x.shape)))
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    for argument, (start, weight), pixels in (("row", taps[:2], x.shape[2]), ("column", taps[2:4], x.shape[3])):
        check_dtype(function, f"{argument}_start", start, torch.int64)
        if weight.dtype != wanted:
            raise TypeError(message(function, f"{argument}_weight", f"a {wanted} tensor", weight.dtype))
        if start.dim() != 2 or start.shape[0] not in (1, x.shape[0]):
            expected = f"of shape (1 or {x.shape[0]}, n)"
            raise ValueError(message(function, f"{argument}_start", expected, tuple(start.shape)))
        if weight.dim() != 3 or weight.shape[:2] != start.shape or not 1 <= weight.shape[2] <= pixels:
            expected = f"of shape {tuple(start.shape)} and 1 to {pixels} taps"
            raise ValueError(message(function, f"{argument}_weight", expected, tuple(weight.shape)))
        for name, value in ((f"{argument}_start", start), (f"{argument}_weight", weight)):
            check_same_device(function, name, value, "x", x)


_TAPS = "Tensor row_start{0}, Tensor row_weight{0}, Tensor column_start{0}, Tensor column_weight{0}"
OP = define(
    f"resample(Tensor x, {_TAPS.format('')}, {_TAPS.format('_t')}) -> Tensor",
    reference,
    check=check_arguments,
    kernels="resample",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    taps = ctx.saved_tensors
    return OP(dy, *taps[4:], *taps[:4]), *(None,) * 8


torch.library.register_autograd(f"{NAMESPACE}::resample", _backward, setup_context=_setup_context, lib=LIBRARY)
