"""A random subset of the blocks of every image, of exact size, distributed among the copies that mask them."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.checks import check_integer, check_tensor, message
from ..randomness import Tag, key_tensors, random_ranks
from ._registry import define
from .random_normal import check_key


def reference(seed: Tensor, sample_ids: Tensor, draw: Tensor, masked: Tensor, blocks: int, copies: int) -> Tensor:
    """The specification: rank the blocks by random words; the first `masked` go to the copies in turn."""
    check_arguments("mask_blocks", seed, sample_ids, draw, masked, blocks, copies)
    ranks = random_ranks(blocks, seed, sample_ids, draw, Tag.MASK)
    owners = torch.where(ranks < masked.reshape(-1, 1), ranks % copies, copies)
    return owners.to(torch.uint8)


OP = define(
    "mask_blocks(Tensor seed, Tensor sample_ids, Tensor draw, Tensor masked, int blocks, int copies) -> Tensor",
    reference,
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


def check_arguments(
    function: str, seed: Tensor, sample_ids: Tensor, draw: Tensor, masked: Tensor, blocks: int, copies: int
) -> None:
    """Raise unless the arguments of the op are as described."""
    check_key(function, seed, sample_ids, draw)
    if masked.dtype != torch.int64:
        raise TypeError(message(function, "masked", "an int64 tensor", masked.dtype))
    if masked.shape not in ((), sample_ids.shape):
        expected = f"of shape () or {tuple(sample_ids.shape)}"
        raise ValueError(message(function, "masked", expected, tuple(masked.shape)))
    if masked.device != sample_ids.device:
        raise ValueError(message(function, "masked", f"on the device of sample_ids {sample_ids.device}", masked.device))
    if not torch.compiler.is_compiling():
        check_integer(function, "blocks", blocks, low=0)
        check_integer(function, "copies", copies, low=1, high=255)
