"""mask_blocks: exact counts, the order of the specification, and one sample's independence of the others."""

from __future__ import annotations

import importlib

import _harness as harness
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast import ops
from atop_fast.randomness import Tag, random_bits

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.mask_blocks")
NAMES = ("mask_blocks",)
# Around a group of 4 words and a tile of 64 blocks.
BLOCKS = (0, 1, 2, 3, 5, 16, 63, 64, 65, 130)


def sample(batch, blocks=16):
    """A key, and counts from below 0 to above all."""
    return *harness.random_key(batch), torch.linspace(-1, blocks + 1, batch).long().to(DEVICE)


SPEC = harness.Spec(
    name="mask_blocks",
    call=spec_module.OP,
    formula=spec_module.reference,
    sample=lambda shape, dtype: sample(*shape),
    dtypes=(torch.uint8,),
    shapes=(),
    exact=True,
    numbers=(16, 3),
    differentiable=(),
)


def mask(blocks, masked, copies=1, ids=(0, 1, 2), seed=5, draws=0):
    return ops.mask_blocks(blocks, masked, seed, torch.tensor(ids, device=DEVICE), draws, copies)


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", blocks=BLOCKS)
def test_matches_reference(backend, blocks):
    harness.check_reference(backend, "mask_blocks", *sample(3, blocks), blocks, 1 + blocks % 4)


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", batch=(0, 1, 7), copies=(1, 255))
def test_batches(backend, batch, copies):
    harness.check_reference(backend, "mask_blocks", *sample(batch), 16, copies)


@cases(but="eager")
def test_key_in_strides(backend):
    seed, ids, draws, masked = sample(6)
    harness.check_reference(backend, "mask_blocks", seed, ids[::2], draws[1::2], masked[::2], 16, 2)
    harness.check_reference(backend, "mask_blocks", seed, ids, draws[0], masked[3], 16, 2)
    harness.check_reference(backend, "mask_blocks", seed, ids[:1].expand(6), draws, masked[2:3].expand(6), 16, 2)


@cases()
def test_ranks_by_word_then_position(backend):
    """Against Python's sort, with a sample two of whose 256 words are equal."""
    ids = [285853, 1]
    words = random_bits(256, 5, torch.tensor(ids), 0, Tag.MASK).tolist()
    assert [len(set(row)) for row in words] == [255, 256]
    with harness.owned_by(backend, NAMES):
        owners = mask(256, 256, 255, ids).tolist()
    for row, given in zip(owners, words, strict=True):
        order = sorted(range(256), key=lambda i: (given[i], i))
        assert [row[i] for i in order] == [rank % 255 for rank in range(256)]


@cases(but="triton")
def test_many_blocks(backend):
    """Most samples of so many blocks hold equal words."""
    words = random_bits(2**17, 5, torch.arange(3), 0, Tag.MASK)
    assert min(len(row.unique()) for row in words) < 2**17
    order = words.argsort(dim=1, stable=True)
    with harness.owned_by(backend, NAMES):
        owners = mask(2**17, 2**17 - 9, copies=7).cpu()
    expected = torch.arange(2**17) % 7
    expected[-9:] = 7
    assert torch.equal(owners.gather(1, order).long(), expected.expand(3, -1))


@cases(copies=(1, 2, 3, 7))
def test_counts_are_exact_and_even(backend, copies):
    with harness.owned_by(backend, NAMES):
        for masked in (0, 1, 6, 25):
            owners = mask(25, masked, copies)
            counts = torch.stack([(owners == n).sum(dim=1) for n in range(copies)])
            assert (counts.sum(dim=0) == masked).all()
            assert counts.max() - counts.min() <= 1
            assert ((owners == copies).sum(dim=1) == 25 - masked).all()


@cases()
def test_masked_is_clipped(backend):
    with harness.owned_by(backend, NAMES):
        assert (mask(5, -3) == 1).all()
        assert (mask(5, 2**62) == 0).all()


@cases(count=(64,), interpreted={"count": (10,)})
def test_owners_belong_to_the_sample(backend, count):
    seed, ids, draws, masked = sample(count)
    with harness.owned_by(backend, NAMES):
        whole = ops.mask_blocks(16, masked, seed, ids, draws, 2)
        for part in (torch.tensor([count - 1]), torch.tensor([5, 0, count - 2, 7, 5, 4, 3])):
            part = part.to(DEVICE)
            assert torch.equal(ops.mask_blocks(16, masked[part], seed, ids[part], draws[part], 2), whole[part])
        assert torch.equal(ops.mask_blocks(16, int(masked[9]), -5, ids[9:10], int(draws[9]), 2), whole[9:10])


@cases()
def test_every_part_of_the_key_matters(backend):
    keys = [{"seed": 5 + 2**32}, {"seed": -5}, {"ids": (4 + 2**32,)}, {"ids": (4 + 2**47,)}, {"draws": 6}, {}]
    with harness.owned_by(backend, NAMES):
        rows = [tuple(mask(64, 32, **{"ids": (4,), "draws": 5, **key})[0].tolist()) for key in keys]
    assert len(set(rows)) == len(keys)


@cases(traced={})
def test_opcheck(backend, parts):
    harness.check_opcheck(SPEC, backend, sample(3), False, parts)


@pytest.mark.parametrize("compiler", harness.COMPILERS)
def test_compiles(compiler):
    def call(seed, ids, draws, masked):
        return ops.mask_blocks(16, masked, seed, ids, draws, copies=2)

    spec = harness.Spec(**{**vars(SPEC), "numbers": (), "call": call})
    harness.check_compiled(spec, harness.backends(), [sample(n) for n in (2, 5, 7)], compiler)


BAD = [
    ({"masked": torch.tensor(0.5)}, TypeError, "masked must be an int64 tensor, got torch.float32"),
    ({"masked": torch.zeros(3).long()}, ValueError, r"masked must be of shape \(\) or \(2,\), got \(3,\)"),
    ({"blocks": -1}, ValueError, "blocks must be an integer and >= 0, got -1"),
    ({"copies": 0}, ValueError, r"copies must be an integer and in \[1, 255\], got 0"),
    ({"copies": 256}, ValueError, r"copies must be an integer and in \[1, 255\], got 256"),
]


@cases(bad=range(len(BAD)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend, bad):
    change, error, words = BAD[bad]
    zero = torch.tensor(0)
    arguments = {"seed": zero, "sample_ids": torch.arange(2), "draw": zero, "masked": zero, "blocks": 4, "copies": 1}
    arguments.update(change)
    with harness.owned_by(backend, NAMES):
        with pytest.raises(error, match=f"mask_blocks: {words}"):
            ops.mask_blocks(**arguments)
        with pytest.raises(RuntimeError if backend == "cpp" else error, match=f"mask_blocks: {words}"):
            torch.ops.atop_fast.mask_blocks(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"blocks": 4.0}, TypeError, "blocks must be an integer, got float"),
        ({"copies": 1.5}, TypeError, "copies must be an integer, got float"),
        ({"copies": 0}, ValueError, r"copies must be an integer and in \[1, 255\], got 0"),
        ({"masked": 0.25}, TypeError, "masked must be an integer, got float"),
        ({"sample_ids": 3}, TypeError, "sample_ids must be a torch.Tensor, got int"),
        ({"sample_ids": torch.zeros(2)}, ValueError, r"sample_ids must be int64 of shape \(2,\), got torch.float32"),
        ({"seed": "0"}, TypeError, "seed must be an integer, got str"),
        ({"draw": -1}, ValueError, "draw must be an integer and in"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"blocks": 4, "masked": 1, "seed": 0, "sample_ids": torch.arange(2), **change}
    with pytest.raises(error, match=f"mask_blocks: {words}"):
        ops.mask_blocks(**arguments)
