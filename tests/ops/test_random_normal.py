"""random_normal: the bits of the specification, the numbers of float64, and one sample's independence of the others."""

from __future__ import annotations

import importlib
import math

import _harness as harness
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast import ops
from atop_fast.randomness import Tag, philox4x32, random_bits

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.random_normal")
NAMES = ("random_normal",)
# Around a group of 4, a batch of 32 groups and a strip of 1024 numbers.
COUNTS = (0, 1, 2, 3, 4, 5, 127, 1023, 1025, 4099)


def sample(batch, per_sample=True):
    seed, ids, draws = harness.random_key(batch)
    return seed, ids, draws if per_sample else torch.tensor(7, device=DEVICE)


SPEC = harness.Spec(
    name="random_normal",
    call=spec_module.OP,
    formula=spec_module.reference,
    sample=lambda shape, dtype: sample(*shape),
    dtypes=(torch.float32,),
    shapes=(),
    exact=True,
    numbers=(int(Tag.NOISE), 9),
    differentiable=(),
)


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", count=COUNTS)
def test_matches_reference(backend, count):
    harness.check_reference(backend, "random_normal", *sample(3), int(Tag.NOISE), count)


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", batch=(0, 1, 9), per_sample=(True, False))
def test_batches(backend, batch, per_sample):
    harness.check_reference(backend, "random_normal", *sample(batch, per_sample), int(Tag.START), 13)


@cases(but="eager")
def test_key_in_strides(backend):
    seed, ids, draws = sample(6)
    harness.check_reference(backend, "random_normal", seed, ids[::2], draws[1::2], int(Tag.NOISE), 5)
    harness.check_reference(backend, "random_normal", seed, ids, draws[:1].expand(6), int(Tag.NOISE), 5)
    harness.check_reference(backend, "random_normal", seed, ids[:1].expand(6), draws, int(Tag.NOISE), 5)


@cases()
def test_equals_box_muller_in_float64(backend):
    ids = torch.arange(4, device=DEVICE)
    words = random_bits(2048, 5, ids, 0, Tag.NOISE)
    radius = (-2 * ((words[:, 0::2] // 2 + 0.5).double() / 2**31).log()).sqrt()
    angle = 2 * math.pi * words[:, 1::2].double() / 2**32
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    with harness.owned_by(backend, NAMES):
        error = (ops.random_normal((2048,), 5, ids).double() - expected).abs().flatten()
    assert error.kthvalue(int(0.999 * len(error))).values < 2e-6
    # Near u = 1, float32 has a spacing of 2**-24, which the radius sqrt(2 (1 - u)) turns into at most this.
    assert error.max() < math.sqrt(2 * 2.0**-24)


@cases()
def test_numbers_belong_to_the_sample(backend):
    seed, ids, draws = sample(64)
    with harness.owned_by(backend, NAMES):
        whole = ops.random_normal((3, 5), seed, ids, draws)
        for part in (torch.tensor([63]), torch.tensor([5, 0, 62, 17, 5, 4, 33])):
            part = part.to(DEVICE)
            assert torch.equal(ops.random_normal((3, 5), seed, ids[part], draws[part]), whole[part])
        assert torch.equal(ops.random_normal((3, 5), -5, ids[9:10], int(draws[9])), whole[9:10])


@cases()
def test_numbers_do_not_depend_on_the_count(backend):
    seed, ids, draws = sample(2)
    with harness.owned_by(backend, NAMES):
        whole = ops.random_normal((1030,), seed, ids, draws)
        for count in (1, 6, 1025):
            assert torch.equal(ops.random_normal((count,), seed, ids, draws), whole[:, :count])


@cases()
def test_every_part_of_the_key_matters(backend):
    def numbers(seed=3, i=4, draw=5, tag=Tag.NOISE):
        return tuple(ops.random_normal((4,), seed, torch.tensor([i], device=DEVICE), draw, tag)[0].tolist())

    with harness.owned_by(backend, NAMES):
        changed = [numbers(seed=3 + 2**32), numbers(seed=-3), numbers(i=4 + 2**32), numbers(i=4 + 2**47), numbers(i=5)]
        changed += [numbers(draw=6), numbers(draw=5 + 2**31), numbers(tag=Tag.START), numbers()]
    assert len(set(changed)) == len(changed)


@cases(traced={})
def test_opcheck(backend, parts):
    harness.check_opcheck(SPEC, backend, sample(3), False, parts)


@pytest.mark.parametrize("compiler", harness.COMPILERS)
def test_compiles(compiler):
    spec = harness.Spec(**{**vars(SPEC), "numbers": (), "call": lambda *key: ops.random_normal((3, 5), *key)})
    harness.check_compiled(spec, harness.backends(), [sample(n) for n in (2, 5, 7)], compiler)


BAD = [
    ({"seed": torch.tensor(0.5)}, TypeError, "seed must be an int64 tensor, got torch.float32"),
    ({"seed": torch.zeros(2).long()}, ValueError, r"seed must be of shape \(\), got \(2,\)"),
    ({"sample_ids": torch.zeros(2)}, TypeError, "sample_ids must be an int64 tensor, got torch.float32"),
    ({"sample_ids": torch.zeros(2, 1).long()}, ValueError, r"sample_ids must be of shape \([2B],\), got \(2, 1\)"),
    ({"sample_ids": torch.tensor(0)}, ValueError, r"sample_ids must be of shape \([1B],\), got \(\)"),
    ({"draw": torch.zeros(2)}, TypeError, "draw must be an int64 tensor, got torch.float32"),
    ({"draw": torch.zeros(3).long()}, ValueError, r"draw must be of shape \(\) or \(2,\), got \(3,\)"),
    ({"count": -1}, ValueError, "count must be an integer and >= 0, got -1"),
]


@cases(bad=range(len(BAD)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend, bad):
    change, error, words = BAD[bad]
    key = {"seed": torch.tensor(0), "sample_ids": torch.arange(2), "draw": torch.tensor(0), "tag": 1, "count": 5}
    raised = RuntimeError if backend == "cpp" else error
    with harness.owned_by(backend, NAMES), pytest.raises(raised, match=f"random_normal: {words}"):
        torch.ops.atop_fast.random_normal(**{**key, **change})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"shape": (3, -1)}, ValueError, "shape must be an integer and >= 0, got -1"),
        ({"shape": (3, 0.5)}, TypeError, "shape must be an integer, got float"),
        ({"sample_ids": [0, 1]}, TypeError, "sample_ids must be a torch.Tensor, got list"),
        ({"sample_ids": torch.zeros(2)}, ValueError, r"sample_ids must be int64 of shape \(2,\), got torch.float32"),
        ({"sample_ids": torch.tensor(3)}, ValueError, r"sample_ids must be int64 of shape .*, got torch.int64"),
        ({"seed": 2**63}, ValueError, "seed must be an integer and in"),
        ({"seed": torch.zeros(1).long()}, ValueError, r"seed must be an integer or int64 of shape \(\), got torch"),
        ({"draw": 2**32}, ValueError, "draw must be an integer and in"),
        ({"tag": "noise"}, TypeError, "tag must be an integer, got str"),
        ({"tag": 2**16}, ValueError, "tag must be"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"shape": (3,), "seed": 0, "sample_ids": torch.arange(2), "draw": 0, **change}
    with pytest.raises(error, match=f"random_normal: {words}"):
        ops.random_normal(**arguments)


@pytest.mark.slow
@pytest.mark.gpu
@cases(but="eager")
def test_more_than_2_to_the_31_elements(backend):
    """In one sample; the last numbers are those of their group."""
    count = 2**31 + 6
    with harness.owned_by(backend, NAMES):
        last = ops.random_normal((count,), 5, torch.tensor([9], device=DEVICE))[0, -2:]
    words = torch.tensor(philox4x32((count // 4, 9, 0, Tag.NOISE << 16), 5))
    expected = spec_module._minus_2_log(words[:1]).sqrt() * torch.stack(spec_module._cos_sin(words[1:2])).flatten()
    torch.testing.assert_close(last.cpu(), expected, rtol=1e-6, atol=0)
