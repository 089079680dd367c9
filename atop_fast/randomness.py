"""Sample-keyed randomness: every random number is a pure function of (seed, sample id, draw, tag, position).

Philox4x32-10 (Salmon et al., SC 2011) with key = seed and counter

    c0 = element group (4 values each)      c2 = draw (attack step, EOT draw, Monte-Carlo index ...)
    c1 = low 32 bits of the sample id       c3 = tag << 16 | high 16 bits of the sample id

so that a sample gets the same numbers in any batch, order, split or process. Torch's global generator is neither read
nor changed. This file is the specification: it uses only integer and correctly rounded float32 operations, so that
other backends can match it bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ._core.checks import check_integer, check_tensor, message

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# Number of draws that must be equal before a model that is seen to draw counts as deterministic: a choice that 9 of 10
# draws make alike is missed by 64 draws with probability 0.001, and by 3 with 0.7.
REPEATED_DRAWS = 64
# All threads share the global generators.
_GENERATORS = threading.RLock()


Seed = TypeVar("Seed", int, Tensor)


class Tag(IntEnum):
    """The purpose of a random number: different purposes never share numbers."""

    NOISE = 1
    MASK = 2
    START = 3
    ORDER = 4
    SEED = 5
    RESIZE = 6
    RATIO = 7


def philox4x32(counter: Sequence[Any], seed: int | Tensor) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four words for every counter.

    Args:
        counter: four int64 tensors of broadcastable shape, or four ints, with values in [0, 2**32).
        seed: the 64-bit key, an int or an int64 scalar tensor; negative seeds are their two's complement.

    Returns:
        Four int64 tensors, or ints, with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps both 32-bit halves correct.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, ((p0 >> 32) & _MASK32) ^ c3 ^ k1
        c1, c3 = p1 & _MASK32, p0 & _MASK32
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def random_bits(count: int, seed: int | Tensor, sample_ids: Tensor, draw: int | Tensor, tag: int) -> Tensor:
    """`count` 32-bit words per sample, int64 (B, count), for sample_ids (B,) and draw, an int or int64 () or (B,)."""
    if not sample_ids.is_cuda:
        return philox_words(count, seed, sample_ids, draw, tag)
    # One kernel instead of a hundred. The ops import this module.
    from .ops.random_bits import OP

    device = sample_ids.device
    words: Tensor = OP(_on(device, seed), sample_ids, _on(device, draw), int(tag), count)
    return words


def philox_words(count: int, seed: int | Tensor, sample_ids: Tensor, draw: int | Tensor, tag: int) -> Tensor:
    """The specification of `random_bits`."""
    groups = torch.arange((count + 3) // 4, device=sample_ids.device)[None, :]
    ids = sample_ids.reshape(-1, 1)
    draw = draw.reshape(-1, 1) if isinstance(draw, Tensor) else torch.full_like(ids[:1], draw)
    counter = (groups, ids & _MASK32, draw & _MASK32, ((ids >> 32) & 0xFFFF) | (int(tag) << 16))
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, seed)), dim=-1)
    return words.flatten(1)[:, :count]


def random_uniform(
    shape: Sequence[int], seed: int | Tensor, sample_ids: Tensor, draw: int | Tensor, tag: Tag
) -> Tensor:
    """Uniform numbers in (0, 1), float32 (B, *shape): the upper 23 bits of a word plus one half, which is exact."""
    words = random_bits(math.prod(shape), seed, sample_ids, draw, tag)
    return ((words >> 9).float() + 0.5).mul_(2.0**-23).view(-1, *shape)


def random_ranks(count: int, seed: int | Tensor, sample_ids: Tensor, draw: int | Tensor, tag: Tag) -> Tensor:
    """A uniformly random permutation of 0..count-1 for every sample, int64 (B, count).

    `ranks < k` is a random subset of exactly k positions; `ranks % n` splits the positions into n even groups.
    Each position draws a word and gets its rank; ties (probability below count**2 / 2**33) are broken by position.
    """
    order = random_bits(count, seed, sample_ids, draw, tag).argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand_as(order))


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The data order of an epoch: a random permutation of 0..count-1, int64 (count,)."""
    return random_ranks(count, seed, torch.zeros(1, dtype=torch.int64), epoch, Tag.ORDER)[0]


def derive_seed(seed: Seed, *names: str | int) -> Seed:
    """Deterministically derive an independent 63-bit seed for a named purpose, e.g. derive_seed(seed, "verdict").

    The result for an int64 scalar tensor is also an int64 scalar tensor.
    """
    for name in names:
        word = zlib.crc32(name.encode()) if isinstance(name, str) else name
        counter = (word & _MASK32, (word >> 32) & _MASK32, int(isinstance(name, str)), Tag.SEED << 16)
        low, high, *_ = philox4x32(counter, seed)
        seed = (high << 32 | low) & 0x7FFFFFFFFFFFFFFF
    return seed


def check_keys(
    function: str, batch: int, device: torch.device, seed: int | Tensor, sample_ids: Tensor | None, draw: int | Tensor
) -> tuple[Tensor, int | Tensor]:
    """Validate (seed, sample_ids, draw) of a call over `batch` samples; sample_ids defaults to 0..batch-1."""
    # While torch.compile traces, numbers may be symbolic; they are checked at run time.
    tracing = torch.compiler.is_compiling()
    if not isinstance(seed, Tensor):
        if not tracing:
            check_integer(function, "seed", seed, low=-(2**63), high=2**63 - 1)
    elif seed.dtype != torch.int64 or seed.shape != ():
        given = f"{seed.dtype} of shape {tuple(seed.shape)}"
        raise ValueError(message(function, "seed", "an integer or int64 of shape ()", given))
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    elif check_tensor(function, "sample_ids", sample_ids).dtype != torch.int64 or sample_ids.shape != (batch,):
        given = f"{sample_ids.dtype} of shape {tuple(sample_ids.shape)}"
        raise ValueError(message(function, "sample_ids", f"int64 of shape ({batch},)", given))
    if isinstance(draw, Tensor):
        if draw.dtype != torch.int64 or draw.shape not in ((), (batch,)):
            given = f"{draw.dtype} of shape {tuple(draw.shape)}"
            raise ValueError(message(function, "draw", f"an integer or int64 of shape () or ({batch},)", given))
    elif not tracing:
        check_integer(function, "draw", draw, low=0, high=_MASK32)
    return sample_ids.to(device), draw


def key_tensors(
    function: str, batch: int, device: torch.device, seed: int | Tensor, sample_ids: Tensor | None, draw: int | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The validated key (seed, sample_ids, draw) as int64 tensors on `device`, for ops that read it from memory."""
    sample_ids, draw = check_keys(function, batch, device, seed, sample_ids, draw)
    return _on(device, seed), sample_ids, _on(device, draw)


def _on(device: torch.device, value: int | Tensor) -> Tensor:
    return value.to(device) if isinstance(value, Tensor) else torch.full((), value, dtype=torch.int64, device=device)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of torch, Python and numpy in the block and restore them afterwards.

    Torch's are those of the CPU and of `device`. The block holds a lock, so that only one thread at a time is in one.
    """
    on_gpu = device is not None and device.type == "cuda"
    with _GENERATORS, torch.random.fork_rng(devices=[device] if on_gpu else []):
        ours, theirs = random.getstate(), np.random.get_state()
        seed_generators(seed, device)
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(theirs)


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators that `seeded` restores."""
    # torch.manual_seed would seed all GPUs, and without a GPU it formats a stack trace for later use.
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & _MASK32)


@dataclass
class Draws:
    """The result of watched_generators: whether a generator was used."""

    drawn: bool = False


@contextlib.contextmanager
def watched_generators() -> Iterator[Draws]:
    """Detect whether the block draws from a global generator of torch, Python or numpy; restores it afterwards.

    The yielded object holds the answer after the block. During CUDA graph capture, generators of GPUs are ignored.
    """
    result = Draws()
    with _GENERATORS:
        on_gpu = torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing()
        cpu, gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if on_gpu else []
        ours, theirs = random.getstate(), np.random.get_state()
        try:
            yield result
        finally:
            # The comparison avoids torch ops, because a tracer may be active.
            if _bytes(cpu) != _bytes(torch.get_rng_state()):
                result.drawn = True
                torch.set_rng_state(cpu)
            now = torch.cuda.get_rng_state_all() if on_gpu else []
            if list(map(_bytes, gpus)) != list(map(_bytes, now)):
                result.drawn = True
                torch.cuda.set_rng_state_all(gpus)
            if ours != random.getstate():
                result.drawn = True
                random.setstate(ours)
            if _words(theirs) != _words(np.random.get_state()):
                result.drawn = True
                np.random.set_state(theirs)


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _words(state: Any) -> tuple[Any, ...]:
    """The state of numpy's generator in a form that can be compared."""
    return (state[1].tobytes(), *state[2:])
