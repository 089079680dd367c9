"""PGD's momentum and cosine steps: against a plain loop, and what they are for."""

from __future__ import annotations

import math

import pytest
import torch
from small_task import places, trained_classifier

from atop_fast import PGD, RT2, Defense
from atop_fast.attacks import GradientEstimator, counted_passes, draw_logits, frozen

EPS = {"Linf": 0.1, "L2": 1.0}
X, Y = places(24, seed=7)
IDS = torch.arange(24) + 5
DEFENSE = Defense(RT2(2, sigma=0.3), None, trained_classifier()).eval()


def plain(norm, steps, draws, momentum, alpha, schedule):
    """The loop as the docstring has it, over the estimator's averaged gradients."""
    with frozen(DEFENSE), torch.no_grad():
        estimator = GradientEstimator(DEFENSE, eot_iter=draws, seed=0)
        x, m = X.clone(), torch.zeros_like(X)
        for t in range(steps):
            g = estimator(x, Y, IDS, torch.full_like(IDS, t)).gradient
            g = g / g.abs().mean(dim=(1, 2, 3), keepdim=True)
            m = momentum * m + g
            size = alpha * ((1 + math.cos(math.pi * t / steps)) / 2 if schedule == "cosine" else 1)
            if norm == "Linf":
                x = (x + size * m.sign()).clamp(X - EPS[norm], X + EPS[norm]).clamp(0, 1)
            else:
                delta = x + size * m / m.flatten(1).norm(dim=1)[:, None, None, None] - X
                length = delta.flatten(1).norm(dim=1)[:, None, None, None]
                x = (X + delta * (EPS[norm] / length).clamp(max=1)).clamp(0, 1)
    return x


@pytest.mark.parametrize("norm", list(EPS))
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("momentum", "schedule"), [(0.9, "cosine"), (0.5, "constant"), (0.0, "cosine")])
def test_equals_a_plain_loop(norm, draws, momentum, schedule):
    options = {"momentum": momentum, "schedule": schedule}
    attack = PGD(DEFENSE, EPS[norm], 0.4 * EPS[norm], 6, False, norm=norm, eot_iter=draws, **options)
    expected = plain(norm, 6, draws, momentum, 0.4 * EPS[norm], schedule)
    torch.testing.assert_close(attack(X, Y, IDS), expected, rtol=0, atol=1e-5)


def test_defaults():
    assert PGD(DEFENSE, eps=0.1, steps=10).alpha == pytest.approx(0.025)
    assert PGD(DEFENSE, eps=0.1, steps=10, schedule="cosine").alpha == pytest.approx(0.1)
    plain_pgd = PGD(DEFENSE, eps=0.1, steps=3)
    assert (plain_pgd.momentum, plain_pgd.schedule) == (0.0, "constant")


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "schedule": "cosine"}], ids=str)
def test_result_belongs_to_the_sample(options):
    attack = PGD(DEFENSE, eps=0.1, steps=4, n_restarts=2, **options)
    expected = attack(X, Y, IDS)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(1))
    parts = [attack(X[part], Y[part], IDS[part]) for part in order.split(11)]
    assert torch.equal(torch.cat(parts), expected[order])


def test_a_fooled_image_leaves_and_no_other():
    """No cycle ends an image whose step or momentum still changes."""
    model = trained_classifier()
    for options in ({"momentum": 0.9}, {"schedule": "cosine"}):
        ends = [PGD(model, eps=0.02, steps=30, early_stop=stop, **options)(X, Y) for stop in (False, True)]
        right = [model(x).argmax(dim=1) == Y for x in ends]
        assert right[1].any()
        assert torch.equal(ends[0][right[1]], ends[1][right[1]])


def test_one_draw_a_step_with_momentum_beats_four_without():
    """The measured finding in small: a noisy defense, as many passes, fresh draws for the verdict."""
    x, y = places(96, seed=11)
    ids, accuracy, backward = torch.arange(96), [], []
    attacks = (
        PGD(DEFENSE, eps=0.15, steps=20, eot_iter=4),
        PGD(DEFENSE, eps=0.15, steps=80, momentum=0.9, schedule="cosine"),
    )
    for attack in attacks:
        with counted_passes() as passes:
            adversarial = attack(x, y, ids)
        backward.append(passes.backward)
        logits = draw_logits(DEFENSE, adversarial, 99, ids, range(40))
        accuracy.append(float((logits.argmax(dim=2) == y[:, None]).double().mean()))
    assert backward[0] == backward[1]
    assert accuracy[1] < accuracy[0]


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"momentum": -0.1}, "PGD: momentum must be finite and >= 0, got -0.1"),
        ({"schedule": "linear"}, "PGD: schedule must be one of 'constant', 'cosine', got 'linear'"),
    ],
)
def test_wrong_options_are_named(options, pattern):
    with pytest.raises(ValueError, match=pattern):
        PGD(DEFENSE, **options)
