"""The gradient estimator: modes, draws, passes, precision, and models with randomness of their own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atop_fast import RT2, RT3, Defense, build_classifier, build_purifier
from atop_fast.attacks import FGSM, PGD, GradientEstimator, Square, counted_passes, draw_logits, passes
from atop_fast.randomness import seeded

with seeded(0):
    CLASSIFIER = build_classifier("small_cnn", channels=1).eval()
    PURIFIER = build_purifier("unet", channels=1, width=4).eval()
    nn.init.normal_(PURIFIER.to_image.weight, std=0.1)
DEFENSE = Defense(RT2(4, sigma=0.1), PURIFIER, CLASSIFIER)
X = torch.rand(11, 1, 16, 16, generator=torch.Generator().manual_seed(1))
Y = torch.arange(11) % 10
IDS = torch.arange(11)


class Spy(nn.Module):
    """A classifier that notes the sizes of its batches."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return CLASSIFIER(x)


def estimate(defense, mode="exact", t=0, **options):
    return GradientEstimator(defense, mode, seed=3, **options)(X, Y, IDS, torch.full_like(IDS, t))


def test_checkpointed_is_exact():
    for transform in (RT2(4, sigma=0.1), RT3(4, copies=4, sigma=0.1)):
        defense = Defense(transform, PURIFIER, CLASSIFIER)
        whole, twice = estimate(defense, eot_iter=3), estimate(defense, "checkpointed", eot_iter=3)
        for a, b in zip(whole, twice, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_bpda_with_a_substitute_follows_the_substitute():
    def blur(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1)

    purified = DEFENSE.purify(X, 3, IDS, 0).detach()
    leaf = X.clone().requires_grad_()
    stand_in = blur(leaf)
    loss = F.cross_entropy(CLASSIFIER(purified + stand_in - stand_in.detach()), Y, reduction="sum")
    (expected,) = torch.autograd.grad(loss, leaf)
    mine = estimate(DEFENSE, "bpda", substitute=blur)
    torch.testing.assert_close(mine.gradient, expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(mine.gradient, estimate(DEFENSE, "bpda").gradient)


def test_loss_and_correct_are_means_over_the_draws():
    logits = draw_logits(DEFENSE, X, 3, IDS, range(8, 12))
    expected = F.cross_entropy(logits.flatten(0, 1), Y.repeat_interleave(4), reduction="none").view(11, 4).mean(dim=1)
    mine = estimate(DEFENSE, eot_iter=4, t=2)
    torch.testing.assert_close(mine.loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine.correct, (logits.argmax(dim=2) == Y[:, None]).float().mean(dim=1))
    alone = GradientEstimator(DEFENSE, eot_iter=4, seed=3).evaluate(X, Y, IDS, torch.full_like(IDS, 2))
    assert alone.gradient is None
    torch.testing.assert_close(alone.loss, mine.loss)
    torch.testing.assert_close(alone.correct, mine.correct)


def test_every_row_has_its_own_iteration():
    t = torch.arange(11) % 4
    together = GradientEstimator(DEFENSE, eot_iter=2, seed=3)(X, Y, IDS, t)
    for i in range(4):
        alone = estimate(DEFENSE, eot_iter=2, t=i)
        for mine, other in zip(together, alone, strict=True):
            assert torch.equal(mine[t == i], other[t == i])


@pytest.mark.parametrize("eot_iter", [1, 5, 40])
def test_no_pass_is_larger_than_allowed_and_all_are_multiples_of_eight(eot_iter):
    spy = Spy()
    estimate(Defense(RT2(4), None, spy), eot_iter=eot_iter, max_batch=20)
    assert max(spy.sizes) <= 16
    assert {size % 8 for size in spy.sizes} == {0}
    # Nothing but the last pass is filled up.
    assert sum(spy.sizes) == -(-11 * eot_iter // 8) * 8


class Wide(nn.Module):
    """Saves `copies` times the image for its backward pass; its weights, shared by all rows, do not count."""

    def __init__(self, copies):
        super().__init__()
        self.copies, self.linear = copies, nn.Linear(256, 10)

    def forward(self, x):
        return self.linear(torch.tanh(x.flatten(1).repeat(1, self.copies)).view(len(x), self.copies, -1).mean(dim=1))


@pytest.mark.parametrize(("copies", "rows"), [(1, 1024), (4096, 248)])
def test_memory_sets_the_passes(copies, rows):
    """4096 copies of 1 KiB each, beside little else, fit 255 times into 1 GiB."""
    estimator = GradientEstimator(Wide(copies))
    estimator(X[:8], Y[:8], IDS[:8], torch.zeros(8, dtype=torch.int64))
    assert estimator._rows == rows


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.2), ("float16", 0.05)])
def test_lower_precision_for_the_networks_alone(precision, tolerance):
    exact, low = estimate(DEFENSE), estimate(DEFENSE, precision=precision)
    assert low.gradient.dtype == low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss, exact.loss, rtol=tolerance, atol=tolerance)
    assert F.cosine_similarity(low.gradient.flatten(), exact.gradient.flatten(), dim=0) > 1 - tolerance


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_steps_that_add_up_draws_are_the_same_for_any_passes(norm):
    """If one pass holds all draws, the step op adds them up, otherwise the estimator does: the same bits."""
    whole = PGD(DEFENSE, 0.2, norm=norm, steps=4, eot_iter=7)(X, Y, IDS)
    for max_batch in (8, 24, 64):
        assert torch.equal(PGD(DEFENSE, 0.2, norm=norm, steps=4, eot_iter=7, max_batch=max_batch)(X, Y, IDS), whole)


def test_passes_are_counted():
    with counted_passes() as passes:
        PGD(DEFENSE, steps=3, eot_iter=2)(X[:8], Y[:8])
        draw_logits(DEFENSE, X[:8], 0, IDS[:8], range(5))
    # Eight more in which the estimator finds out how much a row saves.
    assert (passes.forward, passes.backward) == (8 * (3 * 2 + 5) + 8, 8 * 3 * 2)


def test_a_model_without_gradients_can_be_asked_for_logits():
    def model(x):
        return torch.from_numpy(x.flatten(1)[:, :10].numpy())

    logits = GradientEstimator(model).logits(X, IDS, torch.zeros_like(IDS))
    assert torch.equal(logits[:, 0], X.flatten(1)[:, :10])
    adversarial = Square(model, eps=0.1, n_queries=8)(X, Y)
    assert (adversarial - X).abs().max() <= 0.1 + 1e-6


class GlobalNoise(nn.Module):
    """A random classifier that draws from torch's global generator."""

    def forward(self, x):
        return CLASSIFIER((x + 0.3 * torch.randn_like(x)).clamp(0, 1))


def test_a_model_with_its_own_randomness_is_seeded_and_the_generator_restored():
    state = torch.get_rng_state()
    first = draw_logits(GlobalNoise(), X, 5, IDS, range(4))
    adversarial = PGD(GlobalNoise(), eps=0.1, steps=3, eot_iter=2)(X, Y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(draw_logits(GlobalNoise(), X, 5, IDS, range(4)), first)
    assert torch.equal(PGD(GlobalNoise(), eps=0.1, steps=3, eot_iter=2)(X, Y), adversarial)
    assert not torch.equal(draw_logits(GlobalNoise(), X, 6, IDS, range(4)), first)
    # Repeated calls are different draws.
    assert not torch.equal(first[:, 0], first[:, 1])


def test_the_generator_is_restored_after_an_error():
    def fail(x):
        torch.rand(1)
        raise KeyError

    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        FGSM(fail)(X, Y)
    assert torch.equal(torch.get_rng_state(), state)


def test_early_stop_finds_the_flags_of_any_iterate():
    """Images that leave early, and cycles that end others, change nothing in who is fooled at some step."""
    eps, steps = 0.03, 60
    x, fooled = X.clone(), torch.zeros(11, dtype=torch.bool)
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        logits = CLASSIFIER(leaf)
        (g,) = torch.autograd.grad(F.cross_entropy(logits, Y, reduction="sum"), leaf)
        fooled |= logits.argmax(dim=1) != Y
        x = (x + 0.01 * g.sign()).clamp(X - eps, X + eps).clamp(0, 1)
    fooled |= CLASSIFIER(x).argmax(dim=1) != Y
    with counted_passes() as passes:
        adversarial = PGD(CLASSIFIER, eps=eps, alpha=0.01, steps=steps, random_start=False, early_stop=True)(X, Y)
    assert torch.equal(CLASSIFIER(adversarial).argmax(dim=1) != Y, fooled)
    assert passes.backward < 11 * steps / 2


def test_early_stop_is_refused_for_a_random_defense():
    with pytest.raises(ValueError, match="PGD: early_stop must be False for a Defense"):
        PGD(DEFENSE, early_stop=True)


@pytest.mark.parametrize(("free", "total", "room"), [(130, 140, 17.5), (20, 140, 11), (2, 16, 2), (0, 4, 1)])
def test_a_gpu_gives_passes_a_share_of_its_memory(free, total, room, monkeypatch):
    """An eighth of the total, at most half of free and cached memory, and at least as much as on a CPU."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * gib, total * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 * gib)
    assert passes.room(torch.device("cuda", 0)) == room * gib
    assert passes.room(torch.device("cpu")) == gib
