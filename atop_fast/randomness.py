"""Sample-keyed randomness: every random number is a pure function of (seed, sample id, draw, tag, position).

Philox4x32-10 (Salmon et al., SC 2011) with key = seed and counter

    c0 = element group (4 values each)      c2 = draw (attack step, EOT draw, Monte-Carlo index ...)
    c1 = low 32 bits of the sample id       c3 = tag << 16 | high 16 bits of the sample id

so a sample gets the same numbers in any batch, order, split or process, and torch's global generator is neither read
nor changed. This file is the specification; it uses only integer and correctly rounded float32 operations, so that
other backends can match it bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ._checks import check_integer, check_tensor, message

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


class Tag(IntEnum):
    """What a random number is used for: different uses never share numbers."""

    NOISE = 1
    MASK = 2
    START = 3
    ORDER = 4
    SEED = 5


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
        # int64 products wrap modulo 2**64, which leaves both 32-bit halves right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, ((p0 >> 32) & _MASK32) ^ c3 ^ k1
        c1, c3 = p1 & _MASK32, p0 & _MASK32
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return c0, c1, c2, c3


def random_bits(count: int, seed: int | Tensor, sample_ids: Tensor, draws: int | Tensor, tag: Tag) -> Tensor:
    """`count` 32-bit words for every sample, int64 (B, count); sample_ids (B,), draws an int or int64 () or (B,)."""
    groups = torch.arange((count + 3) // 4, device=sample_ids.device)[None, :]
    ids = sample_ids.reshape(-1, 1)
    draw = draws.reshape(-1, 1) if isinstance(draws, Tensor) else torch.full_like(ids[:1], draws)
    counter = (groups, ids & _MASK32, draw & _MASK32, ((ids >> 32) & 0xFFFF) | (int(tag) << 16))
    words = torch.stack(torch.broadcast_tensors(*philox4x32(counter, seed)), dim=-1)
    return words.flatten(1)[:, :count]


def random_uniform(
    shape: Sequence[int], seed: int | Tensor, sample_ids: Tensor, draws: int | Tensor, tag: Tag
) -> Tensor:
    """Uniform numbers in (0, 1), float32 (B, *shape): the upper 23 bits of a word, centred, hence exact."""
    words = random_bits(math.prod(shape), seed, sample_ids, draws, tag)
    return ((words >> 9).float() + 0.5).mul_(2.0**-23).view(-1, *shape)


def random_normal(
    shape: Sequence[int], seed: int | Tensor, sample_ids: Tensor, draws: int | Tensor, tag: Tag
) -> Tensor:
    """Standard normal numbers, float32 (B, *shape), by Box-Muller on pairs of words (|n| <= 6.8).

    The logarithm, sine and cosine are polynomials in correctly rounded operations, so the bits do not depend on the
    machine, the library or the place in the batch.
    """
    count = math.prod(shape)
    words = random_bits(count + count % 2, seed, sample_ids, draws, tag)
    a, b = words[:, 0::2], words[:, 1::2]
    radius = (_log(a.float() * 2.0**-32 + 2.0**-33) * -2).clamp_(min=0).sqrt_()
    cosine, sine = _cos_sin(b)
    normal = torch.stack((radius * cosine, radius * sine), dim=-1)
    return normal.flatten(1)[:, :count].reshape(-1, *shape)


def random_ranks(count: int, seed: int | Tensor, sample_ids: Tensor, draws: int | Tensor, tag: Tag) -> Tensor:
    """A uniformly random permutation of 0..count-1 for every sample, int64 (B, count).

    `ranks < k` is a random subset of exactly k positions; `ranks % n` splits the positions into n even groups.
    Each position draws a word and gets its rank; equal words (chance below count**2 / 2**33) rank by position.
    """
    order = random_bits(count, seed, sample_ids, draws, tag).argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand_as(order))


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The data order of an epoch: a random permutation of 0..count-1, int64 (count,)."""
    return random_ranks(count, seed, torch.zeros(1, dtype=torch.int64), epoch, Tag.ORDER)[0]


def derive_seed(seed: int, *names: str | int) -> int:
    """An independent 63-bit seed for a named purpose, e.g. derive_seed(seed, "verdict"); always the same one."""
    for name in names:
        word = zlib.crc32(name.encode()) if isinstance(name, str) else name
        counter = (word & _MASK32, (word >> 32) & _MASK32, int(isinstance(name, str)), Tag.SEED << 16)
        low, high, *_ = philox4x32(counter, seed)
        seed = (high << 32 | low) & 0x7FFFFFFFFFFFFFFF
    return seed


def check_keys(
    function: str, batch: int, device: torch.device, seed: int | Tensor, sample_ids: Tensor | None, draws: int | Tensor
) -> tuple[Tensor, int | Tensor]:
    """Validate (seed, sample_ids, draws) of a call over `batch` samples; sample_ids defaults to 0..batch-1."""
    if not isinstance(seed, Tensor):
        check_integer(function, "seed", seed, low=-(2**63), high=2**63 - 1)
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    elif check_tensor(function, "sample_ids", sample_ids).dtype != torch.int64 or sample_ids.shape != (batch,):
        given = f"{sample_ids.dtype} of shape {tuple(sample_ids.shape)}"
        raise ValueError(message(function, "sample_ids", f"int64 of shape ({batch},)", given))
    if isinstance(draws, Tensor):
        if draws.dtype != torch.int64 or draws.shape not in ((), (batch,)):
            given = f"{draws.dtype} of shape {tuple(draws.shape)}"
            raise ValueError(message(function, "draws", f"an integer or int64 of shape () or ({batch},)", given))
    else:
        check_integer(function, "draws", draws, low=0, high=_MASK32)
    return sample_ids.to(device), draws


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the block (for layer initialisation) and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _log(u: Tensor) -> Tensor:
    """log(u) for float32 u in (0, 1]: Cephes' logf polynomial on the mantissa in [sqrt(1/2), sqrt(2))."""
    bits = u.view(torch.int32)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)
    small = mantissa < 0.707106781186547524
    exponent = ((bits >> 23) - 126 - small.int()).float()
    m = torch.where(small, mantissa + mantissa, mantissa) - 1
    p = torch.full_like(m, 7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1):
        p = p.mul_(m).add_(c)
    for c in (2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1):
        p = p.mul_(m).add_(c)
    square = m * m
    tail = p.mul_(m).mul_(square).add_(exponent * -2.12194440e-4).add_(square.mul_(-0.5))
    return tail.add_(m).add_(exponent * 0.693359375)


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle 2 pi word / 2**32: two bits of quadrant, 24 bits r in [0, 1) of a quarter turn."""
    quadrant, r = word >> 30, ((word & 0x3FFFFFFF) >> 6).float() * 2.0**-24
    s, c = _quarter_sine(r), _quarter_sine(1 - r)
    odd = (quadrant & 1).bool()
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    cosine = torch.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    return cosine, torch.where(quadrant >= 2, -sine, sine)


def _quarter_sine(r: Tensor) -> Tensor:
    """sin(pi/2 r) for r in [0, 1]: Taylor polynomial of degree 11, error below 6e-8."""
    square = r * r
    p = torch.full_like(r, -((math.pi / 2) ** 11) / math.factorial(11))
    for k in (9, 7, 5, 3, 1):
        p = p.mul_(square).add_((-1) ** (k // 2) * (math.pi / 2) ** k / math.factorial(k))
    return p.mul_(r)
