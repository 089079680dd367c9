"""Random inputs of the library: tensors of any shape, dtype, layout and values, and numbers of any size.

A tensor is drawn as a `T`, which says how to make it: what Hypothesis prints of a failure can be pasted as an @example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.uint8, torch.int64, torch.bool, torch.int32, torch.complex64, torch.float8_e5m2)
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted", "offset", "expanded")
# Values in [0, 1], ordinary values, and values that are hard for arithmetic.
VALUES = ("unit", "normal", "corners", "mixed", "tiny", "huge", "equal", "zero")
# Sizes at and around those of vectors and blocks, and 0.
SIZES = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33)
NUMBERS = (0.0, -0.0, 1.0, 0.5, 8 / 255, -1.0, 1e-40, 1e-300, 5e-324, 1e30, 1e300, math.inf, -math.inf, math.nan)
# None that memory would just hold.
INTEGERS = (0, 1, 2, 3, 4, 8, 255, 256, 65536, -1, 2**62, 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class T:
    """A tensor: its values by name, or integers in [low, high] if these are given."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    values: str = "normal"
    layout: str = "contiguous"
    seed: int = 0
    low: int | None = None
    high: int | None = None

    def make(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.low is not None:
            values = torch.randint(self.low, self.high + 1, self.shape, generator=generator)
        else:
            values = _values(self.values, self.shape, self.dtype, generator)
        return _laid(values.to(self.dtype), self.layout)


def _values(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    info = torch.finfo(dtype if dtype in FLOATS else torch.float32)
    normal = torch.randn(shape, dtype=torch.float64, generator=generator)
    if name == "unit":
        return torch.rand(shape, dtype=torch.float64, generator=generator)
    if name in ("equal", "zero"):
        return torch.full(shape, 0.25 if name == "equal" else 0.0, dtype=torch.float64)
    if name == "tiny":
        return normal * info.smallest_normal
    if name == "huge":
        return (normal * info.max / 2).clamp(-info.max, info.max)
    if name in ("corners", "mixed"):
        odd = [0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf, info.max, -info.max, info.smallest_normal]
        corners = torch.tensor([*odd, info.smallest_normal / 2, 1 + info.eps, 88.0, -104.0], dtype=torch.float64)
        odd_ones = corners[torch.randint(len(corners), shape, generator=generator)]
        chosen = torch.rand(shape, generator=generator) < (1 if name == "corners" else 0.05)
        return torch.where(chosen, odd_ones, normal)
    return normal


def _laid(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "sliced" and t.dim():
        wide = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1] + 1))
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if layout == "permuted" and t.dim() > 1:
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "offset":
        longer = t.new_zeros(t.numel() + 3)
        longer[3:] = t.flatten()
        return longer[3:].view(t.shape)
    if layout == "expanded" and t.dim() and t.shape[0]:
        return t[:1].expand(t.shape)
    return t.contiguous()


def made(arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments with their tensors made."""
    return [a.make() if isinstance(a, T) else a for a in arguments]


sizes = st.sampled_from(SIZES)
some = st.sampled_from(SIZES[1:])
seeds = st.integers(0, 2**31)
layouts = st.sampled_from(LAYOUTS)
numbers = st.one_of(st.floats(0, 1), st.sampled_from(NUMBERS), st.floats())
positive = st.one_of(st.floats(0, 2), st.sampled_from([0.0, 8 / 255, 1e-40, 1e-300, 1e30]))


def tensors(shape: tuple[int, ...], dtype: torch.dtype, values: tuple[str, ...] = VALUES) -> st.SearchStrategy[T]:
    """Tensors of a shape and dtype."""
    return st.builds(T, st.just(shape), st.just(dtype), st.sampled_from(values), layouts, seeds)


def integers(shape: tuple[int, ...], low: int, high: int, dtype: torch.dtype = torch.int64) -> st.SearchStrategy[T]:
    """Tensors of integers in [low, high]."""
    return st.builds(
        T, st.just(shape), st.just(dtype), layout=layouts, seed=seeds, low=st.just(low), high=st.just(high)
    )


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The strategy, or None."""
    return st.none() | strategy


@st.composite
def damaged(draw: st.DrawFn, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with one of them changed: mostly to what the op must refuse."""
    i = draw(st.integers(0, len(arguments) - 1))
    old = arguments[i]
    if isinstance(old, T):
        shape = old.shape
        shapes = [shape[1:], (*shape, 1), (1, *shape), (), tuple(n + 1 for n in shape), (*shape[:-1], 0), shape[::-1]]
        new = draw(
            st.one_of(
                st.sampled_from(DTYPES).map(lambda dtype: replace(old, dtype=dtype)),
                st.sampled_from(shapes).map(lambda shape: replace(old, shape=shape)),
            )
        )
    elif isinstance(old, bool) or old is None:
        new = not old if isinstance(old, bool) else None
    elif isinstance(old, int):
        new = draw(st.sampled_from(INTEGERS))
    elif isinstance(old, float):
        new = draw(numbers)
    elif isinstance(old, torch.dtype):
        new = draw(st.sampled_from(DTYPES))
    else:
        new = draw(st.lists(st.sampled_from((0, 1, 5, -1, 2**62)), max_size=3))
    return (*arguments[:i], new, *arguments[i + 1 :])
