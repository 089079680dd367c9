"""Random resizing and padding, which is a defense by itself and a transform in front of purifiers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._core.checks import check_integer, message
from ..randomness import Tag, key_tensors, random_bits
from .resample import OP, Taps
from .resize import check_images


class Placement(NamedTuple):
    """The placement of each resized image in its frame: side, top and left, int64 (B,)."""

    side: Tensor
    top: Tensor
    left: Tensor


def random_resize_pad(
    x: Tensor,
    min_size: int,
    max_size: int,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    draw: int | Tensor = 0,
) -> Tensor:
    """Resize every image to a random size and place it at a random position in a frame of zeros.

    Args:
        x: Images (B, C, h, w), float32, float64, bfloat16 or float16.
        min_size: The smallest side s of the resized image, which is s x s pixels.
        max_size: The largest side, which is also the side of the frame.
        seed: 64-bit key of the randomness, an int or an int64 scalar tensor.
        sample_ids: int64 (B,), the identity of every image; default 0..B-1.
        draw: Index of the draw: an int in [0, 2**32), or int64 of shape () or (B,).

    Returns:
        (B, C, max_size, max_size) in the dtype of `x`; channels_last if `x` is.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or number is not as described.

    Notes:
        The side is uniform in min_size..max_size, then top and left are uniform among the positions that fit. Bilinear,
        like :func:`resize`. Differentiable any number of times, without atomics. Every backend returns the same bits,
        in any batch, order or split. All images are resized in one launch.

    Reference:
        Xie et al., Mitigating Adversarial Effects Through Randomization, ICLR 2018, section 3.

    Example:
        >>> atop_fast.ops.random_resize_pad(torch.rand(8, 3, 32, 32), 32, 40).shape
        torch.Size([8, 3, 40, 40])
    """
    function = "random_resize_pad"
    check_images(function, x)
    check_sizes(function, min_size, max_size)
    return place(x, random_placement(function, x, min_size, max_size, seed, sample_ids, draw), max_size)


def random_placement(
    function: str,
    x: Tensor,
    min_size: int,
    max_size: int,
    seed: int | Tensor,
    sample_ids: Tensor | None,
    draw: int | Tensor,
) -> Placement:
    """The random side, top and left of every image."""
    key = key_tensors(function, x.shape[0], x.device, seed, sample_ids, draw)
    word, *offset_words = random_bits(3, *key, Tag.RESIZE).unbind(dim=1)
    side = min_size + (word * (max_size - min_size + 1) >> 32)
    top, left = (offset * (max_size - side + 1) >> 32 for offset in offset_words)
    return Placement(side, top, left)


def place(x: Tensor, placement: Placement, frame: int) -> Tensor:
    """The images resized and placed in a frame of zeros, (B, C, frame, frame)."""
    side, top, left = placement
    axes = ((x.shape[2], top), (x.shape[3], left))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    forward = [_rows(side, offset, given, frame, dtype) for given, offset in axes]
    # The transposed matrices are needed only for the backward pass.
    recorded = x.requires_grad and torch.is_grad_enabled()
    transposed = [_columns(side, offset, given, frame, dtype) for given, offset in axes] if recorded else forward
    return OP(x, *forward[0], *forward[1], *transposed[0], *transposed[1])


def check_sizes(function: str, min_size: int, max_size: int) -> None:
    """Raise unless 1 <= min_size <= max_size."""
    check_integer(function, "min_size", min_size, low=1)
    if check_integer(function, "max_size", max_size, low=1) < min_size:
        raise ValueError(message(function, "max_size", f"an integer and >= min_size={min_size}", max_size))


def _rows(side: Tensor, offset: Tensor, given: int, frame: int, dtype: torch.dtype) -> Taps:
    """The matrix (B, frame, given) along one axis, with two taps per row."""
    index = torch.arange(frame, device=side.device) - offset[:, None]
    first, weight = _source(index, side[:, None], given)
    inside = ((index >= 0) & (index < side[:, None])).to(dtype)
    if given == 1:
        return Taps(torch.zeros_like(index), inside[:, :, None])
    # At the border, the last pixel is the second tap.
    start = first.clamp(max=given - 2)
    second = torch.where(first > start, 1, weight).to(dtype)
    return Taps(start, torch.stack(((1 - second) * inside, second * inside), dim=2))


def _columns(side: Tensor, offset: Tensor, given: int, frame: int, dtype: torch.dtype) -> Taps:
    """The transpose (B, given, frame) of _rows: the outputs that read a pixel are contiguous.

    Output j reads pixel p if its position lies in (p - 1, p + 1), which holds for at most 2 side / given + 1 outputs.
    """
    taps = min(frame, 2 * frame // given + 2)
    pixel = torch.arange(given, device=side.device)
    side, offset = side[:, None], offset[:, None]
    start = (side * (2 * pixel - 1) - given + 2 * given - 1).div(2 * given, rounding_mode="floor").clamp(min=0)
    start = (start + offset).clamp(max=frame - taps)
    index = start[:, :, None] + torch.arange(taps, device=side.device) - offset[:, :, None]
    first, weight = _source(index, side[:, :, None], given)
    inside = (index >= 0) & (index < side[:, :, None])
    return Taps(start, _weight(first, weight, inside, pixel[:, None], given).to(dtype))


def _source(index: Tensor, side: Tensor, given: int) -> tuple[Tensor, Tensor]:
    """The first source pixel of an output and the weight of the second: resize.bilinear_taps for many sizes."""
    position = ((2 * index + 1) * given - side).clamp(min=0)
    first = (position // (2 * side)).clamp(max=given - 1)
    return first, (position % (2 * side)).double() / (2 * side)


def _weight(first: Tensor, weight: Tensor, inside: Tensor, pixel: Tensor, given: int) -> Tensor:
    """The weights with which outputs read `pixel`, (B, n, K)."""
    second = (first + 1).clamp(max=given - 1)
    total = torch.where(first == pixel, 1 - weight, 0) + torch.where(second == pixel, weight, 0)
    return torch.where(inside, total, 0)
