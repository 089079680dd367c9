"""Sample-keyed standard normal numbers: Box-Muller on the words of Philox."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._core.checks import check_integer, check_tensor
from ..randomness import Tag, key_tensors, philox_words
from ._checks import check_dtype, check_same_device, check_shape
from ._registry import define


def reference(seed: Tensor, sample_ids: Tensor, draw: Tensor, tag: int, count: int) -> Tensor:
    """The specification, with only integer and correctly rounded float32 operations, so that all backends agree."""
    words = philox_words(count + count % 2, seed, sample_ids, draw, tag)
    # torch's float32 square root is not correctly rounded on every CPU; computed in float64 it is.
    radius = _minus_2_log(words[:, 0::2]).double().sqrt_().float()
    cosine, sine = _cos_sin(words[:, 1::2])
    return torch.stack((radius * cosine, radius * sine), dim=-1).flatten(1)[:, :count].contiguous()


def check_arguments(function: str, seed: Tensor, sample_ids: Tensor, draw: Tensor, tag: int, count: int) -> None:
    """Raise unless the arguments of the op are as described."""
    check_key(function, seed, sample_ids, draw)
    if not torch.compiler.is_compiling():
        check_integer(function, "tag", tag, low=0, high=0xFFFF)
        check_integer(function, "count", count, low=0)


def check_key(function: str, seed: Tensor, sample_ids: Tensor, draw: Tensor) -> None:
    """Raise unless the key is int64 of shapes (), (B,) and () or (B,), on one device."""
    batch = sample_ids.shape[0] if sample_ids.dim() else 1
    shapes = {"seed": ((),), "sample_ids": ((batch,),), "draw": ((), (batch,))}
    for argument, value in (("seed", seed), ("sample_ids", sample_ids), ("draw", draw)):
        check_dtype(function, argument, value, torch.int64)
        check_shape(function, argument, value, *shapes[argument])
        check_same_device(function, argument, value, "sample_ids", sample_ids)


OP = define(
    "random_normal(Tensor seed, Tensor sample_ids, Tensor draw, int tag, int count) -> Tensor",
    reference,
    check=check_arguments,
    kernels="random_normal",
)


def random_normal(
    shape: Sequence[int], seed: int | Tensor, sample_ids: Tensor, draw: int | Tensor = 0, tag: Tag = Tag.NOISE
) -> Tensor:
    """Standard normal numbers, a function of (seed, sample id, draw, tag, position in the sample) alone.

    Args:
        shape: The shape of one sample.
        seed: 64-bit key of the randomness, an int or an int64 scalar tensor.
        sample_ids: int64 (B,), the identity of every sample.
        draw: Index of the draw: an int in [0, 2**32), or int64 of shape () or (B,).
        tag: The purpose of the numbers; different purposes never share numbers.

    Returns:
        float32 (B, *shape) on the device of `sample_ids`; |n| <= 6.67.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape, dtype or number is not as described.

    Notes:
        Every backend returns the same bits, in any batch, order or split. Not differentiable.

    Reference:
        Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011; Box and Muller, 1958.

    Example:
        >>> noise = atop_fast.ops.random_normal((3, 32, 32), seed=0, sample_ids=torch.arange(8))
    """
    function = "random_normal"
    for size in shape:
        check_integer(function, "shape", size, low=0)
    batch = check_tensor(function, "sample_ids", sample_ids).shape[:1].numel()
    check_integer(function, "tag", tag, low=0, high=0xFFFF)
    key = key_tensors(function, batch, sample_ids.device, seed, sample_ids, draw)
    return OP(*key, int(tag), math.prod(shape)).view(batch, *shape)


def _minus_2_log(word: Tensor) -> Tensor:
    """-2 log(u) for u = (word // 2 + 1/2) / 2**31: a polynomial in m, the mantissa in [sqrt(1/2), sqrt(2)) minus 1."""
    u = (word >> 1).float() + 0.5
    bits = u.view(torch.int32) - 0x3F3504F3
    exponent = (bits >> 23).float() - 31
    m = ((bits & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1
    p = m * 0.20413947105407715 + -0.32170456647872925
    for c in (0.3430643081665039, -0.398344486951828, 0.49963685870170593, -0.6666892766952515):
        p = p * m + c
    square = m * m
    return p * m * square + square + m * -2 + exponent * -1.3862943649291992


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle 2 pi word / 2**32: polynomials in the angle to the nearest axis."""
    x = (word << 2).int().float() * 3.65729529994141e-10
    z = x * x
    s = ((z * -0.00019495634478516877 + 0.00833197869360447) * z + -0.16666650772094727) * (z * x) + x
    c = (z * -0.0013652448542416096 + 0.041661277413368225) * (z * z) + (1 - z * 0.5)
    quadrant = ((word + 2**29) >> 30) & 3
    odd = (quadrant & 1).bool()
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    cosine = torch.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    return cosine, torch.where(quadrant >= 2, -sine, sine)
