"""random_bits: the words of the specification."""

from __future__ import annotations

import _harness as harness
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast.ops import random_bits as spec_module
from atop_fast.randomness import Tag, philox_words, random_bits


def sample(batch, per_sample=True):
    seed, ids, draws = harness.random_key(batch)
    return seed, ids, draws if per_sample else torch.tensor(7, device=DEVICE)


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", op="random_bits", count=(0, 1, 3, 4, 5, 1023, 1025))
def test_matches_reference(backend, count):
    harness.check_reference(backend, "random_bits", *sample(3), int(Tag.START), count)


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", op="random_bits", batch=(0, 1, 9), per_sample=(True, False))
def test_batches_and_strides(backend, batch, per_sample):
    seed, ids, draws = sample(2 * batch, per_sample)
    harness.check_reference(backend, "random_bits", seed, ids[::2], draws[1::2] if per_sample else draws, 3, 13)


@cases(op="random_bits", traced={})
def test_opcheck(backend, parts):
    with harness.owned_by(backend, ["random_bits"]):
        harness.opcheck(spec_module.OP, (*sample(3), int(Tag.START), 9), parts)


@pytest.mark.gpu
def test_a_gpu_draws_the_words_of_a_cpu():
    ids = torch.arange(5)
    for seed, draws in ((-3, 2**32 - 1), (torch.tensor(7), ids)):
        expected = philox_words(9, seed, ids, draws, Tag.MASK)
        there = [value.cuda() if isinstance(value, torch.Tensor) else value for value in (seed, draws)]
        assert torch.equal(random_bits(9, there[0], ids.cuda(), there[1], Tag.MASK).cpu(), expected)
