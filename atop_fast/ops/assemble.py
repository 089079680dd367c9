"""Assembles one image from N purified copies: every block from the copy in which it was masked (RT3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_integer, check_tensor, message
from ._blocks import check_blocks, check_matrix, expand_blocks
from ._checks import FLOATS, check_dtype
from ._images import memory_format
from ._registry import LIBRARY, NAMESPACE, define, forbid_double_backward


def formula(copies: Tensor, blocks: Tensor, patch: int) -> Tensor:
    """The op as a user would write it, with masks; the baseline of the benchmarks."""
    owners = expand_blocks(blocks, patch, copies.shape[2], copies.shape[3])
    stacked = copies.unflatten(0, (blocks.shape[0], -1))
    masks = owners[:, None] == torch.arange(stacked.shape[1], device=owners.device)[:, None, None]
    return (stacked * masks[:, :, None]).sum(dim=1)


def reference(copies: Tensor, blocks: Tensor, patch: int) -> Tensor:
    """The specification; blocks that no copy masked are 0."""
    owners = expand_blocks(blocks, patch, copies.shape[2], copies.shape[3])[:, None]
    stacked = copies.unflatten(0, (blocks.shape[0], -1)) if blocks.shape[0] else copies[:, None]
    y = torch.zeros_like(stacked[:, 0])
    for n in range(stacked.shape[1]):
        y = torch.where(owners == n, stacked[:, n], y)
    return y.contiguous(memory_format=memory_format(copies))


def reference_bwd(dy: Tensor, blocks: Tensor, patch: int, copies: int) -> Tensor:
    """dy in the blocks that the copy masked, 0 elsewhere; (B * copies, C, H, W)."""
    owners = expand_blocks(blocks, patch, dy.shape[2], dy.shape[3])
    masks = owners[:, None] == torch.arange(copies, device=dy.device)[:, None, None]
    dcopies = torch.where(masks[:, :, None], dy[:, None], dy.new_zeros(())).flatten(0, 1)
    return dcopies.contiguous(memory_format=memory_format(dy))


def check_arguments(function: str, copies: Tensor, blocks: Tensor, patch: int) -> None:
    """Raise unless the arguments are as described."""
    check_dtype(function, "copies", copies, *FLOATS)
    samples = check_matrix(function, blocks).shape[0]
    number = copies.shape[0] // max(1, samples) if copies.dim() == 4 else 0
    if copies.dim() != 4 or number * samples != copies.shape[0] or number < min(1, samples):
        expected = f"of shape (B * N, C, H, W) for B = {samples}"
        raise ValueError(message(function, "copies", expected, tuple(copies.shape)))
    check_blocks(function, "copies", copies, blocks, patch)


def check_bwd(function: str, dy: Tensor, blocks: Tensor, patch: int, copies: int) -> None:
    """Raise unless `dy` matches `blocks`."""
    if not 1 <= copies <= 255:
        raise ValueError(message(function, "copies", "an integer and in [1, 255]", copies))
    check_dtype(function, "dy", dy, *FLOATS)
    samples = check_matrix(function, blocks).shape[0]
    if dy.dim() != 4 or dy.shape[0] != samples:
        raise ValueError(message(function, "dy", f"of shape (B, C, H, W) for B = {samples}", tuple(dy.shape)))
    check_blocks(function, "dy", dy, blocks, patch)


OP = define(
    "assemble(Tensor copies, Tensor blocks, int patch) -> Tensor", reference, check=check_arguments, kernels="assemble"
)
OP_BWD = define(
    "assemble_bwd(Tensor dy, Tensor blocks, int patch, int copies) -> Tensor",
    reference_bwd,
    check=check_bwd,
    kernels="assemble",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    copies, blocks, ctx.patch = inputs
    ctx.copies = copies.shape[0] // max(1, blocks.shape[0])
    ctx.save_for_backward(blocks)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return OP_BWD(dy, *ctx.saved_tensors, ctx.patch, ctx.copies), None, None


torch.library.register_autograd(f"{NAMESPACE}::assemble", _backward, setup_context=_setup_context, lib=LIBRARY)
forbid_double_backward("assemble_bwd")


def assemble(copies: Tensor, blocks: Tensor, patch: int) -> Tensor:
    """Assemble one image per sample, taking every block from the copy that masked it.

    Args:
        copies: Purified copies (B * N, C, H, W), with the N copies of a sample adjacent; float32, float64, bfloat16 or
            float16.
        blocks: uint8 (B, H / patch * W / patch), the copy that masked each block, as from :func:`mask_blocks`.
        patch: The side of a block in pixels; divides H and W.

    Returns:
        (B, C, H, W) in the dtype of `copies`, 0 in blocks that no copy masked; channels_last if `copies` is.

    Raises:
        TypeError: If a tensor has the wrong dtype.
        ValueError: If a shape is not as described.

    Notes:
        Differentiable once in `copies`. Reads each output pixel from one copy only. Exact in every backend.

    Reference:
        Lin et al., Adversarial Training on Purification, ICLR 2024, section 3.1 (RT3).

    Example:
        >>> blocks = atop_fast.ops.mask_blocks(16, 16, 0, torch.arange(2), copies=4)
        >>> atop_fast.ops.assemble(torch.rand(8, 3, 32, 32), blocks, patch=8).shape
        torch.Size([2, 3, 32, 32])
    """
    check_tensor("assemble", "copies", copies)
    check_tensor("assemble", "blocks", blocks)
    if not torch.compiler.is_compiling():
        check_integer("assemble", "patch", patch, low=1)
    check_arguments("assemble", copies, blocks, patch)
    return OP(copies, blocks, patch)
