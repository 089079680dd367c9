"""A random subset of the blocks of every image, of exact size, distributed among the copies that mask them."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._core.checks import check_integer, check_number, check_tensor, message
from ..randomness import Tag, key_tensors, random_bits, random_ranks
from ._checks import check_dtype, check_per_sample, check_same_device, check_shape
from ._registry import define
from .random_normal import check_key


def reference(seed: Tensor, sample_ids: Tensor, draw: Tensor, masked: Tensor, blocks: int, copies: int) -> Tensor:
    """The specification: rank the blocks by random words; the first `masked` go to the copies in turn."""
    ranks = random_ranks(blocks, seed, sample_ids, draw, Tag.MASK)
    owners = torch.where(ranks < masked.reshape(-1, 1), ranks % copies, copies)
    return owners.to(torch.uint8)


def check_arguments(
    function: str, seed: Tensor, sample_ids: Tensor, draw: Tensor, masked: Tensor, blocks: int, copies: int
) -> None:
    """Raise unless the arguments of the op are as described."""
    check_key(function, seed, sample_ids, draw)
    check_dtype(function, "masked", masked, torch.int64)
    check_shape(function, "masked", masked, (), sample_ids.shape)
    check_same_device(function, "masked", masked, "sample_ids", sample_ids)
    if not torch.compiler.is_compiling():
        check_integer(function, "blocks", blocks, low=0)
        check_integer(function, "copies", copies, low=1, high=255)


# One share of masked blocks, the lowest and the highest share, or one share per sample.
MaskRatio: TypeAlias = float | tuple[float, float] | Tensor
OP = define(
    "mask_blocks(Tensor seed, Tensor sample_ids, Tensor draw, Tensor masked, int blocks, int copies) -> Tensor",
    reference,
    check=check_arguments,
    kernels="mask_blocks",
)


def mask_blocks(
    blocks: int,
    masked: int | Tensor,
    seed: int | Tensor,
    sample_ids: Tensor,
    draw: int | Tensor = 0,
    copies: int = 1,
) -> Tensor:
    """Choose a uniformly random subset of exactly `masked` blocks of every image, and the copy that masks each of them.

    Args:
        blocks: The number of blocks of an image.
        masked: The number of masked blocks: an int, or int64 of shape () or (B,); clipped to [0, blocks].
        seed: 64-bit key of the randomness, an int or an int64 scalar tensor.
        sample_ids: int64 (B,), the identity of every sample.
        draw: Index of the draw: an int in [0, 2**32), or int64 of shape () or (B,).
        copies: The number of copies that share the masked blocks; each gets floor or ceil of masked / copies; 1 to 255.

    Returns:
        uint8 (B, blocks) on the device of `sample_ids`: the copy 0..copies-1 that masks a block, or `copies` if none
        does.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape, dtype or number is not as described.

    Notes:
        Every backend returns the same numbers, in any batch, order or split. Each block draws a word, and the blocks
        are ranked by their words; ties (probability below blocks**2 / 2**33) are broken by position.

    Example:
        >>> atop_fast.ops.mask_blocks(16, 4, seed=0, sample_ids=torch.arange(8)).eq(0).sum(dim=1)
        tensor([4, 4, 4, 4, 4, 4, 4, 4])
    """
    function = "mask_blocks"
    device, batch = check_tensor(function, "sample_ids", sample_ids).device, sample_ids.shape[:1].numel()
    key = key_tensors(function, batch, device, seed, sample_ids, draw)
    if not isinstance(masked, Tensor):
        masked = torch.full((), check_integer(function, "masked", masked), dtype=torch.int64, device=device)
    masked = masked.to(device)
    check_arguments(function, *key, masked, blocks, copies)
    return OP(*key, masked, blocks, copies)


def check_mask_ratio(function: str, value: Any) -> float | tuple[float, float]:
    """Raise unless `value` is a share in [0, 1], or two, the lower one first."""
    if not isinstance(value, tuple | list):
        return check_number(function, "mask_ratio", value, low=0, high=1)
    shares = [check_number(function, "mask_ratio", share, low=0, high=1) for share in value]
    if len(shares) != 2 or shares[0] > shares[1]:
        raise ValueError(message(function, "mask_ratio", "a number, or two with the lower one first", value))
    return shares[0], shares[1]


def masked_blocks(
    function: str, mask_ratio: MaskRatio, count: int, x: Tensor, key: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """The number of masked blocks out of `count`, int64 of shape () or (B,)."""
    if isinstance(mask_ratio, Tensor):
        return (check_per_sample(function, "mask_ratio", mask_ratio, x).to(x.device) * count).round().long()
    if not torch.compiler.is_compiling():
        mask_ratio = check_mask_ratio(function, mask_ratio)
    if isinstance(mask_ratio, float | int):
        return torch.full((), round(mask_ratio * count), dtype=torch.int64, device=x.device)
    low, high = (round(share * count) for share in mask_ratio)
    return low + (random_bits(1, *key, Tag.RATIO)[:, 0] * (high - low + 1) >> 32)
