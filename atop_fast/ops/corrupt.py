"""The random transform of AToP in one pass: resize, noise, clip, mask, and the purifier's input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_integer, check_number, message
from ..randomness import Tag, key_tensors
from ._blocks import check_blocks, expand_blocks
from ._checks import FLOATS, check_dtype, check_per_sample, check_same_device, check_shape
from ._images import memory_format
from ._registry import LIBRARY, NAMESPACE, define, forbid_double_backward
from .mask_blocks import OP as MASK_BLOCKS
from .mask_blocks import MaskRatio, masked_blocks
from .random_normal import check_key
from .random_normal import reference as normals
from .resize import OP_BWD as RESIZE_BWD
from .resize import bilinear, check_size


def reference(
    x: Tensor,
    blocks: Tensor,
    sigma: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    draw: Tensor,
    patch: int,
    copies: int,
    size: Sequence[int],
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The specification of the op: the purifier's input and, if `save`, the bit mask of the gradient.

    With t = 2 clip(v, 0, 1) - 1 for the noisy image v, the outputs are [t or 0, 1, mask], rounded once to `dtype`.
    """
    v = _noisy(x, sigma, seed, sample_ids, draw, size)
    masks = _masks(blocks, patch, copies, size)
    image = torch.where(masks[:, :, None], v.new_zeros(()), (v.clamp(0, 1) * 2 - 1)[:, None])
    mask = masks[:, :, None].to(v.dtype)
    y = torch.cat((image, torch.ones_like(mask), mask), dim=2).flatten(0, 1).to(dtype)
    live = _pack(_live(v, masks)) if save else blocks.new_empty((x.shape[0], x.shape[1], 0))
    return y.contiguous(memory_format=memory_format(x)), live


def reference_live(
    x: Tensor,
    blocks: Tensor,
    sigma: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    draw: Tensor,
    patch: int,
    copies: int,
    size: Sequence[int],
) -> Tensor:
    """The second output of the op alone: one bit per element, 1 where the gradient passes the clip and the mask.

    uint8 (B, C, ceil(H W / 8)): bit i of byte j belongs to pixel 8 j + i of the plane. A bit is 0 where the value was
    clipped or is NaN, and, if there is one copy only, where it was masked.
    """
    return _pack(_live(_noisy(x, sigma, seed, sample_ids, draw, size), _masks(blocks, patch, copies, size)))


def reference_bwd(dy: Tensor, live: Tensor, blocks: Tensor, patch: int, copies: int, dtype: torch.dtype) -> Tensor:
    """dx = 2 * the sum of dy over the copies, except where masked or clipped; (B, C, H, W) in `dtype`."""
    channels, (height, width) = dy.shape[1] - 2, dy.shape[2:]
    wide = dy if dy.dtype == torch.float64 else dy.float()
    stacked = wide[:, :channels].unflatten(0, (blocks.shape[0], copies)) if copies > 1 else wide[:, None, :channels]
    masks = _masks(blocks, patch, copies, (height, width))[:, :, None]
    total = torch.where(masks[:, 0], 0, stacked[:, 0])
    for n in range(1, copies):
        total = total + torch.where(masks[:, n], 0, stacked[:, n])
    inside = _unpack(live, height, width)
    return torch.where(inside, total * 2, 0).to(dtype).contiguous(memory_format=memory_format(dy))


def check_x(function: str, x: Tensor) -> None:
    """Raise unless `x` is images of a dtype that the op accepts."""
    check_dtype(function, "x", x, torch.uint8, *FLOATS)
    if x.dim() != 4:
        raise ValueError(message(function, "x", "images of shape (B, C, H, W)", tuple(x.shape)))
    if min(x.shape[2:]) < 1:
        raise ValueError(message(function, "x", "images of at least one pixel", tuple(x.shape)))


def check_arguments(
    function: str,
    x: Tensor,
    blocks: Tensor,
    sigma: Tensor,
    seed: Tensor,
    sample_ids: Tensor,
    draw: Tensor,
    patch: int,
    copies: int,
    size: Sequence[int],
    dtype: torch.dtype | None = None,
    save: bool = True,
) -> None:
    """Raise unless the arguments of the op, or of `corrupt_live`, which has no `dtype`, are as described."""
    check_x(function, x)
    check_key(function, seed, sample_ids, draw)
    check_shape(function, "sample_ids", sample_ids, x.shape[:1])
    check_per_sample(function, "sigma", sigma, x)
    for argument, value in (("sigma", sigma), ("sample_ids", sample_ids)):
        check_same_device(function, argument, value, "x", x)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(message(function, "size", "two integers >= 1", tuple(size)))
    check_blocks(function, "x", x, blocks, patch, (size[0], size[1]))
    _check_counts(function, x.shape[0], blocks, copies)
    if dtype is not None:
        _check_dtype(function, x, dtype)


def check_bwd(
    function: str, dy: Tensor, live: Tensor, blocks: Tensor, patch: int, copies: int, dtype: torch.dtype
) -> None:
    """Raise unless the arguments of the backward op match each other."""
    check_dtype(function, "dy", dy, *FLOATS)
    if dtype not in FLOATS or (dtype == torch.float64) != (dy.dtype == torch.float64):
        raise TypeError(message(function, "dtype", f"a floating-point type that goes with {dy.dtype}", dtype))
    if dy.dim() != 4 or dy.shape[1] < 2:
        raise ValueError(message(function, "dy", "of shape (B * copies, C + 2, H, W)", tuple(dy.shape)))
    check_blocks(function, "dy", dy, blocks, patch)
    _check_counts(function, dy.shape[0] // copies, blocks, copies)
    if dy.shape[0] != blocks.shape[0] * copies:
        raise ValueError(message(function, "dy", f"{blocks.shape[0] * copies} images", dy.shape[0]))
    check_dtype(function, "live", live, torch.uint8)
    check_shape(function, "live", live, (blocks.shape[0], dy.shape[1] - 2, -(-dy.shape[2] * dy.shape[3] // 8)))
    check_same_device(function, "live", live, "dy", dy)


def _check_counts(function: str, batch: int, blocks: Tensor, copies: int) -> None:
    if not 1 <= copies <= 255:
        raise ValueError(message(function, "copies", "an integer and in [1, 255]", copies))
    if blocks.shape[0] != batch:
        raise ValueError(message(function, "blocks", f"of {batch} samples", blocks.shape[0]))


def _check_dtype(function: str, x: Tensor, dtype: torch.dtype) -> None:
    if dtype not in FLOATS or (dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(message(function, "dtype", f"a floating-point type that goes with {x.dtype} images", dtype))


_KEY = "Tensor sigma, Tensor seed, Tensor sample_ids, Tensor draw"
_SIZES = "int patch, int copies, int[] size"
OP = define(
    f"corrupt(Tensor x, Tensor blocks, {_KEY}, {_SIZES}, ScalarType dtype, bool save) -> (Tensor, Tensor)",
    reference,
    check=check_arguments,
    kernels="corrupt",
)
OP_LIVE = define(
    f"corrupt_live(Tensor x, Tensor blocks, {_KEY}, {_SIZES}) -> Tensor",
    reference_live,
    check=check_arguments,
    kernels="corrupt",
)
OP_BWD = define(
    "corrupt_bwd(Tensor dy, Tensor live, Tensor blocks, int patch, int copies, ScalarType dtype) -> Tensor",
    reference_bwd,
    check=check_bwd,
    kernels="corrupt",
)


def _keep(ctx: Any, inputs: tuple[Any, ...], live: Tensor) -> None:
    """Save either one bit per element, or the inputs from which the bits can be recomputed."""
    x, blocks, *key, ctx.patch, ctx.copies, ctx.size, _, ctx.saved = inputs
    ctx.dtype, ctx.shape = x.dtype, x.shape
    ctx.save_for_backward(blocks, *((live,) if ctx.saved else (x, *key)))


def _gradient(ctx: Any, dy: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
    blocks, *kept = saved
    live = kept[0] if ctx.saved else OP_LIVE(kept[0], blocks, *kept[1:], ctx.patch, ctx.copies, ctx.size)
    if tuple(ctx.size) == tuple(ctx.shape[2:]):
        return OP_BWD(dy, live, blocks, ctx.patch, ctx.copies, ctx.dtype)
    dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
    resized = OP_BWD(dy, live, blocks, ctx.patch, ctx.copies, dtype)
    return RESIZE_BWD(resized, ctx.shape[2:], False).to(ctx.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _keep(ctx, inputs, output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return _gradient(ctx, dy, ctx.saved_tensors), *(None,) * 10


torch.library.register_autograd(f"{NAMESPACE}::corrupt", _backward, setup_context=_setup_context, lib=LIBRARY)
forbid_double_backward("corrupt_bwd")


class _Corrupt(torch.autograd.Function):
    """Same as register_autograd, without its Python overhead, which exceeds the time of the op on small images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, live = OP(x, *arguments)
        _keep(ctx, (x, *arguments), live)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        # Read them while autograd is still active, because activation checkpointing recomputes them with gradients.
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradient(ctx, dy, saved), None
        with torch._C._AutoDispatchBelowAutograd():
            return _gradient(ctx, dy, saved), None


def corrupt(
    x: Tensor,
    *,
    patch: int,
    mask_ratio: MaskRatio = 0.25,
    sigma: float | Tensor = 0.25,
    copies: int = 1,
    size: tuple[int, int] | None = None,
    shared_mask: bool = False,
    dtype: torch.dtype | None = None,
    recompute: bool = False,
    seed: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    draw: int | Tensor = 0,
) -> Tensor:
    r"""Destroy a perturbation: resize, add noise, clip, mask blocks, and build the purifier's input, in one pass.

    .. math:: y = [(2\,\mathrm{clip}(\mathrm{resize}(x) + \sigma n, 0, 1) - 1)(1 - m),\ 1,\ m]

    Args:
        x: Images (B, C, h, w): floats in [0, 1], or uint8 in 0..255, which are divided by 255.
        patch: The side of the square blocks in pixels; divides the height and the width (after resizing).
        mask_ratio: The share of masked blocks, in [0, 1]: a number, or float32 of shape () or (B,); exactly
            round(mask_ratio * blocks) blocks are masked. With two numbers (low, high), every sample and draw gets its
            own count, uniformly distributed from round(low * blocks) to round(high * blocks).
        sigma: The standard deviation of the noise in units of [0, 1]: a number, or float32 of shape () or (B,).
        copies: N disjoint masks for every image, among which the masked blocks are distributed evenly; 1 to 255.
        size: Resize to (H, W) first, bilinearly like torch's interpolate with align_corners=False.
        shared_mask: Use the same mask for all samples of a draw.
        dtype: The dtype of the output: float64 for float64 images, otherwise float32, bfloat16 or float16; default is
            that of `x`, and float32 for uint8.
        recompute: Save `x` for the backward pass, which then recomputes the noise, instead of one bit per element.
        seed: 64-bit key of the randomness, an int or an int64 scalar tensor.
        sample_ids: int64 (B,), the identity of every image; default 0..B-1.
        draw: Index of the draw: an int in [0, 2**32), or int64 of shape () or (B,).

    Returns:
        (B * copies, C + 2, H, W), with the copies of a sample adjacent: [masked image in [-1, 1], ones, mask (1 =
        masked)]; channels_last if `x` is.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape or number is not as described.

    Notes:
        The result is a function of `x` and (seed, sample id, draw) alone: the same bits in every backend, for any
        batch, order or split. Noise and masks number the pixels in (C, H, W) order in any memory layout. Masked pixels
        are 0 even where `x` is NaN. Differentiable once in floating-point `x`; computed in float32 (float64 for
        float64) and rounded once. The backward pass needs one saved bit per element, and not `x`.

    Reference:
        Lin et al., Adversarial Training on Purification, ICLR 2024, section 3.1.

    Example:
        >>> atop_fast.ops.corrupt(torch.rand(8, 3, 32, 32), patch=8, seed=0).shape
        torch.Size([8, 5, 32, 32])
    """
    options = (patch, mask_ratio, sigma, copies, size, shared_mask, dtype, recompute)
    return run("corrupt", x, options, (seed, sample_ids, draw))


def run(
    function: str,
    x: Tensor,
    options: tuple[int, MaskRatio, float | Tensor, int, Any, bool, torch.dtype | None, bool],
    key: tuple[int | Tensor, Tensor | None, int | Tensor],
) -> Tensor:
    """`corrupt` under the name `function`, with its options and the key in the order of its arguments."""
    patch, mask_ratio, sigma, copies, wanted, shared_mask, dtype, recompute = options
    check_x(function, x)
    size = _size(function, wanted, x)
    if not torch.compiler.is_compiling():
        check_integer(function, "patch", patch, low=1)
        check_integer(function, "copies", copies, low=1, high=255)
    if size[0] % patch or size[1] % patch:
        expected = f"of a height and width divisible by patch={patch}"
        raise ValueError(message(function, "size" if wanted else "x", expected, f"{size[0]} x {size[1]}"))
    dtype = dtype or (torch.float32 if x.dtype == torch.uint8 else x.dtype)
    _check_dtype(function, x, dtype)
    seed, sample_ids, draw = key_tensors(function, x.shape[0], x.device, *key)
    count = (size[0] // patch) * (size[1] // patch)
    mask_key = (seed, torch.zeros_like(sample_ids) if shared_mask else sample_ids, draw)
    blocks = MASK_BLOCKS(*mask_key, masked_blocks(function, mask_ratio, count, x, mask_key), count, copies)
    recorded = x.requires_grad and torch.is_grad_enabled()
    arguments = (blocks, _sigma(function, sigma, x), seed, sample_ids, draw, patch, copies, size, dtype)
    if torch.compiler.is_compiling():
        return OP(x, *arguments, recorded and not recompute)[0]
    if recorded:
        return _Corrupt.apply(x, (*arguments, not recompute))
    with torch._C._AutoDispatchBelowAutograd():
        return OP(x, *arguments, False)[0]


def _size(function: str, size: Any, x: Tensor) -> tuple[int, int]:
    """The height and width after resizing."""
    if size is None:
        return x.shape[2], x.shape[3]
    return check_size(function, size)


def _sigma(function: str, sigma: float | Tensor, x: Tensor) -> Tensor:
    if isinstance(sigma, Tensor):
        return check_per_sample(function, "sigma", sigma, x).to(x.device)
    if not torch.compiler.is_compiling():
        check_number(function, "sigma", sigma, low=0)
    return torch.full((), sigma, dtype=torch.float32, device=x.device)


def _noisy(x: Tensor, sigma: Tensor, seed: Tensor, sample_ids: Tensor, draw: Tensor, size: Sequence[int]) -> Tensor:
    """The resized image plus noise, before the clip; float64 for float64, float32 otherwise."""
    v = x.double() if x.dtype == torch.float64 else x.float()
    if x.dtype == torch.uint8:
        # On some devices, torch divides by a Python number less accurately than by a tensor.
        v = v / v.new_full((), 255)
    if tuple(size) != tuple(x.shape[2:]):
        v = bilinear(v, size)
    shape = v.shape[1:]
    noise = normals(seed, sample_ids, draw, Tag.NOISE, math.prod(shape)).view(x.shape[0], *shape)
    return v + sigma.to(v.dtype).reshape(-1, 1, 1, 1) * noise.to(v.dtype)


def _masks(blocks: Tensor, patch: int, copies: int, size: Sequence[int]) -> Tensor:
    """Whether each copy masks each pixel, bool (B, copies, H, W)."""
    owners = expand_blocks(blocks, patch, size[0], size[1])
    return owners[:, None] == torch.arange(copies, device=blocks.device)[:, None, None]


def _live(v: Tensor, masks: Tensor) -> Tensor:
    inside = (v >= 0) & (v <= 1)
    return inside & ~masks if masks.shape[1] == 1 else inside


def _pack(bits: Tensor) -> Tensor:
    """bool (B, C, H, W) as uint8 (B, C, ceil(H W / 8)), the first pixel in the lowest bit."""
    flat = torch.nn.functional.pad(bits.flatten(2), (0, -(bits.shape[2] * bits.shape[3]) % 8))
    weights = 2 ** torch.arange(8, device=bits.device)
    return (flat.view(*flat.shape[:2], flat.shape[2] // 8, 8) * weights).sum(dim=3).to(torch.uint8)


def _unpack(live: Tensor, height: int, width: int) -> Tensor:
    bits = (live[..., None] >> torch.arange(8, device=live.device)) & 1
    return bits.flatten(2)[..., : height * width].unflatten(2, (height, width)).bool()
