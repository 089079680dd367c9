"""Bilinear and antialiased resizing as two sparse matrices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_integer, message
from ._checks import FLOATS, check_dtype
from ._images import memory_format
from ._registry import LIBRARY, NAMESPACE
from .resample import OP as RESAMPLE
from .resample import Taps


def _resize(x: Tensor, size: Sequence[int], antialias: bool) -> Tensor:
    (rows, rows_t), (columns, columns_t) = _taps(x, x.shape[2:], size, antialias)
    return RESAMPLE(x, *rows, *columns, *rows_t, *columns_t)


def _resize_bwd(dy: Tensor, size: Sequence[int], antialias: bool) -> Tensor:
    (rows, rows_t), (columns, columns_t) = _taps(dy, size, dy.shape[2:], antialias)
    return RESAMPLE(dy, *rows_t, *columns_t, *rows, *columns)


# Separate ops on top of `resample`, so that tracing does not enter the construction of the matrices. Each is the
# gradient of the other.
for _name, _function in (("resize", _resize), ("resize_bwd", _resize_bwd)):
    LIBRARY.define(f"{_name}(Tensor x, int[] size, bool antialias) -> Tensor")
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
OP = torch.ops.atop_fast.resize.default
OP_BWD = torch.ops.atop_fast.resize_bwd.default


def _fake(x: Tensor, size: Sequence[int], antialias: bool) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], *size)).contiguous(memory_format=memory_format(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size, ctx.antialias = tuple(inputs[0].shape[2:]), inputs[2]


for _name, _adjoint in (("resize", OP_BWD), ("resize_bwd", OP)):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}",
        lambda ctx, dy, adjoint=_adjoint: (adjoint(dy, ctx.size, ctx.antialias), None, None),
        setup_context=_setup_context,
        lib=LIBRARY,
    )


def resize(x: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    """Resize images bilinearly, deterministically in both directions.

    Args:
        x: Images (B, C, h, w), float32, float64, bfloat16 or float16.
        size: The new height and width (H, W).
        antialias: Widen the filter when shrinking, so that no pixel is skipped.

    Returns:
        (B, C, H, W) in the dtype of `x`; channels_last if `x` is. Equal to torch's interpolate(mode="bilinear",
        align_corners=False) up to rounding.

    Raises:
        TypeError: If `x` has the wrong type or dtype.
        ValueError: If a shape or size is not as described.

    Notes:
        Differentiable any number of times: the gradient is the same operation with transposed matrices, without
        atomics. Every backend returns the same bits.

    Example:
        >>> atop_fast.ops.resize(torch.rand(8, 3, 32, 32), (256, 256)).shape
        torch.Size([8, 3, 256, 256])
    """
    check_images("resize", x)
    return OP(x, check_size("resize", size), bool(antialias))


def bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize by elementary operations, in the same order as in `corrupt`; float32 or float64 (B, C, h, w)."""
    for dim in (3, 2):
        first, second, weight = bilinear_taps(x.shape[dim], size[dim - 2], x.device)
        weight = weight.to(x.dtype).unsqueeze(1) if dim == 2 else weight.to(x.dtype)
        x = x.index_select(dim, first) * (1 - weight) + x.index_select(dim, second) * weight
    return x


def bilinear_taps(given: int, wanted: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Two source pixels for each of `wanted` pixels, and the weight of the second, float64, along one axis.

    Pixel i lies at max(0, (i + 1/2) given / wanted - 1/2), computed in integers to avoid rounding.
    """
    position = ((2 * torch.arange(wanted, device=device) + 1) * given - wanted).clamp(min=0)
    first = position // (2 * wanted)
    # On some devices, torch divides by a Python number less accurately than by a tensor.
    weight = (position % (2 * wanted)).double() / torch.full((), 2 * wanted, dtype=torch.float64, device=device)
    return first, (first + 1).clamp(max=given - 1), weight


def _taps(x: Tensor, given: Sequence[int], wanted: Sequence[int], antialias: bool) -> list[tuple[Taps, Taps]]:
    """For rows and columns, the matrix of a resize from `given` to `wanted` and its transpose, matching `x`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return [_device_taps(g, w, antialias, x.device, dtype) for g, w in zip(given, wanted, strict=True)]


# Cached forever, because CUDA graphs read this memory. A copy from the host in each call would synchronize with a GPU.
@functools.cache
def _device_taps(
    given: int, wanted: int, antialias: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Taps, Taps]:
    rows, transposed = (
        Taps(taps.start.to(device), taps.weight.to(device, dtype)) for taps in axis_taps(given, wanted, antialias)
    )
    return rows, transposed


@functools.lru_cache(maxsize=64)
def axis_taps(given: int, wanted: int, antialias: bool) -> tuple[Taps, Taps]:
    matrix = torch.zeros(wanted, given, dtype=torch.float64)
    if antialias and wanted < given:
        # A triangle filter as wide as an output pixel, normalized over the pixels inside the image.
        scale = given / wanted
        center = (torch.arange(wanted, dtype=torch.float64) + 0.5) * scale
        distance = (torch.arange(given) + 0.5 - center[:, None]).abs() / scale
        matrix = (1 - distance).clamp(min=0)
        matrix = matrix / matrix.sum(dim=1, keepdim=True)
    else:
        first, second, weight = bilinear_taps(given, wanted, torch.device("cpu"))
        rows = torch.arange(wanted)
        matrix[rows, first] += 1 - weight
        matrix[rows, second] += weight
    return _sparse(matrix), _sparse(matrix.T)


def _sparse(matrix: Tensor) -> Taps:
    """The band of a matrix (n, m) whose rows have contiguous non-zeros."""
    columns = matrix.shape[1]
    used = matrix != 0
    first = used.int().argmax(dim=1)
    last = columns - 1 - used.flip(1).int().argmax(dim=1)
    width = max(1, int(torch.where(used.any(dim=1), last - first + 1, 1).max()))
    start = torch.where(used.any(dim=1), first, 0).clamp(max=columns - width)
    weight = matrix.gather(1, start[:, None] + torch.arange(width))
    return Taps(start[None], weight[None].contiguous())


def check_images(function: str, x: Tensor) -> None:
    """Raise unless `x` is images that the op accepts."""
    check_dtype(function, "x", x, *FLOATS)
    if x.dim() != 4 or min(x.shape[2:]) < 1:
        raise ValueError(message(function, "x", "images of shape (B, C, H, W)", tuple(x.shape)))


def check_size(function: str, size: Any) -> tuple[int, int]:
    """Raise unless `size` is two integers >= 1."""
    if not isinstance(size, (tuple, list)):
        raise TypeError(message(function, "size", "two integers >= 1", size))
    if len(size) != 2:
        raise ValueError(message(function, "size", "two integers >= 1", tuple(size)))
    if torch.compiler.is_compiling():
        return size[0], size[1]
    return check_integer(function, "size", size[0], low=1), check_integer(function, "size", size[1], low=1)
