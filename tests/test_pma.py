"""PMA: its steps against the formulas in float64, its schedule, and that a result belongs to its image."""

from __future__ import annotations

import copy
import math

import models
import pytest
import torch
from small_task import places, trained_classifier
from torch import nn

from atop_fast import RT2, Defense
from atop_fast.attacks import APGD, PMA, GradientEstimator, counted_passes
from atop_fast.attacks.network import frozen

EPS = {"Linf": 0.07, "L2": 0.8, "L1": 4.5}
X, Y = places(40, seed=999)
STEPS = 10


def right(model, x, y=Y):
    with torch.no_grad():
        return model(x).argmax(dim=1) == y


class Recorder(PMA):
    """Keeps what each step began and ended with."""

    def step(self, estimator, state):
        t = state["t"].clone()
        begun = torch.where((t == self.steps + 1)[:, None, None, None], state["again"], state["x"])
        super().step(estimator, state)
        self.seen.append((int(t[0]), begun, state["x"].clone()))


def recorded(norm, **options):
    attack = Recorder(trained_classifier(), norm, EPS[norm], steps=STEPS, **options)
    attack.seen = []
    attack(X, Y)
    return attack.seen


def probability_part(x, i, run, target=None):
    """The gradient, in float64, of what step i of a run climbs on: probabilities of the softmax, as in the paper."""
    model = copy.deepcopy(trained_classifier()).double()
    leaf = x.double().requires_grad_()
    p = model(leaf).softmax(dim=1)
    rows = torch.arange(len(x))
    p_y = p[rows, Y]
    p_o = p.scatter(1, Y[:, None], -1.0).amax(dim=1) if target is None else p[rows, target]
    if i == 0:
        value = p_y
    elif i < STEPS / 2:
        value = p_o if run or target is not None else -p_y
    else:
        value = p_o - p_y
    return torch.autograd.grad(value.sum(), leaf)[0]


def length(i):
    """The step size over eps."""
    return 1 + math.cos(math.pi * ((i - 1) if i <= STEPS / 2 else (i - STEPS / 2 - 1)) / (STEPS / 2))


def test_schedule_falls_from_2_eps_in_both_halves():
    """The plain loop below relies on this."""
    assert length(1) == length(STEPS // 2 + 1) == 2
    assert length(STEPS // 2) == length(STEPS) == pytest.approx(0.19, abs=0.01)


@pytest.mark.parametrize("target_classes", [0, 2])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_steps_are_those_of_a_plain_loop(norm, target_classes):
    """Each iterate follows from the one before by softmax, autograd and the projection, all in float64."""
    seen = recorded(norm, target_classes=target_classes)
    assert [t for t, *_ in seen] == list(range(2 * (STEPS + 1)))
    ranked = trained_classifier()(X).argsort(dim=1, descending=True, stable=True)
    x0, eps, checked = X.double(), EPS[norm], 0
    for t, x, moved in seen:
        run, i = divmod(t, STEPS + 1)
        if i == STEPS:
            continue
        g = probability_part(x, i, run, ranked[:, 1 + run] if target_classes else None)
        x = x.double()
        if norm == "Linf":
            expected = (x + eps * length(i) * g.sign()).clamp(x0 - eps, x0 + eps).clamp(0, 1)
            # A rounding may turn the sign of what is nearly 0.
            sure = g.abs() > 1e-4 * g.abs().amax(dim=(1, 2, 3), keepdim=True)
        else:
            v = x + eps * length(i) * g / g.flatten(1).norm(dim=1)[:, None, None, None]
            norms = (v - x0).flatten(1).norm(dim=1)[:, None, None, None]
            expected = (x0 + (v - x0) * (eps / norms).clamp(max=1)).clamp(0, 1)
            sure = torch.ones_like(expected, dtype=torch.bool)
        checked += int(sure.sum())
        torch.testing.assert_close(moved.double()[sure], expected[sure], rtol=0, atol=2e-5)
    assert checked > 0.5 * X.numel() * 2 * STEPS


@pytest.mark.parametrize("norm", list(EPS))
def test_finds_what_it_is_for_inside_of_the_ball(norm):
    model = trained_classifier()
    attack = PMA(model, norm, EPS[norm], steps=20, early_stop=True)
    adversarial = attack(X, Y)
    distance = (adversarial - X).flatten(1).norm(p={"Linf": torch.inf, "L2": 2, "L1": 1}[norm], dim=1)
    assert distance.max() <= EPS[norm] * (1 + 1e-5)
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    assert int(right(model, adversarial).sum()) < 0.9 * int(right(model, X).sum())


@pytest.mark.slow
def test_leaves_fewer_than_apgd_on_the_cross_entropy_with_as_many_passes():
    """On an adversarially trained network, with the 100 steps that PMA has by default."""
    model, data = models.robust_mnist(), models.mnist()
    x, y = data.images[:64], data.labels[:64]
    attacks = PMA(model, eps=0.24, early_stop=True), APGD(model, eps=0.24, steps=201, early_stop=True)
    left = [int(right(model, attack(x, y), y).sum()) for attack in attacks]
    assert 5 < left[0] <= left[1]


@pytest.mark.parametrize("options", [{}, {"early_stop": True}, {"target_classes": 2}], ids=str)
@pytest.mark.parametrize("norm", list(EPS))
def test_result_belongs_to_the_sample(norm, options):
    attack = PMA(trained_classifier(), norm, EPS[norm], steps=5, seed=3, **options)
    expected = attack(X, Y)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(1))
    parts = [attack(X[part], Y[part], sample_ids=part) for part in order.split(23)]
    assert torch.equal(torch.cat(parts), expected[order])
    assert not torch.equal(PMA(trained_classifier(), norm, EPS[norm], steps=5, seed=4, **options)(X, Y), expected)


def test_more_restarts_and_longer_runs_never_leave_more_right():
    model, left = trained_classifier(), []
    for restarts in (1, 3):
        adversarial = PMA(model, eps=0.05, steps=4, n_restarts=restarts, early_stop=True)(X, Y)
        left.append(right(model, adversarial))
    assert not (left[1] & ~left[0]).any()


def test_candidate_is_the_best_iterate():
    """A misclassified iterate if there is one, otherwise the one with the largest margin of a second half."""
    model = trained_classifier()
    seen, best = recorded("Linf"), PMA(model, eps=EPS["Linf"], steps=STEPS)(X, Y)
    fooled = torch.zeros(len(X), dtype=torch.bool)
    largest = torch.full((len(X),), -torch.inf)
    for t, x, _ in seen:
        p = model(x).detach().softmax(dim=1)
        fooled |= ~right(model, x)
        if t % (STEPS + 1) >= STEPS / 2:
            margin = p.scatter(1, Y[:, None], -1.0).amax(dim=1) - p.gather(1, Y[:, None])[:, 0]
            largest = torch.maximum(largest, margin)
    assert torch.equal(~right(model, best), fooled)
    p = model(best).detach().softmax(dim=1)
    margin = p.scatter(1, Y[:, None], -1.0).amax(dim=1) - p.gather(1, Y[:, None])[:, 0]
    torch.testing.assert_close(margin[~fooled], largest[~fooled])


def test_fooled_images_leave():
    passes = []
    for early_stop in (False, True):
        with counted_passes() as counted:
            PMA(trained_classifier(), eps=0.3, steps=10, early_stop=early_stop)(X, Y)
        passes.append(counted.backward)
    assert passes[0] == len(X) * 2 * 11
    assert passes[1] < passes[0] / 4


class Sharp(nn.Module):
    """Logits so far apart that every softmax of float32 is 0 or 1, as of a network distilled at a high temperature."""

    def forward(self, x):
        return 1000 * trained_classifier()(x)


def test_does_not_stand_still_where_the_softmax_has_no_gradient():
    """The direction is the gradient of the log-odds at any scale of the logits; that of the cross-entropy is 0."""
    mine = PMA(Sharp(), eps=EPS["Linf"], steps=20, early_stop=True)(X, Y)
    ce = APGD(Sharp(), eps=EPS["Linf"], steps=41, early_stop=True)(X, Y)
    left, masked, clean = (int(right(trained_classifier(), x).sum()) for x in (mine, ce, X))
    assert left < 0.8 * clean
    assert left < masked


def test_a_random_defense_gets_all_its_steps():
    defense = Defense(RT2(2, sigma=0.05), None, trained_classifier())
    attack = PMA(defense, eps=EPS["Linf"], steps=4, eot_iter=2)
    with counted_passes() as counted:
        moved = attack(X, Y)
    assert counted.backward == len(X) * 2 * 5 * 2
    assert torch.equal(moved, attack(X, Y))
    with pytest.raises(ValueError, match="PMA: early_stop must be False for a Defense"):
        PMA(defense, early_stop=True)


@pytest.mark.parametrize("targeted", [False, True])
def test_a_row_has_the_loss_that_is_named(targeted):
    losses = ("pm", "pm-label", "pm-other")
    ids, t, which = torch.arange(len(X)), torch.zeros(len(X), dtype=torch.int64), torch.arange(len(X)) % 3
    targets = (Y + 1) % 4 if targeted else None
    with frozen(trained_classifier()), torch.no_grad():
        estimator = GradientEstimator(trained_classifier())
        mixed = estimator(X, Y, ids, t, targets, loss=losses, which=which)
        for place, loss in enumerate(losses):
            alone = estimator(X, Y, ids, t, None if loss == "pm-label" else targets, loss=loss)
            rows = which == place
            for actual, expected in zip(mixed, alone, strict=True):
                assert torch.equal(actual[rows], expected[rows])


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"n_restarts": 0}, "PMA: n_restarts must be an integer and >= 1, got 0"),
        ({"target_classes": -1}, "PMA: target_classes must be an integer and >= 0, got -1"),
        ({"norm": "L0"}, "PMA: norm must be one of 'Linf', 'L2', 'L1', got 'L0'"),
        ({"steps": 0}, "PMA: steps must be an integer and >= 1, got 0"),
    ],
)
def test_wrong_options_are_named(options, pattern):
    with pytest.raises(ValueError, match=pattern):
        PMA(trained_classifier(), **options)
