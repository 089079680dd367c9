"""FGSM and PGD: the ball, oracles, gradient modes, EOT, and what must stay as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atop_fast import FGSM, PGD, RT2, Defense, build_classifier, build_purifier
from atop_fast.attacks import GradientEstimator, draw_logits, frozen
from atop_fast.attacks.base import better_candidate
from atop_fast.attacks.queue import Batch
from atop_fast.randomness import seeded

with seeded(0):
    CLASSIFIER = build_classifier("small_cnn", channels=1).eval()
    PURIFIER = build_purifier("unet", channels=1, width=4).eval()
# In evaluation mode: torchattacks puts a model back into its own mode with all of its parts.
DEFENSE = Defense(RT2(4, sigma=0.1), PURIFIER, CLASSIFIER).eval()
X = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, 5])


def distance(adversarial, norm):
    delta = (adversarial - X).flatten(1)
    return (delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)).max()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("model", [CLASSIFIER, DEFENSE], ids=["classifier", "defense"])
def test_stays_in_ball_and_range(norm, restarts, model):
    eps = 0.1 if norm == "Linf" else 0.7
    adversarial = PGD(model, eps, norm=norm, steps=3, n_restarts=restarts, eot_iter=2)(X, Y)
    assert 0 < distance(adversarial, norm) <= eps * (1 + 1e-5)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_zero_eps_is_identity(norm):
    torch.testing.assert_close(PGD(DEFENSE, 0.0, norm=norm, steps=2)(X, Y), X, rtol=0, atol=1e-7)


def test_fgsm_equals_torchattacks():
    torchattacks = pytest.importorskip("torchattacks")
    expected = torchattacks.FGSM(CLASSIFIER, eps=0.05)(X, Y)
    assert torch.equal(FGSM(CLASSIFIER, eps=0.05)(X, Y), expected)


def test_pgd_equals_torchattacks():
    torchattacks = pytest.importorskip("torchattacks")
    expected = torchattacks.PGD(CLASSIFIER, eps=0.05, alpha=0.02, steps=7, random_start=False)(X, Y)
    ours = PGD(CLASSIFIER, eps=0.05, alpha=0.02, steps=7, random_start=False)(X, Y)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_pgd_l2_equals_torchattacks():
    torchattacks = pytest.importorskip("torchattacks")
    expected = torchattacks.PGDL2(CLASSIFIER, eps=0.5, alpha=0.2, steps=7, random_start=False)(X, Y)
    ours = PGD(CLASSIFIER, norm="L2", eps=0.5, alpha=0.2, steps=7, random_start=False)(X, Y)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_torchattacks_attacks_a_defense():
    torchattacks = pytest.importorskip("torchattacks")
    adversarial = torchattacks.EOTPGD(DEFENSE, eps=0.1, steps=2, eot_iter=2)(X, Y)
    assert 0 < distance(adversarial, "Linf") <= 0.1 + 1e-6


def test_exact_gradient_is_autograd_averaged_over_draws():
    x, ids, total = X.clone().requires_grad_(), torch.arange(6), 0
    for draw in range(4, 8):
        total = total + F.cross_entropy(DEFENSE(x, 9, ids, draw), Y, reduction="sum")
    (expected,) = torch.autograd.grad(total / 4, x)
    estimate = GradientEstimator(DEFENSE, eot_iter=4, seed=9)(X, Y, ids, torch.ones_like(ids))
    torch.testing.assert_close(estimate.gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("max_batch", [1, 6, 12, 18, 1000])
def test_chunks_of_draws_give_the_same_gradient(max_batch):
    ids = torch.arange(6)
    expected = GradientEstimator(DEFENSE, eot_iter=5, seed=9)(X, Y, ids, 0 * ids)
    estimate = GradientEstimator(DEFENSE, eot_iter=5, max_batch=max_batch, seed=9)(X, Y, ids, 0 * ids)
    for part, whole in zip(estimate, expected, strict=True):
        assert torch.equal(part, whole)
    logits = draw_logits(DEFENSE, X, 9, ids, range(5))
    assert torch.equal(draw_logits(DEFENSE, X, 9, ids, range(5), max_batch), logits)


def test_bpda_takes_the_purifier_as_identity():
    purified = DEFENSE.purify(X, 9, None, 0).detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(CLASSIFIER(purified), Y, reduction="sum"), purified)
    estimate = GradientEstimator(DEFENSE, "bpda", seed=9)(X, Y, torch.arange(6), torch.zeros_like(Y))
    torch.testing.assert_close(estimate.gradient, expected, rtol=1e-4, atol=1e-7)


def test_blind_is_the_attack_on_the_classifier():
    blind = PGD(DEFENSE, eps=0.1, steps=3, gradient="blind", eot_iter=8)(X, Y)
    assert torch.equal(blind, PGD(CLASSIFIER, eps=0.1, steps=3)(X, Y))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_result_belongs_to_the_sample(norm):
    attack = PGD(DEFENSE, 0.1, norm=norm, steps=2, n_restarts=2)
    ids = torch.arange(6)
    whole = attack(X, Y, ids)
    parts = torch.cat([attack(X[i : i + 1], Y[i : i + 1], ids[i : i + 1]) for i in range(6)])
    assert torch.equal(whole, parts)


def test_more_steps_and_restarts_raise_the_loss():
    def loss(adversarial):
        return F.cross_entropy(CLASSIFIER(adversarial), Y)

    one, many = FGSM(CLASSIFIER, eps=0.1)(X, Y), PGD(CLASSIFIER, eps=0.1, steps=20)(X, Y)
    assert loss(X) < loss(one) <= loss(many) <= loss(PGD(CLASSIFIER, eps=0.1, steps=20, n_restarts=4)(X, Y)) + 1e-6


def test_restart_choice_minimizes_accuracy_first():
    """Two constructed candidates: fewer correct draws win over a larger loss."""

    def model(x):
        right = F.one_hot(Y[:1], 10) * x.mean()
        return right + F.one_hot(Y[1:2], 10) * 0.5

    attack = PGD(model, n_restarts=2)
    ids, candidates = torch.zeros(1, dtype=torch.int64), [torch.full((1, 1, 2, 2), v) for v in (0.9, 0.1)]
    judge = attack.judge(attack.estimator(model))
    robust, fooled = (attack.rank(judge, x, Batch(x, Y[:1], ids)) for x in candidates)
    assert better_candidate(*fooled, *robust)
    assert not better_candidate(*robust, *fooled)


def test_model_state_is_restored_also_after_an_error():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(10))
    model(X)
    model[0].weight.requires_grad_(False)
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def fail():
        with frozen(model):
            assert not any(p.requires_grad for p in model.parameters())
            assert not any(m.training for m in model.modules())
            raise KeyError

    PGD(model, steps=2)(X, Y)
    with pytest.raises(KeyError):
        fail()
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_inputs_and_global_generator_are_untouched():
    x, state = X.clone(), torch.get_rng_state()
    PGD(DEFENSE, steps=2, n_restarts=2)(x, Y)
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_gradients_leave_valid_images():
    for norm in ("Linf", "L2"):
        adversarial = PGD(lambda x: x.flatten(1) * float("nan"), 0.1, norm=norm, steps=2)(X, Y)
        assert adversarial.isfinite().all()
        assert distance(adversarial, norm) <= 0.1 + 1e-6


def test_empty_batch():
    assert PGD(DEFENSE)(X[:0], Y[:0]).shape == (0, 1, 16, 16)


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: PGD(CLASSIFIER, norm="L3"), ValueError, "PGD: norm must be one of 'Linf', 'L2', got 'L3'"),
        (lambda: PGD(CLASSIFIER, eps=-0.1), ValueError, r"PGD: eps must be finite and in \[0, 1e\+06\], got -0.1"),
        (lambda: FGSM(CLASSIFIER, eps=float("nan")), ValueError, "FGSM: eps must be finite"),
        (lambda: PGD(CLASSIFIER, steps=0), ValueError, "PGD: steps must be an integer and >= 1, got 0"),
        (lambda: PGD(CLASSIFIER, gradient="bpda"), TypeError, "PGD: gradient 'bpda' needs a Defense, got SmallCNN"),
        (lambda: PGD(CLASSIFIER)(X * 255, Y), ValueError, r"PGD: images must be in \[0, 1\], got values in"),
        (lambda: PGD(CLASSIFIER)(X / 0, Y), ValueError, "PGD: images must be finite, got NaN or infinity"),
        (lambda: PGD(CLASSIFIER)(X, Y[:2]), ValueError, r"PGD: labels must be of shape \(6,\)"),
        (lambda: PGD(CLASSIFIER)(X, Y.float()), TypeError, "PGD: labels must be an int64 tensor, got torch.float32"),
        (lambda: PGD(CLASSIFIER)("x", Y), TypeError, "PGD: images must be a torch.Tensor, got str"),
    ],
)
def test_wrong_input_is_named(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()
