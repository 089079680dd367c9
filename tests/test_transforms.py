"""RT1, RT2, RT3: exact counts, ranges, batch independence, gradients, and the RT3 assembly."""

from __future__ import annotations

import pytest
import torch

from atop_fast import RT1, RT2, RT3
from atop_fast.transforms import build_transform

X = torch.rand(5, 3, 24, 16)
ALL = [RT1(8), RT2(8), RT3(8, copies=3)]
NAMES = ["rt1", "rt2", "rt3"]


@pytest.mark.parametrize("transform", ALL, ids=NAMES)
def test_layout_and_range(transform):
    z = transform(X, seed=1)
    assert z.shape == (5 * transform.copies, 5, 24, 16)
    image, ones, mask = z[:, :3], z[:, 3], z[:, 4:]
    assert image.min() >= -1
    assert image.max() <= 1
    assert (ones == 1).all()
    assert ((mask == 0) | (mask == 1)).all()
    assert (image * mask == 0).all()


@pytest.mark.parametrize("ratio", [0, 0.1, 0.25, 0.5, 1])
def test_masked_blocks_are_counted_exactly_and_whole(ratio):
    mask = RT1(8, ratio)(X, seed=1)[:, -1]
    blocks = mask.unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).flatten(1, 2)
    assert torch.equal(blocks.amin(2), blocks.amax(2))
    assert (blocks[..., 0].sum(1) == round(ratio * 6)).all()


def test_masks_differ_by_sample_unless_shared():
    x = X[:, :, :16].repeat(4, 1, 1, 1)
    assert len(RT1(4)(x)[:, -1].unique(dim=0)) > 1
    shared = RT1(4, shared_mask=True)
    assert len(shared(x)[:, -1].unique(dim=0)) == 1
    assert torch.equal(shared(x)[3:4], shared(x[3:4], sample_ids=torch.tensor([3])))


@pytest.mark.parametrize("transform", ALL, ids=NAMES)
def test_result_belongs_to_the_sample(transform):
    n, ids, draws = transform.copies, torch.tensor([4, 9, 2, 7, 0]), torch.tensor([1, 0, 5, 5, 2])
    whole = transform(X, 7, ids, draws)
    for i in range(5):
        one = transform(X[i : i + 1], 7, ids[i : i + 1], int(draws[i]))
        assert torch.equal(one, whole[n * i : n * i + n])
    order = torch.tensor([3, 1, 0, 4, 2])
    shuffled = transform(X[order], 7, ids[order], draws[order]).unflatten(0, (-1, n))
    assert torch.equal(shuffled, whole.unflatten(0, (-1, n))[order])


def test_noise_is_that_of_the_formula():
    """What a user would write: x + sigma n, clip, 2x - 1, mask; here with a noise measured from grey images."""
    grey = torch.full((64, 1, 32, 32), 0.5)
    z = RT2(8, 0.25, 0.1)(grey, seed=3)
    kept = z[:, 0][z[:, 2] == 0] / 2
    assert abs(kept.mean()) < 0.002
    assert abs(kept.std() - 0.1) < 0.002


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 6])
def test_rt3_masks_partition_the_image(copies):
    transform = RT3(8, copies, sigma=0)
    z = transform(X, seed=2)
    assert (z[:, -1].unflatten(0, (5, copies)).sum(1) == 1).all()
    identity = (2 * X - 1).repeat_interleave(copies, 0)
    assert torch.equal(transform.assemble(identity, z), 2 * X - 1)


@pytest.mark.parametrize("transform", ALL, ids=NAMES)
def test_gradcheck(transform):
    # Small noise on mid-range pixels keeps clear of the clip's kinks.
    transform = type(transform)(4, **({} if isinstance(transform, RT1) else {"sigma": 0.01}))
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64).mul_(0.5).add_(0.25).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: transform(x, 1), x)


def test_empty_batch_and_single_pixel():
    assert RT2(8)(X[:0]).shape == (0, 5, 24, 16)
    assert RT2(1, 1.0)(torch.rand(2, 1, 1, 1)).shape == (2, 3, 1, 1)


def test_nan_and_infinity_propagate():
    x = X.clone()
    x[0, 0, 0, 0], x[1, 0, 0, 0] = float("nan"), float("inf")
    z = RT2(8, 0.0)(x)
    assert z[0, 0, 0, 0].isnan()
    assert z[1, 0, 0, 0] == 1


def test_global_generator_is_untouched():
    before = torch.get_rng_state()
    RT2(8)(X)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: RT2(5)(X), ValueError, "RT2: x must be of a height and width divisible by patch=5, got 24 x 16"),
        (lambda: RT2(8)(X[0]), ValueError, r"RT2: x must be images of shape \(B, C, H, W\), got \(3, 24, 16\)"),
        (lambda: RT2(8)(X.int()), TypeError, "RT2: x must be a floating-point tensor, got torch.int32"),
        (lambda: RT2(0), ValueError, "RT2: patch must be an integer and >= 1, got 0"),
        (lambda: RT2(8, 1.5), ValueError, r"RT2: mask_ratio must be finite and in \[0, 1\], got 1.5"),
        (lambda: RT2(8, sigma=-1), ValueError, "RT2: sigma must be finite and >= 0, got -1"),
        (
            lambda: build_transform("rt4", 8, 0.25, 0.1),
            ValueError,
            "name must be one of 'rt1', 'rt2', 'rt3', got 'rt4'",
        ),
    ],
)
def test_wrong_input_is_named(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()
