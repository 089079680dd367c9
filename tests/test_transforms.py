"""The random transforms: exact counts, ranges, batch independence, gradients, the RT3 assembly, and attacks on them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atop_fast import RT1, RT2, RT3, Defense, build_classifier
from atop_fast.attacks import GradientEstimator
from atop_fast.randomness import Tag, philox4x32, seeded
from atop_fast.recipes.schema import load_recipe
from atop_fast.transforms import RandomResizePad, build_transform

X = torch.rand(5, 3, 24, 16, generator=torch.Generator().manual_seed(1))
ALL = [RT1(8), RT2(8), RT3(8, copies=3), RT2(8, size=(32, 16)), RT3(4, copies=2, size=12), RandomResizePad(16, 28)]
NAMES = ["rt1", "rt2", "rt3", "rt2-up", "rt3-down", "pad"]
SIZES = dict(zip(NAMES, [(24, 16)] * 3 + [(32, 16), (12, 12), (28, 28)], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_layout_and_range(name):
    transform = ALL[NAMES.index(name)]
    z = transform(X, seed=1)
    assert z.shape == (5 * transform.copies, 5, *SIZES[name])
    assert transform.target(X, seed=1).shape == (5 * transform.copies, 3, *SIZES[name])
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


def test_of_a_range_every_count_is_as_likely():
    """6 to 18 of 24 blocks, within 5 sigma of a 13th each; and none beyond."""
    counts = RT1(1, (0.25, 0.75))(torch.zeros(4096, 1, 6, 4), seed=2)[:, -1].sum(dim=(1, 2)).long()
    seen = counts.bincount(minlength=25)
    assert seen.nonzero().flatten().tolist() == list(range(6, 19))
    assert (seen[6:19] - 4096 / 13).abs().max() < 5 * (4096 / 13 * 12 / 13) ** 0.5
    one = RT1(1, (0.25, 0.75), shared_mask=True)(torch.zeros(9, 1, 6, 4), draw=torch.arange(9) % 2)[:, -1]
    assert len(one.unique(dim=0)) == len(one.sum(dim=(1, 2)).unique()) == 2


def test_a_recipe_takes_a_range(tmp_path):
    path = tmp_path / "range.yaml"
    path.write_text("base: cifar10-native-rt2\ntransform: {mask_ratio: [0.25, 0.75]}\n")
    transform = load_recipe(str(path)).transform.build()
    assert transform.mask_ratio == (0.25, 0.75)
    assert len(transform(X)[:, -1].sum(dim=(1, 2)).unique()) > 1


def test_masks_differ_by_sample_unless_shared():
    x = X[:, :, :16].repeat(4, 1, 1, 1)
    assert len(RT1(4)(x)[:, -1].unique(dim=0)) > 1
    shared = RT1(4, shared_mask=True)
    assert len(shared(x)[:, -1].unique(dim=0)) == 1
    assert torch.equal(shared(x)[3:4], shared(x[3:4], sample_ids=torch.tensor([3])))


@pytest.mark.parametrize("transform", [*ALL, RT2(4, (0.1, 0.9))], ids=[*NAMES, "rt2-range"])
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
    """The transform as a user would write it: x + sigma n, clip, 2x - 1, mask; with noise measured on gray images."""
    gray = torch.full((64, 1, 32, 32), 0.5)
    z = RT2(8, 0.25, 0.1)(gray, seed=3)
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
    if isinstance(transform, RandomResizePad):
        transform = RandomResizePad(4, 6)
    else:
        size = transform.size and (8, 4)
        transform = type(transform)(4, size=size, **({} if isinstance(transform, RT1) else {"sigma": 0.01}))
    x = torch.rand(2, 1, 4, 8, dtype=torch.float64).mul_(0.5).add_(0.25).requires_grad_()
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


@pytest.mark.parametrize("transform", ALL, ids=NAMES)
def test_bytes_are_images_of_255_levels(transform):
    levels = (X * 255).byte()
    for method in (transform, transform.target):
        z = method(levels, seed=1)
        assert z.dtype == torch.float32
        torch.testing.assert_close(z, method(levels.float() / 255, seed=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("transform", ALL, ids=NAMES)
def test_channels_last_is_kept(transform):
    z = transform(X.contiguous(memory_format=torch.channels_last), seed=1)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(z, transform(X, seed=1))


@pytest.mark.parametrize("transform", ALL, ids=NAMES)
def test_target_is_what_is_left_unmasked(transform):
    """Without mask and noise, the purifier's input is its target."""
    if not isinstance(transform, RandomResizePad):
        transform = type(transform)(4, size=transform.size, **({} if isinstance(transform, RT1) else {"sigma": 0}))
    z, target = transform(X, seed=1), transform.target(X, seed=1)
    seen = (z[:, -1:] == 0).expand_as(target)
    assert 0 < seen.float().mean() < 1
    torch.testing.assert_close(z[:, :3][seen], target[seen], rtol=0, atol=1e-6)


def test_size_is_the_resize_of_torch():
    z = RT2(4, 0.0, 0.0, size=(8, 40))(X)
    expected = 2 * F.interpolate(X, (8, 40), mode="bilinear") - 1
    torch.testing.assert_close(z[:, :3], expected, rtol=0, atol=2e-6)


def test_resize_pad_equals_interpolate_and_pad():
    """Also the mask, which is 1 in the frame around the image, and the values there, 0 after the scaling."""
    z = RandomResizePad(16, 28)(X, 3, 7 + torch.arange(5), 2)
    for i, image in enumerate(X):
        words = philox4x32((0, 7 + i, 2, Tag.RESIZE << 16), 3)
        side = 16 + (words[0] * 13 >> 32)
        top, left = (word * (29 - side) >> 32 for word in words[1:3])
        frame = (left, 28 - side - left, top, 28 - side - top)
        small = F.interpolate(image[None], (side, side), mode="bilinear")[0]
        torch.testing.assert_close(z[i, :3], F.pad(2 * small - 1, frame), rtol=0, atol=4e-6)
        assert torch.equal(z[i, 4], F.pad(torch.zeros(side, side), frame, value=1))


def test_resize_pad_takes_every_place():
    """Sides, rows and columns are uniform: 5 sigma for each of the 2 sides, and of the 4 places of the smaller one."""
    masks = RandomResizePad(3, 4)(torch.rand(4096, 1, 2, 2))[:, -1]
    small = masks.sum(dim=(1, 2)) == 16 - 9
    assert abs(small.double().mean() - 0.5) < 5 * (0.25 / 4096) ** 0.5
    corners = masks[small][:, [0, 0, 3, 3], [0, 3, 0, 3]].sum(dim=1)
    assert (corners == 3).all()
    places = (masks[small][:, [0, 0, 3, 3], [0, 3, 0, 3]] == 0).double().mean(dim=0)
    assert (places - 0.25).abs().max() < 5 * (0.1875 / int(small.sum())) ** 0.5
    assert not masks[~small].any()


class Inpainter(nn.Module):
    """A purifier for images of any size."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, z):
        return torch.tanh(self.layer(z))


with seeded(0):
    PARTS = Inpainter().eval(), build_classifier("small_cnn", channels=3).eval()


@pytest.mark.parametrize("mode", ["exact", "bpda", "blind"])
@pytest.mark.parametrize("transform", ALL, ids=NAMES)
def test_attacks_run_on_a_defense(transform, mode):
    defense, labels = Defense(transform, *PARTS), torch.tensor([0, 1, 2, 3, 4])
    assert defense(X, 1).shape == (5, 10)
    ids = torch.arange(5)
    gradient = GradientEstimator(defense, mode, eot_iter=2, seed=9)(X, labels, ids, torch.zeros_like(ids)).gradient
    assert gradient.shape == X.shape
    assert gradient.isfinite().all()
    assert gradient.flatten(1).abs().amax(dim=1).min() > 0


@pytest.mark.parametrize("transform", [RT2(8, size=(32, 16)), RandomResizePad(16, 28)], ids=["rt2-up", "pad"])
def test_exact_gradient_goes_through_the_resize(transform):
    """Against finite differences of the loss along the gradient."""
    defense = Defense(transform, *copy.deepcopy(PARTS)).double()
    x, labels, ids = X.double() * 0.5 + 0.25, torch.arange(5), torch.arange(5)
    gradient = GradientEstimator(defense, seed=9)(x, labels, ids, torch.zeros_like(ids)).gradient
    step = 1e-6 * gradient / gradient.norm()
    losses = [F.cross_entropy(defense(x + s, 9, ids, 0), labels, reduction="sum") for s in (step, -step)]
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-6, gradient.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: RT2(5)(X), ValueError, "RT2: x must be of a height and width divisible by patch=5, got 24 x 16"),
        (lambda: RT2(8)(X[0]), ValueError, r"RT2: x must be images of shape \(B, C, H, W\), got \(3, 24, 16\)"),
        (lambda: RT2(8)(X.int()), TypeError, "RT2: x must be a uint8, float32, .* tensor, got torch.int32"),
        (
            lambda: RT2(8, size=20)(X),
            ValueError,
            "RT2: size must be of a height and width divisible by patch=8, got 20",
        ),
        (lambda: RT2(8, size=(8, 0)), ValueError, "RT2: size must be an integer and >= 1, got 0"),
        (lambda: RT2(8, size=8.0), TypeError, "RT2: size must be an integer, got float"),
        (lambda: RT2(8)([0.5]), TypeError, "RT2: x must be a torch.Tensor, got list"),
        (lambda: RT2(8)(X, seed=0.5), TypeError, "RT2: seed must be an integer, got float"),
        (lambda: RT2(8)(X, 0, torch.arange(4)), ValueError, r"RT2: sample_ids must be int64 of shape \(5,\), got"),
        (lambda: RT2(8)(X, draw=-1), ValueError, "RT2: draw must be an integer and in"),
        (lambda: RT3(8, 0), ValueError, r"RT3: copies must be an integer and in \[1, 255\], got 0"),
        (lambda: RT3(8, 256), ValueError, r"RT3: copies must be an integer and in \[1, 255\], got 256"),
        (lambda: RandomResizePad(0, 4), ValueError, "RandomResizePad: min_size must be an integer and >= 1, got 0"),
        (
            lambda: RandomResizePad(5, 4),
            ValueError,
            "RandomResizePad: max_size must be an integer and >= min_size=5, got",
        ),
        (lambda: RandomResizePad(2, 4)(X[0]), ValueError, "RandomResizePad: x must be images of shape"),
        (
            lambda: RandomResizePad(2, 4)(X.int()),
            TypeError,
            "RandomResizePad: x must be a uint8, float32, .* got torch.i",
        ),
        (lambda: RandomResizePad(2, 4)(X, draw=-1), ValueError, "RandomResizePad: draw must be an integer and in"),
        (lambda: RT2(0), ValueError, "RT2: patch must be an integer and >= 1, got 0"),
        (lambda: RT2(8, 1.5), ValueError, r"RT2: mask_ratio must be finite and in \[0, 1\], got 1.5"),
        (
            lambda: RT2(8, (0.5, 0.25)),
            ValueError,
            r"RT2: mask_ratio must be a number, or two with .*, got \(0.5, 0.25\)",
        ),
        (lambda: RT2(8, (0.5,)), ValueError, "RT2: mask_ratio must be a number, or two with the lower one first, got"),
        (lambda: RT2(8, (0, 2)), ValueError, r"RT2: mask_ratio must be finite and in \[0, 1\], got 2"),
        (lambda: build_transform("rt3", 8, (0.2, 0.5), 0.1), TypeError, "mask_ratio must be a number, got tuple"),
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
