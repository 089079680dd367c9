"""Random defenses of the literature: formulas, keyed draws, gradients, files, attacks and verdicts."""

from __future__ import annotations

import functools
import io
import itertools
import math
import re
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from atop_fast import Defense, build_classifier, build_purifier, evaluate, load_defense, save_defense
from atop_fast.attacks import GradientEstimator, frozen
from atop_fast.classifiers import Normalized, Resized
from atop_fast.defense import with_fixed_randomness
from atop_fast.defenses import (
    JPEG,
    ActivationPruning,
    FilterDraw,
    GaussianNoise,
    NoisyBilateral,
    RandomSeries,
    SelfEnsemble,
    TotalVariation,
    WinnersTakeAll,
    bilateral_filter,
    majority_vote,
    mean_logits,
    series,
)
from atop_fast.defenses.noise import p_value
from atop_fast.defenses.smooth import smoothed, variation_gradient
from atop_fast.evaluation import quick_attacks
from atop_fast.ops import random_normal
from atop_fast.randomness import derive_seed, seeded, watched_generators
from atop_fast.transforms import TRANSFORMS

RANDOM = torch.Generator().manual_seed(1)
X = torch.rand(5, 3, 12, 9, generator=RANDOM)
IDS = torch.tensor([4, 9, 2, 7, 2**40])
DRAWS = torch.tensor([1, 0, 5, 5, 2])
TRANSFORM = {
    "noise": GaussianNoise(0.1),
    "series": RandomSeries(7),
    "bilateral": NoisyBilateral(0.1, repeats=2),
    "filters": FilterDraw(3),
    "jpeg": JPEG((30, 90)),
    "variation": TotalVariation(steps=4),
}
WRAPPED = {
    "ensemble": lambda model: SelfEnsemble(model, 0.1, 0.05),
    "pruning": lambda model: ActivationPruning(model, 0.8),
    "winners": lambda model: WinnersTakeAll(model, 0.2),
}
EVERY = [*TRANSFORM, *WRAPPED]


@pytest.fixture(scope="module")
def classifier():
    with seeded(0):
        return build_classifier("small_cnn", channels=3, width=4).eval()


@pytest.fixture(scope="module")
def filters():
    with seeded(0):
        return build_purifier("residual_filters", count=3).eval()


def defense(name, classifier, filters):
    """A Defense of each kind."""
    if name in WRAPPED:
        return Defense(GaussianNoise(0), None, WRAPPED[name](classifier)).eval()
    return Defense(TRANSFORM[name], filters if name == "filters" else None, classifier).eval()


class Plain(nn.Module):
    """Two convolutions and three activations in three spellings; float64."""

    def __init__(self):
        super().__init__()
        with seeded(3):
            self.first, self.second = nn.Conv2d(2, 3, 3, dtype=torch.float64), nn.Conv2d(3, 4, 2, dtype=torch.float64)
            self.linear = nn.Linear(4, 3, dtype=torch.float64)
        self.inplace = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.first(x)
        self.inplace(h)
        h = F.elu(self.second(h))
        return self.linear(torch.relu(h).mean(dim=(2, 3)))


@pytest.mark.parametrize("name", TRANSFORM)
def test_a_draw_belongs_to_the_sample(name):
    transform = TRANSFORM[name]
    with watched_generators() as generators:
        whole = transform(X, 7, IDS, DRAWS)
    assert not generators.drawn
    assert whole.shape == (5, 5, 12, 9)
    assert (whole[:, 3] == 1).all()
    for i in range(5):
        assert torch.equal(transform(X[i : i + 1], 7, IDS[i : i + 1], int(DRAWS[i])), whole[i : i + 1])
    order = torch.tensor([3, 1, 0, 4, 2])
    assert torch.equal(transform(X[order], torch.tensor(7), IDS[order], DRAWS[order]), whole[order])
    assert not torch.equal(transform(X, 7, IDS, DRAWS + 1), whole)
    assert not torch.equal(transform(X, 8, IDS, DRAWS), whole)
    assert torch.equal(transform.target(X), 2 * X - 1)
    assert transform(X[:0]).shape == (0, 5, 12, 9)


@pytest.mark.parametrize("name", ["noise", "series", "bilateral", "filters", "variation"])
def test_gradcheck_of_transforms(name, filters):
    x = (0.3 + 0.4 * torch.rand(2, 3, 3, 2, dtype=torch.float64, generator=RANDOM)).requires_grad_()
    whole = Defense(TRANSFORM[name], None, nn.Identity()).double()
    if name == "filters":
        with seeded(1):
            whole = Defense(TRANSFORM[name], build_purifier("residual_filters", count=3), nn.Identity()).double()
    if name == "series":
        # Noise and contrast must not reach the clip, which has kinks.
        x = (0.5 + 0.2 * (x.detach() - 0.5)).requires_grad_()
    for draw in range(2):
        assert torch.autograd.gradcheck(lambda x, draw=draw: whole.purify(x, 1, draw=draw), x, atol=1e-4)


def test_noise_is_that_of_the_formula():
    n = random_normal((3, 12, 9), 7, IDS, DRAWS)
    purified = Defense(GaussianNoise(0.3), None, nn.Identity())(X.double(), 7, IDS, DRAWS)
    torch.testing.assert_close(purified, X.double() + 0.3 * n.double(), rtol=0, atol=1e-12)


def test_majority_vote_decides_what_the_binomial_test_does():
    scipy = pytest.importorskip("scipy.stats")
    for of in (1, 7, 100):
        for votes in range((of + 1) // 2, of + 1):
            assert p_value(votes, of) == pytest.approx(scipy.binomtest(votes, of).pvalue, rel=1e-9)

    class Sign(nn.Module):
        def forward(self, x):
            return torch.stack((-x[:, 0, 0, 0], x[:, 0, 0, 0] - 1, torch.full_like(x[:, 0, 0, 0], -9)), dim=1)

    x = torch.tensor([0.5, 0.9, 0.1, 0.51]).view(4, 1, 1, 1)
    whole = Defense(GaussianNoise(0.1), None, Sign())
    assert majority_vote(whole, x, draws=200).tolist() == [-1, 1, 0, -1]
    votes = majority_vote(whole, x, 9, 1.0, seed=5)
    assert torch.equal(majority_vote(whole, x[2:], 9, 1.0, 5, torch.arange(2, 4)), votes[2:])
    for count in (3, 9):
        with pytest.raises(ValueError, match=r"majority_vote: sample_ids must be int64 of shape \(4,\)"):
            majority_vote(whole, x, 9, sample_ids=torch.arange(count))
    with pytest.raises(TypeError, match="majority_vote: defense must be a Defense, got Sign"):
        majority_vote(Sign(), x)
    start = time.process_time()
    assert p_value(10_100, 20_000) == pytest.approx(0.1594, abs=1e-4)
    assert time.process_time() - start < 5
    odd = Defense(GaussianNoise(0), None, Sign())
    odd.classifier.forward = lambda x: torch.where(x[:, 0, 0] == x[3, 0, 0], torch.nan, x[:, 0, 0]).expand(-1, 2)
    with pytest.raises(ValueError, match=r"without NaN in its logits, got NaN for 1 of 4 images, .* images\[3\]"):
        majority_vote(odd, x, 2)


def test_bilateral_filter_is_that_of_the_formula():
    x = torch.rand(1, 2, 5, 4, dtype=torch.float64, generator=RANDOM)
    y, radius, space, color = bilateral_filter(x, 2, 1.5, 0.2), 2, 1.5, 0.2
    for i, j in ((0, 0), (2, 1), (4, 3)):
        total, weights = torch.zeros(2, dtype=torch.float64), 0.0
        for di in range(-radius, radius + 1):
            for dj in range(-radius, radius + 1):
                q = x[0, :, min(max(i + di, 0), 4), min(max(j + dj, 0), 3)]
                d = float((q - x[0, :, i, j]).square().sum())
                w = math.exp(-(di**2 + dj**2) / (2 * space**2) - d / (2 * color**2))
                total, weights = total + w * q, weights + w
        torch.testing.assert_close(y[0, :, i, j], total / weights, rtol=0, atol=1e-14)


def test_jpeg_is_that_of_a_codec():
    """Images that a codec made are its fixed points, and on others it errs by much less than the codec loses.

    A codec rounds colors and pixels to integers, too, which changes a few coefficients by a whole step.
    """
    image = pytest.importorskip("PIL.Image")
    pixels = F.interpolate(torch.rand(1, 3, 12, 12, generator=RANDOM), (24, 19), mode="bicubic").clamp(0, 1)
    levels = (75 + 105 * pixels).round().to(torch.uint8)

    def ours(t, quality):
        return 255 * (JPEG(quality)(t)[:, :3].double() + 1) / 2

    for quality in (10, 50):
        buffer = io.BytesIO()
        given = image.fromarray(levels[0].permute(1, 2, 0).numpy())
        given.save(buffer, "jpeg", quality=quality, subsampling=0)
        theirs = torch.from_numpy(np.array(image.open(buffer))).permute(2, 0, 1)[None]
        loss = (theirs.double() - levels).abs().mean()
        assert loss > 3
        assert (ours(levels, quality) - theirs).abs().mean() < 0.35 * loss
        # Whole blocks: a decoder crops what a coder has put beside the others.
        assert (ours(theirs[..., :16], quality) - theirs[..., :16]).abs().mean() < 0.75


def test_jpeg_has_the_gradient_of_its_surrogate():
    """Rounding counts as the identity, so that the round trip does wherever it does not clip."""
    x = (0.3 + 0.4 * torch.rand(2, 3, 9, 16, dtype=torch.float64, generator=RANDOM)).requires_grad_()
    y = (JPEG((60, 90))(x)[:, :3] + 1) / 2
    assert ((y > 0) & (y < 1)).all()
    assert (y - x).abs().max() > 0.02
    upstream = torch.rand(y.shape, dtype=torch.float64, generator=RANDOM)
    # The rows and columns that fill the last blocks repeat the border, and are cut off again.
    torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], upstream, rtol=0, atol=1e-4)


def test_variation_is_minimized():
    x = torch.rand(2, 1, 6, 5, dtype=torch.float64, generator=RANDOM)
    kept = (torch.rand(x.shape, generator=RANDOM) > 0.4).double()

    def objective(z, weight=0.05, smooth=0.02):
        variation = 0.0
        for i in range(6):
            for j in range(5):
                down = z[:, :, i + 1, j] - z[:, :, i, j] if i < 5 else 0
                right = z[:, :, i, j + 1] - z[:, :, i, j] if j < 4 else 0
                variation = variation + (down**2 + right**2 + torch.tensor(smooth**2)).sqrt().sum()
        return 0.5 * (kept * (z - x) ** 2).sum() + weight * variation

    z = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(objective(z), z)
    ours = kept * (x - x) + 0.05 * variation_gradient(x, 0.02)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)
    z = smoothed(x, kept, 0.05, 3000, 0.02).requires_grad_()
    assert torch.autograd.grad(objective(z), z)[0].abs().max() < 1e-3
    changed = torch.where(kept > 0, x, 0.123)
    assert torch.equal(smoothed(changed, kept, 0.05, 9, 0.02), smoothed(x, kept, 0.05, 9, 0.02))


def test_swirl_is_that_of_scikit_image():
    """Its mapping, written with an arc tangent, and a bilinear value by hand."""
    x = torch.rand(1, 1, 9, 7, dtype=torch.float64, generator=RANDOM)
    u = torch.tensor([[0.7, 0.6, 0.45, 0.55]], dtype=torch.float64)
    y = series.swirl(x, u, None)
    strength, radius = 0.01 + 1.99 * 0.7, (0.05 + 0.85 * 0.6) * 9 * math.log(2) / 5
    for i, j in ((4, 3), (3, 3), (4, 5)):
        down, right = i + 0.5 - 0.45 * 9, j + 0.5 - 0.55 * 7
        rho = math.hypot(down, right)
        theta = strength * math.exp(-rho / radius) + math.atan2(down, right)
        row, column = 0.45 * 9 + rho * math.sin(theta) - 0.5, 0.55 * 7 + rho * math.cos(theta) - 0.5
        a, b = math.floor(row), math.floor(column)
        s, t = row - a, column - b
        expected = (1 - s) * ((1 - t) * x[0, 0, a, b] + t * x[0, 0, a, b + 1])
        expected += s * ((1 - t) * x[0, 0, a + 1, b] + t * x[0, 0, a + 1, b + 1])
        torch.testing.assert_close(y[0, 0, i, j], expected, rtol=0, atol=1e-12)


def test_steps_of_the_series():
    x = torch.rand(2, 3, 20, 20, dtype=torch.float64, generator=RANDOM)
    u = torch.rand(2, 4, dtype=torch.float64, generator=RANDOM)
    # One pixel cut off each side.
    zoomed = series.zoom(x, torch.full((2, 4), 1 / 3, dtype=torch.float64), None)
    expected = F.interpolate(x[:, :, 1:-1, 1:-1], (20, 20), mode="bilinear", align_corners=False)
    torch.testing.assert_close(zoomed[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], rtol=0, atol=1e-9)
    # To YUV, plus a constant, and back.
    yuv = torch.tensor([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]]).double()
    shift = torch.einsum("dc,bchw->bdhw", yuv, series.color(x, u, None) - x)
    torch.testing.assert_close(shift, (0.1 * u[:, :3] - 0.05)[:, :, None, None].expand_as(shift), rtol=0, atol=1e-4)
    grayed = series.gray(x, torch.cat((u[:, :3], torch.ones(2, 1)), dim=1), None)
    torch.testing.assert_close(grayed[:, 0], grayed[:, 2], rtol=0, atol=1e-12)
    changed = series.contrast(x, u, None)
    torch.testing.assert_close(changed.mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        changed.std(dim=(1, 2, 3)) / x.std(dim=(1, 2, 3)), 0.7 + 0.6 * u[:, 0], rtol=0, atol=1e-12
    )
    sigma = 0.2 + 0.8 * u[0, 0]
    weights = torch.exp(-(torch.arange(-2.0, 3).double() ** 2) / (2 * sigma**2))
    kernel = (torch.outer(weights, weights).expand(3, 1, 5, 5) / weights.sum() ** 2).double()
    expected = F.conv2d(F.pad(x[:1], (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    torch.testing.assert_close(series.blur(x[:1], u[:1], None), expected, rtol=0, atol=1e-9)


def test_the_series_draws_numbers_and_orders_evenly(monkeypatch):
    """Within 5 sigma: 0 to 3 transforms, and each pair in both orders."""
    steps = [lambda x, u, key, k=k: 0.5 * x + 2.0**-k * 0.25 for k in range(7)]
    monkeypatch.setattr(series, "STEPS", tuple(steps))
    values = (RandomSeries(3)(torch.zeros(4096, 1, 1, 1))[:, 0, 0, 0] + 1) / 2
    chances = Counter({0: 0.25})
    for count in range(1, 4):
        for order in itertools.permutations(range(7), count):
            value = 0.0
            for k in order:
                value = 0.5 * value + 2.0**-k * 0.25
            chances[int(1024 * value)] += 0.25 / math.perm(7, count)
    seen = Counter((1024 * values).long().tolist())
    assert seen.keys() <= chances.keys()
    for value, chance in chances.items():
        assert abs(seen[value] - 4096 * chance) < 5 * math.sqrt(4096 * chance) + 3, value


def test_one_filter_is_drawn_and_all_can_be_averaged(classifier):
    with seeded(2):
        bank = build_purifier("residual_filters").eval()
    assert sum(p.numel() for p in (*bank.first[0].parameters(), *bank.second[0].parameters())) == 883
    whole = Defense(FilterDraw(), bank, classifier).eval()
    numbers = FilterDraw()(X[:1, :, :1, :1].expand(4096, -1, -1, -1))[:, -1, 0, 0].long()
    assert (numbers.bincount(minlength=4) - 1024).abs().max() < 5 * math.sqrt(4096 * 3 / 16)
    number = FilterDraw()(X, 7, IDS, DRAWS)[:, -1, 0, 0].long()
    k = int(number[0])
    expected = X[:1] * 2 - 1
    expected = expected + bank.second[k](F.relu(bank.first[k](expected)))
    torch.testing.assert_close(2 * whole.purify(X, 7, IDS, DRAWS)[:1] - 1, expected, rtol=0, atol=1e-5)
    draws = {int(n): whole(X[:1], 7, draw=d) for d in range(40) for n in FilterDraw()(X[:1], 7, draw=d)[:, -1, 0, 0]}
    mean = torch.stack([draws[k] for k in range(4)]).mean(dim=0)
    torch.testing.assert_close(mean_logits(whole, X[:1]), mean, rtol=0, atol=1e-5)
    # A number without a filter.
    purified = Defense(FilterDraw(16), bank, nn.Identity()).purify(X, 7, IDS, DRAWS)
    drawn = FilterDraw(16)(X, 7, IDS, DRAWS)[:, -1, 0, 0]
    assert torch.equal(purified.isnan().all(dim=(1, 2, 3)), drawn >= 4)
    assert torch.equal(purified.isnan().any(dim=(1, 2, 3)), drawn >= 4)
    assert 0 < (drawn >= 4).sum() < 5
    with pytest.raises(TypeError, match="mean_logits: defense must be a Defense of FilterDraw"):
        mean_logits(Defense(GaussianNoise(), None, classifier), X)


def test_noise_before_every_convolution():
    model, x = Plain(), torch.rand(2, 2, 5, 5, dtype=torch.float64, generator=RANDOM)
    ids, wrapped = torch.tensor([3, 8]), SelfEnsemble(model, 0.3, 0.2)

    def noise(t, place):
        return random_normal(t.shape[1:], derive_seed(5, place), ids, 6).double()

    h = F.relu(model.first(x + 0.3 * noise(x, 0)))
    h = F.elu(model.second(h + 0.2 * noise(h, 1)))
    expected = model.linear(h.relu().mean(dim=(2, 3)))
    torch.testing.assert_close(wrapped(x, 5, ids, 6), expected, rtol=0, atol=1e-12)


def test_winners_take_all_in_every_spelling():
    model, x = Plain(), torch.rand(3, 2, 5, 5, dtype=torch.float64, generator=RANDOM)

    def winners(t):
        result = torch.zeros_like(t)
        for row in range(len(t)):
            for place in t[row].flatten().argsort(descending=True)[: round(0.3 * t[row].numel())]:
                result[row].view(-1)[place] = t[row].reshape(-1)[place]
        return result

    expected = model.linear(winners(winners(model.second(winners(model.first(x))))).mean(dim=(2, 3)))
    with watched_generators() as generators:
        found = WinnersTakeAll(model, 0.3)(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not generators.drawn
    assert torch.equal(WinnersTakeAll(model, 0.3)(x, 4, draw=9), found)
    linear = model.linear(model.second(model.first(x)).mean(dim=(2, 3)))
    torch.testing.assert_close(WinnersTakeAll(nn.Sequential(model), 1.0)(x), linear, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.ReLU6, nn.Hardtanh, nn.SELU, nn.CELU, nn.RReLU, nn.PReLU])
def test_no_activation_is_missed_beside_another(kind):
    """With all winners, every activation function is the identity."""
    first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    activations = [kind()] if kind is nn.PReLU else [kind(), kind(inplace=True)]
    model = nn.Sequential(first, *activations, nn.Flatten()).eval()
    assert torch.equal(WinnersTakeAll(model, 1.0)(X), first[0](X).flatten(1))


@pytest.mark.parametrize("wrap", [lambda net: WinnersTakeAll(net), lambda net: ActivationPruning(net)])
def test_a_wrapper_inside_another_would_not_get_the_key(wrap, classifier):
    for inner in (SelfEnsemble(classifier), nn.Sequential(SelfEnsemble(classifier))):
        with pytest.raises(ValueError, match="model must be a network without keyed draws, got SelfEnsemble"):
            wrap(inner)
    whole = Defense(GaussianNoise(0), None, SelfEnsemble(WinnersTakeAll(classifier))).eval()
    assert torch.equal(whole(X, 3, draw=1), whole(X, 3, draw=1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_logits(value):
    h, key = torch.rand(2, 6, 1, 1), (torch.tensor(3), torch.arange(2), torch.tensor(1))
    h[:, 2] = value
    for wrapped in (WinnersTakeAll(nn.Identity(), 0.5), ActivationPruning(nn.Identity())):
        assert not wrapped.replace(lambda t: t, h, 0, key)[:, 2].isfinite().any()


def test_pruning_keeps_by_its_probabilities():
    """Frequencies within 5 sigma of 1 - (1 - p)^r, and the scale of what is kept, which makes the mean that of h."""
    h = torch.tensor([0.0, 4.0, 2.0, 1.0, 0.5, -0.5]).double().view(6, 1, 1)
    pruning = ActivationPruning(nn.Identity(), 0.5)
    key = (torch.tensor(3), torch.arange(8192), torch.tensor(1))
    pruned = pruning.replace(lambda t: t, h.expand(8192, -1, -1, -1), 0, key).flatten(1)
    chance = 1 - (1 - h.flatten().abs() / 8) ** 3
    frequency = (pruned != 0).double().mean(dim=0)
    assert ((frequency - chance).abs() <= 5 * (chance * (1 - chance) / 8192).sqrt()).all()
    scaled = h.flatten() / chance
    assert torch.allclose(pruned, torch.where(pruned != 0, scaled, 0.0).nan_to_num())
    # No activation at all, and a single one.
    for values in (torch.zeros(2, 3), torch.tensor([[0.0, 1, 0], [2, 0, 0]])):
        values = values.double()[:, :, None, None].requires_grad_()
        result = pruning.replace(lambda t: t, values, 0, (torch.tensor(3), torch.arange(2), torch.tensor(1)))
        assert torch.equal(result, values)
        assert torch.autograd.grad(result.sum(), values)[0].isfinite().all()


@pytest.mark.parametrize("name", WRAPPED)
def test_gradcheck_of_layers(name):
    model = WRAPPED[name](Plain())
    x = torch.rand(2, 2, 4, 4, dtype=torch.float64, generator=RANDOM).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, 4, draw=2), x, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("name", WRAPPED)
def test_draws_of_layers_belong_to_the_sample(name, classifier, filters):
    whole = defense(name, classifier, filters)
    with watched_generators() as generators, torch.no_grad():
        logits = whole(X, 7, IDS, DRAWS)
        alone = torch.cat([whole(X[i : i + 1], 7, IDS[i : i + 1], int(DRAWS[i])) for i in range(5)])
        order = torch.tensor([3, 1, 0, 4, 2])
        shuffled = whole(X[order], 7, IDS[order], DRAWS[order])
        other = whole(X, 7, IDS, DRAWS + 1)
        counted = [whole(X), whole(X)]
        fixed = with_fixed_randomness(whole, 3)
        known = [fixed(X, 7, IDS, draw) for draw in range(2)]
    assert not generators.drawn
    torch.testing.assert_close(alone, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(shuffled, logits[order], rtol=0, atol=1e-5)
    assert torch.equal(known[0], known[1])
    random = name != "winners"
    assert torch.equal(other, logits) != random
    assert torch.equal(*counted) != random
    assert not torch.equal(classifier(X), logits)
    # Without a key, calls draw from torch's generator, as those of dropout.
    with seeded(1):
        first, second = whole.classifier(X), whole.classifier(X)
    with seeded(1):
        assert torch.equal(whole.classifier(X), first)
    assert torch.equal(second, first) != random


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("mode", ["exact", "checkpointed", "bpda", "blind"])
def test_every_gradient_has_the_draws_of_the_key(name, mode, classifier, filters):
    """The noise in front is 0, so that all modes are the gradient of the wrapped classifier under draws 0 and 1."""
    whole, labels, ids = defense(name, classifier, filters), torch.arange(3), torch.tensor([5, 1, 2])
    count = 1 if mode == "blind" else 2
    x = X[:3].clone().requires_grad_()
    losses = [F.cross_entropy(whole.classifier(x, 7, ids, d), labels, reduction="sum") for d in range(count)]
    (expected,) = torch.autograd.grad(sum(losses) / count, x)
    with frozen(whole), watched_generators() as generators:
        estimate = GradientEstimator(whole, gradient=mode, eot_iter=2, seed=7)(
            X[:3], labels, ids, torch.zeros_like(ids)
        )
    assert not generators.drawn
    torch.testing.assert_close(estimate.gradient, expected, rtol=1e-3, atol=1e-6)


def test_networks_whose_layers_would_be_missed_are_refused(classifier):
    class Inside(nn.Module):
        def __init__(self, **how):
            super().__init__()
            self.model, self.how = Plain(), how

        def forward(self, x):
            return checkpoint(self.model, x, **self.how)

    x = torch.rand(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    for reentrant in (True, False):
        with pytest.raises(ValueError, match=r"SelfEnsemble: model must be a network without torch.utils.checkpoint"):
            SelfEnsemble(Inside(use_reentrant=reentrant))(x)
    with pytest.raises(ValueError, match=r"ActivationPruning: model must be a network that calls one of .*relu"):
        ActivationPruning(nn.Flatten())(X)
    with pytest.raises(ValueError, match="keep the batch of 5 images"):
        SelfEnsemble(nn.Sequential(nn.Unflatten(0, (1, 5)), nn.Flatten(1, 2), nn.Conv2d(15, 2, 1)))(X)
    # Checkpoints around the wrapper are not inside of it.
    wrapped = SelfEnsemble(Plain())
    y = checkpoint(wrapped, x, 3, use_reentrant=False)
    gradients = [torch.autograd.grad(z.sum(), x)[0] for z in (y, wrapped(x, 3))]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", EVERY)
def test_a_file_gives_the_defense_back(name, classifier, filters, tmp_path):
    given = defense(name, classifier, filters)
    save_defense(tmp_path / "d.safetensors", given)
    loaded = load_defense(tmp_path / "d.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(X, draw=5), given(X, draw=5))
    assert repr(loaded) == repr(given)


@pytest.mark.parametrize("name", EVERY)
def test_evaluate_judges_it(name, classifier, filters):
    given, x = defense(name, classifier, filters), X[:2, :, :8, :8]
    with torch.no_grad():
        y = given(x, draw=0).argmax(dim=1)
    attacks = functools.partial(quick_attacks, eps=8 / 255, steps=4)
    report = evaluate(given, x, y, attacks=attacks, selection_draws=4, progress=False, diagnostics=())
    assert set(report.attacks) == {"fgsm", "pgd_eot"}
    assert report.settings["draws"] == (1 if name == "winners" else 20)
    # The verdict's draws are those of its key.
    key, ids = derive_seed(0, "verdict", "clean"), torch.arange(2)
    with torch.no_grad():
        right = [given(x, key, ids, draw).argmax(dim=1) == y for draw in range(report.settings["draws"])]
    assert report.clean.mean == pytest.approx(torch.stack(right).double().mean().item())


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: GaussianNoise(-1), "GaussianNoise: sigma must be finite and >= 0, got -1"),
        (lambda: RandomSeries(8), r"RandomSeries: most must be an integer and in \[1, 7\], got 8"),
        (lambda: JPEG((90, 40)), r"JPEG: quality must be an integer and in \[90, 100\], got 40"),
        (lambda: JPEG((1, 2, 3)), r"JPEG: quality must be a number or two, \(low, high\), got \(1, 2, 3\)"),
        (lambda: bilateral_filter(X, 0, 1, 0.1), "bilateral_filter: radius must be an integer and >= 1, got 0"),
        (lambda: bilateral_filter(X, 1, 1, 0), "bilateral_filter: sigma_color must be finite and >= 0.001, got 0"),
        (lambda: bilateral_filter(X[0], 1, 1, 0.1), "bilateral_filter: x must be images of shape"),
        (lambda: JPEG()(X[:, :2]), "JPEG: x must be images of one channel or three"),
        (lambda: TotalVariation(drop=1), "TotalVariation: drop must be"),
        (lambda: NoisyBilateral(radius=0), "NoisyBilateral: radius must be"),
        (lambda: WinnersTakeAll(nn.ReLU(), 2), "WinnersTakeAll: ratio must be"),
        (lambda: build_purifier("residual_filters")(X), "ResidualFilters: z must be of 5 channels"),
    ],
)
def test_bad_arguments_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_a_transform_of_ones_own_is_shown_by_its_attributes():
    class Own(GaussianNoise):
        def __init__(self, deviation=0.5):
            super().__init__(deviation / 2)

    assert repr(Own()) == "Own(sigma=0.25)"


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "defenses.md").read_text(encoding="utf-8")
    first, code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) < 60
    exec(first, {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atop_fast.transforms.TRANSFORMS", TRANSFORMS.copy())
    names = {}
    with warnings.catch_warnings():
        # An untrained classifier gives the doctor reasons to warn.
        warnings.simplefilter("ignore")
        exec(compile(code, "own.py", "exec"), names)
    assert names["report"].settings["draws"] == 20
    assert repr(load_defense("mine.safetensors").transform) == "Blocks(size=4, sigma=0.1)"


@pytest.mark.parametrize("wrap", [lambda net: Normalized(net, [0.5], [0.5]), lambda net: Resized(net, 16)])
def test_no_wrapper_keeps_a_key_from_its_classifier(wrap):
    network = build_classifier("small_cnn", channels=1, classes=3)
    SelfEnsemble(wrap(network))
    with pytest.raises(ValueError, match="a network without keyed draws: SelfEnsemble"):
        wrap(SelfEnsemble(network))
