"""Random words that belong to samples: what atop_fast.randomness.random_bits runs on a GPU, in one kernel."""

from __future__ import annotations

from torch import Tensor

from ..randomness import philox_words
from ._registry import define
from .random_normal import check_arguments


def reference(seed: Tensor, sample_ids: Tensor, draw: Tensor, tag: int, count: int) -> Tensor:
    """The specification, int64 (B, count)."""
    return philox_words(count, seed, sample_ids, draw, tag).contiguous()


OP = define(
    "random_bits(Tensor seed, Tensor sample_ids, Tensor draw, int tag, int count) -> Tensor",
    reference,
    check=check_arguments,
    kernels="random_bits",
)
