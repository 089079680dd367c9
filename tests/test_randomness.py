"""Philox, and what is built on it: known answers, independence of the batch, and statistics."""

from __future__ import annotations

import math

import pytest
import torch

from atop_fast.randomness import (
    Tag,
    check_keys,
    derive_seed,
    permutation,
    philox4x32,
    random_bits,
    random_normal,
    random_ranks,
    random_uniform,
    seeded,
)

IDS = torch.arange(4096)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors that Random123 publishes."""
    assert tuple(int(w) for w in philox4x32([torch.tensor(c) for c in counter], key)) == expected


def test_seed_as_tensor_equals_seed_as_int():
    assert torch.equal(random_bits(9, torch.tensor(-5), IDS, 3, Tag.MASK), random_bits(9, -5, IDS, 3, Tag.MASK))


@pytest.mark.parametrize("function", [random_normal, random_uniform], ids=lambda f: f.__name__)
def test_bits_do_not_depend_on_the_batch(function):
    whole = function((3, 5, 7), 11, IDS, 2, Tag.NOISE)
    order = torch.randperm(len(IDS))
    assert torch.equal(function((3, 5, 7), 11, IDS[order], 2, Tag.NOISE), whole[order])
    for size in (1, 7, 64):
        assert torch.equal(function((3, 5, 7), 11, IDS[:size], 2, Tag.NOISE), whole[:size])
    draws = torch.full((len(IDS),), 2)
    assert torch.equal(function((3, 5, 7), 11, IDS, draws, Tag.NOISE), whole)


def test_large_sample_ids_and_draws_differ():
    ids = torch.tensor([0, 2**32, 2**40, 2**32 - 1])
    draws = torch.tensor([0, 0, 0, 2**32 - 1])
    assert len({tuple(row.tolist()) for row in random_bits(4, 0, ids, draws, Tag.NOISE)}) == 4


def test_uniform_is_uniform_and_open():
    u = random_uniform((64,), 5, IDS, 0, Tag.START).flatten().double()
    assert u.min() > 0
    assert u.max() < 1
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is exceeded with probability 0.001.
    grid = torch.arange(1, len(u) + 1) / len(u)
    assert (u.sort().values - grid).abs().max() < 1.95 / math.sqrt(len(u))


def test_normal_is_normal():
    n = random_normal((257,), 5, IDS, 0, Tag.NOISE).flatten().double()
    count = len(n)
    assert abs(n.mean()) < 4 / math.sqrt(count)
    assert abs(n.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs(n.pow(3).mean()) < 4 * math.sqrt(15 / count)
    assert abs(n.pow(4).mean() - 3) < 4 * math.sqrt(96 / count)
    cdf = torch.special.ndtr(n.sort().values)
    assert (cdf - torch.arange(1, count + 1) / count).abs().max() < 1.95 / math.sqrt(count)


def test_normal_matches_box_muller_in_float64():
    words = random_bits(4096, 5, IDS[:64], 0, Tag.NOISE).double()
    radius = (-2 * ((words[:, 0::2] + 0.5) * 2.0**-32).log()).sqrt()
    angle = 2 * math.pi * words[:, 1::2] * 2.0**-32
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    error = (random_normal((4096,), 5, IDS[:64], 0, Tag.NOISE).double() - expected).abs().flatten()
    assert error.kthvalue(int(0.999 * len(error))).values < 2e-6
    # Near u = 1, float32 has a spacing of 2**-24, which the radius sqrt(2 (1 - u)) turns into at most this.
    assert error.max() < math.sqrt(2 * 2.0**-24)


def test_streams_are_independent():
    base = random_normal((64,), 5, IDS, 0, Tag.NOISE).flatten()
    others = [
        random_normal((64,), 6, IDS, 0, Tag.NOISE),
        random_normal((64,), 5, IDS + len(IDS), 0, Tag.NOISE),
        random_normal((64,), 5, IDS, 1, Tag.NOISE),
        random_normal((64,), 5, IDS, 0, Tag.START),
    ]
    for other in others:
        assert abs((base * other.flatten()).mean()) < 4 / math.sqrt(len(base))


def test_ranks_are_permutations_with_uniform_inclusion():
    ranks = random_ranks(16, 5, IDS, 0, Tag.MASK)
    assert torch.equal(ranks.sort(dim=1).values, torch.arange(16).expand_as(ranks))
    chosen = (ranks < 4).double()
    deviation = 4 * math.sqrt(0.25 * 0.75 / len(IDS))
    assert (chosen.mean(dim=0) - 0.25).abs().max() < deviation
    pairs = chosen.T @ chosen / len(IDS)
    off_diagonal = pairs[~torch.eye(16, dtype=torch.bool)]
    # A pair is chosen with probability 4/16 * 3/15; 5 sigma, for 120 pairs.
    assert (off_diagonal - 0.05).abs().max() < 5 * math.sqrt(0.05 * 0.95 / len(IDS))


def test_permutation_changes_with_epoch_and_seed():
    orders = [permutation(100, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_derived_seeds_differ_by_name_and_repeat():
    seeds = [derive_seed(0), derive_seed(0, "a"), derive_seed(0, "b"), derive_seed(1, "a"), derive_seed(0, "a", 1)]
    assert len(set(seeds)) == len(seeds)
    assert derive_seed(0, "a") == seeds[1]


def test_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    random_normal((8,), 0, IDS, 0, Tag.NOISE)
    random_ranks(8, 0, IDS, 0, Tag.MASK)
    with seeded(3):
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"seed": 1.5}, "f: seed must be an integer, got float"),
        ({"sample_ids": torch.zeros(3)}, r"f: sample_ids must be int64 of shape \(2,\)"),
        ({"draws": -1}, "f: draws must be an integer and in"),
        ({"draws": torch.zeros(3, dtype=torch.int64)}, r"f: draws must be an integer or int64 of shape \(\) or \(2,\)"),
    ],
    ids=["seed", "sample_ids", "draws", "draws-shape"],
)
def test_wrong_keys_are_named(arguments, pattern):
    key = {"seed": 0, "sample_ids": None, "draws": 0, **arguments}
    with pytest.raises((TypeError, ValueError), match=pattern):
        check_keys("f", 2, torch.device("cpu"), **key)
