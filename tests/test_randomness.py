"""Philox, and what is built on it: known answers, independence of the batch, and statistics."""

from __future__ import annotations

import math

import pytest
import torch

from atop_fast import ops
from atop_fast.ops import mask_blocks, random_normal
from atop_fast.randomness import (
    Tag,
    check_keys,
    derive_seed,
    permutation,
    philox4x32,
    random_bits,
    random_ranks,
    random_uniform,
    seeded,
)

IDS = torch.arange(4096)


# The vectors that Random123 publishes: counter, key, words.
RANDOM123 = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox4x32([torch.tensor(c) for c in counter], key)) == expected
    assert philox4x32(counter, key) == expected


def test_seed_as_tensor_equals_seed_as_int():
    assert torch.equal(random_bits(9, torch.tensor(-5), IDS, 3, Tag.MASK), random_bits(9, -5, IDS, 3, Tag.MASK))


def test_uniform_numbers_do_not_depend_on_the_batch():
    ids = IDS[:512]
    whole = random_uniform((3, 5, 7), 11, ids, 2, Tag.START)
    order = torch.randperm(len(ids))
    assert torch.equal(random_uniform((3, 5, 7), 11, ids[order], 2, Tag.START), whole[order])
    for size in (1, 7, 64):
        assert torch.equal(random_uniform((3, 5, 7), 11, ids[:size], 2, Tag.START), whole[:size])
    draws = torch.full((len(ids),), 2)
    assert torch.equal(random_uniform((3, 5, 7), 11, ids, draws, Tag.START), whole)


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
    n = random_normal((1024,), 5, IDS).flatten().double()
    count = len(n)
    assert abs(n.mean()) < 4 / math.sqrt(count)
    assert abs(n.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs(n.pow(3).mean()) < 4 * math.sqrt(15 / count)
    assert abs(n.pow(4).mean() - 3) < 4 * math.sqrt(96 / count)
    ordered = n.sort().values
    distance = (torch.special.ndtr(ordered) - torch.arange(1, count + 1) / count).abs().max()
    assert distance < 1.95 / math.sqrt(count)
    for sigmas in (3, 4, 5):
        expected = count * math.erfc(sigmas / math.sqrt(2)) / 2
        for tail in (n > sigmas, n < -sigmas):
            assert abs(tail.sum() - expected) < 5 * math.sqrt(expected)
    # The largest number that 31 bits can give.
    assert n.abs().max() <= math.sqrt(2 * 32 * math.log(2)) + 1e-5


def correlations(a, b):
    """Correlations of all columns of a and b, in units of their standard deviation under independence."""
    a, b = ((t.double() - t.double().mean(dim=0)) / t.double().std(dim=0) for t in (a, b))
    return (a.T @ b).abs() / math.sqrt(len(a))


def test_numbers_of_a_sample_are_independent():
    """Lanes of a group and neighbors in other groups, their values and their squares."""
    columns = random_normal((1024,), 5, IDS).view(-1, 16)
    off_diagonal = ~torch.eye(16, dtype=torch.bool)
    for power in (1, 2):
        assert correlations(columns.pow(power), columns.pow(power))[off_diagonal].max() < 5
        assert correlations(columns.pow(power), columns.pow(3 - power)).max() < 5


def test_streams_are_independent():
    base = random_normal((64,), 5, IDS).view(-1, 1)
    others = [
        random_normal((64,), 6, IDS),
        random_normal((64,), 5 + 2**32, IDS),
        random_normal((64,), 5, IDS + 1),
        random_normal((64,), 5, IDS + len(IDS)),
        random_normal((64,), 5, IDS + 2**32),
        random_normal((64,), 5, IDS, 1),
        random_normal((64,), 5, IDS, 2**31),
        random_normal((64,), 5, IDS, 0, Tag.START),
    ]
    for other in others:
        for power in (1, 2):
            assert correlations(base.pow(power), other.view(-1, 1).pow(power)) < 5


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


def test_every_order_of_blocks_is_as_likely():
    """The chi-square statistic of the 24 orders of 4 blocks; 49.7 is exceeded with probability 0.001."""
    orders = mask_blocks(4, 4, 5, torch.arange(2**16), copies=4).long()
    counts = (orders * torch.tensor([64, 16, 4, 1])).sum(dim=1).bincount(minlength=256)
    counts = counts[counts > 0]
    expected = 2**16 / 24
    assert len(counts) == 24
    assert ((counts - expected) ** 2 / expected).sum() < 49.7


def test_masks_of_copies_are_even_and_uniform():
    """Three copies mask 9, 8 and 8 of 25 blocks: each block with these probabilities, and all pairs equally."""
    owners = mask_blocks(25, 25, 5, torch.arange(2**15), copies=3)
    sizes = torch.tensor([9, 8, 8])
    groups = torch.stack([owners == n for n in range(3)], dim=1)
    assert torch.equal(groups.sum(dim=2), sizes.expand(len(owners), 3))
    for share, group in zip(sizes / 25, groups.unbind(dim=1), strict=True):
        assert (group.double().mean(dim=0) - share).abs().max() < 5 * math.sqrt(0.25 / len(owners))
    together = sum(group.double().T @ group.double() for group in groups.unbind(dim=1)) / len(owners)
    chance = float((sizes * (sizes - 1)).sum()) / (25 * 24)
    off_diagonal = together[~torch.eye(25, dtype=torch.bool)]
    assert (off_diagonal - chance).abs().max() < 5 * math.sqrt(chance * (1 - chance) / len(owners))


def test_masks_are_independent_of_each_other_and_of_the_noise():
    ids = torch.arange(2**15)
    mask = mask_blocks(16, 4, 5, ids).float()
    for other in (
        random_normal((16,), 5, ids),
        random_normal((16,), 5, ids).square(),
        mask_blocks(16, 4, 6, ids),
        mask_blocks(16, 4, 5, ids + 1),
        mask_blocks(16, 4, 5, ids, 1),
    ):
        assert correlations(mask, other).max() < 5


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
    before, x = torch.get_rng_state(), torch.zeros(2, 3, 8, 8, requires_grad=True)
    ids = IDS[:2]
    random_uniform((8,), 0, IDS, 0, Tag.START)
    random_ranks(8, 0, IDS, 0, Tag.MASK)
    permutation(10, 0, 0)
    with seeded(3):
        torch.rand(5)
    ops.random_normal((8,), 0, ids)
    blocks = ops.mask_blocks(4, 4, 0, ids, copies=2)
    y = ops.corrupt(x, patch=4, copies=2, mask_ratio=1.0)
    ops.assemble(y[:, :3], blocks, 4).sum().backward()
    ops.resize(x, (4, 4))
    ops.random_resize_pad(x, 8, 12)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"seed": 1.5}, "f: seed must be an integer, got float"),
        ({"sample_ids": torch.zeros(3)}, r"f: sample_ids must be int64 of shape \(2,\)"),
        ({"draw": -1}, "f: draw must be an integer and in"),
        ({"draw": torch.zeros(3, dtype=torch.int64)}, r"f: draw must be an integer or int64 of shape \(\) or \(2,\)"),
    ],
    ids=["seed", "sample_ids", "draw", "draw-shape"],
)
def test_wrong_keys_are_named(arguments, pattern):
    key = {"seed": 0, "sample_ids": None, "draw": 0, **arguments}
    with pytest.raises((TypeError, ValueError), match=pattern):
        check_keys("f", 2, torch.device("cpu"), **key)
