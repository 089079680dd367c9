"""Square blocks of pixels, shared by corrupt and assemble."""

from __future__ import annotations

import torch
from torch import Tensor

from .._core.checks import message
from ._checks import check_dtype, check_same_device


def expand_blocks(blocks: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The owner of every pixel, (B, H, W), from the owners of the blocks (B, H / patch * W / patch)."""
    grid = blocks.view(blocks.shape[0], height // patch, width // patch)
    return grid.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)


def check_matrix(function: str, blocks: Tensor) -> Tensor:
    """Raise unless `blocks` has one row per sample."""
    if blocks.dim() != 2:
        raise ValueError(message(function, "blocks", "of shape (B, blocks)", tuple(blocks.shape)))
    return blocks


def check_blocks(
    function: str, argument: str, images: Tensor, blocks: Tensor, patch: int, size: tuple[int, int] | None = None
) -> None:
    """Raise unless `blocks` matches `images` of height and width `size`, by default those of the images."""
    height, width = size or (images.shape[2], images.shape[3])
    check_dtype(function, "blocks", blocks, torch.uint8)
    if patch < 1 or height % patch or width % patch:
        expected = f"of a height and width divisible by patch={patch}"
        raise ValueError(message(function, argument, expected, f"{height} x {width}"))
    count = (height // patch) * (width // patch)
    if blocks.dim() != 2 or blocks.shape[1] != count:
        raise ValueError(message(function, "blocks", f"of shape (B, {count})", tuple(blocks.shape)))
    check_same_device(function, "blocks", blocks, argument, images)
