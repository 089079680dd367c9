"""FAB-T: its projections against solvers, its steps against the original's, and what every attack must keep."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

from atop_fast import RT2, Defense
from atop_fast.attacks import FAB, counted_passes
from atop_fast.attacks.queue import Batch
from atop_fast.ops import hyperplane_step
from atop_fast.randomness import seeded

NORMS = {"Linf": torch.inf, "L2": 2, "L1": 1}
# Radii within which FAB fools some of the digits, and radii without a limit.
EPS = {"Linf": 0.08, "L2": 1.0, "L1": 6.0}
FAR = {"Linf": 1.0, "L2": 32.0, "L1": 1024.0}

with seeded(0):
    LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


@pytest.fixture(scope="module")
def digits():
    """A classifier, and 32 digits."""
    return models.standard_mnist(), models.mnist().images[:32], models.mnist().labels[:32]


def size(x, norm):
    return torch.linalg.vector_norm(x.flatten(1), NORMS[norm], dim=1)


def hyperplanes(rows, n, seed=0):
    """Points, normals and changes that are large enough for some to be out of reach, or negative."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.rand(rows, n, generator=g), torch.randn(rows, n, generator=g)
    w[::4] *= torch.rand(w[::4].shape, generator=g) > 0.5
    x[1::4] = x[1::4].round()
    return x, w, torch.randn(rows, generator=g) * n**0.5 / 2


def solved(norm, x, w, change):
    """The smallest step by a general solver, float64 arrays (n,); None where the box does not meet the hyperplane."""
    np, optimize = pytest.importorskip("numpy"), pytest.importorskip("scipy.optimize")
    n = len(x)
    if norm == "L2":
        constraint = {"type": "eq", "fun": lambda d: w @ d - change, "jac": lambda d: w}
        bounds, begin = list(zip(-x, 1 - x, strict=True)), np.zeros(n)
        result = optimize.minimize(
            lambda d: d @ d, begin, jac=lambda d: 2 * d, bounds=bounds, constraints=constraint, options={"ftol": 1e-12}
        )
        return result.x if result.success else None
    # L1: d = up - down, minimize their sum. Linf: |d| <= l, minimize l.
    if norm == "L1":
        bounds = [(0, v) for v in np.concatenate((1 - x, x))]
        result = optimize.linprog(np.ones(2 * n), A_eq=[np.concatenate((w, -w))], b_eq=[change], bounds=bounds)
        return result.x[:n] - result.x[n:] if result.success else None
    one = np.ones((n, 1))
    below = np.block([[np.eye(n), -one], [-np.eye(n), -one]])
    bounds = [*zip(-x, 1 - x, strict=True), (0, 1)]
    cost, equal = np.append(np.zeros(n), 1), [np.append(w, 0)]
    result = optimize.linprog(cost, A_ub=below, b_ub=np.zeros(2 * n), A_eq=equal, b_eq=[change], bounds=bounds)
    return result.x[:n] if result.success else None


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_solution_of_the_convex_problem(norm):
    x, w, change = (v.double() for v in hyperplanes(24, 6))
    step, reached = hyperplane_step(norm, x, w, change), 0
    for i in range(len(x)):
        best = solved(norm, x[i].numpy(), w[i].numpy(), float(change[i]))
        if best is None:
            # Every coordinate that helps is at its end.
            end = torch.where(w[i] * change[i] > 0, 1 - x[i], -x[i])
            torch.testing.assert_close(step[i], torch.where(w[i] == 0, 0, end))
            continue
        reached += 1
        assert float(w[i] @ step[i]) == pytest.approx(float(change[i]), abs=1e-7)
        assert float(size(step[i : i + 1], norm)) == pytest.approx(
            float(size(torch.from_numpy(best)[None], norm)), rel=1e-5, abs=1e-7
        )
    assert 8 < reached < 24


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", [1, 2, 49, 784])
def test_projection_equals_the_original_and_stays_in_the_box(norm, n):
    projections = pytest.importorskip("pyautoattack.fab_projections")
    x, w, change = hyperplanes(64, n, seed=n)
    # The original divides by w; there are tests of zeros above and below.
    w, original = torch.where(w == 0, 0.5, w), getattr(projections, f"projection_{norm.lower()}")
    step = hyperplane_step(norm, x, w, change)
    assert (x + step).min() >= -1e-6
    assert (x + step).max() <= 1 + 1e-6
    if n > 1:
        theirs = original(x.clone(), w.clone(), change + (w * x).sum(dim=1))
        torch.testing.assert_close(step, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_of_degenerate_normals(norm):
    x = torch.tensor([[0.2, 0.5, 1.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    w = torch.tensor([[0.0, 0.0, 0.0], [-1.0, -2.0, -3.0], [1e-30, 1.0, 0.0], [1e30, 1.0, 1e-30]])
    step = hyperplane_step(norm, x, w, torch.tensor([1.0, 1.0, 0.25, 0.0]))
    assert step.isfinite().all()
    # No direction; no room; a coordinate that does not count; already there.
    assert step[:2].abs().max() == 0
    assert step[2, 1] == pytest.approx(0.25, rel=1e-6)
    assert step[3].abs().max() == 0


@pytest.mark.parametrize("norm", NORMS)
def test_steps_equal_the_original(norm, digits):
    fab = pytest.importorskip("pyautoattack.fab_pt")
    model, x, y = digits
    for steps, classes, eps in ((1, 1, FAR), (12, 1, FAR), (6, 3, EPS)):
        options = {"n_iter": steps, "eps": eps[norm], "n_target_classes": classes, "targeted": True}
        theirs = size(fab.FABAttack_PT(model, norm, **options).perturb(x, y) - x, norm)
        ours = size(FAB(model, norm, eps[norm], steps=steps, target_classes=classes)(x, y) - x, norm)
        assert torch.equal(theirs > 0, ours > 0)
        assert 3 < (ours > 0).sum() < 32
        # In L1 a coordinate is chosen, and two that are nearly equal may change places.
        assert ((theirs - ours).abs() < 1e-4).sum() >= (30 if norm == "L1" else 32)


@pytest.mark.parametrize("norm", NORMS)
def test_finds_the_nearest_point_of_a_linear_model(norm):
    """Between two classes of a linear model, the first projection is the solution; eta passes it by 5 %."""
    with seeded(1):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = 0.3 + 0.4 * torch.rand(16, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    logits, weight = model(x).detach(), model[1].weight.detach()
    y = logits.argmax(dim=1)
    w = (weight[1] - weight[0]).expand(16, -1)
    exact = hyperplane_step(norm, x.flatten(1), w, logits[:, 0] - logits[:, 1])
    adversarial = FAB(model, norm, FAR[norm], steps=20)(x, y)
    fooled = model(adversarial).argmax(dim=1) != y
    assert fooled.all()
    ratio = size(adversarial - x, norm) / size(exact, norm)
    assert ratio.min() >= 1 - 1e-4
    assert ratio.max() <= 1.06


@pytest.mark.parametrize("norm", NORMS)
def test_comes_back_fooled_within_eps_or_as_it_was(norm, digits):
    model, x, y = digits
    for options in ({}, {"early_stop": True}, {"n_restarts": 2}):
        adversarial = FAB(model, norm, EPS[norm], steps=5, target_classes=2, **options)(x, y)
        distance, wrong = size(adversarial - x, norm), model(adversarial).argmax(dim=1) != y
        clean_wrong = model(x).argmax(dim=1) != y
        assert distance.max() <= EPS[norm]
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        assert wrong[distance > 0].all()
        assert 0 < (distance > 0).sum() < 32
        assert clean_wrong.any()
        assert not distance[clean_wrong].any()


def test_more_work_fools_no_fewer_and_early_stop_is_cheaper(digits):
    model, x, y = digits

    def fooled(**options):
        attack = FAB(model, "Linf", EPS["Linf"], **options)
        with counted_passes() as passes:
            return model(attack(x, y)).argmax(dim=1) != y, passes.forward

    one, _ = fooled(steps=3, target_classes=1)
    more, cost = fooled(steps=3, target_classes=3)
    early, less = fooled(steps=3, target_classes=3, early_stop=True)
    assert (more >= one).all()
    assert more.sum() > one.sum()
    assert torch.equal(early, more)
    assert less < cost


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_leave_a_plateau(norm):
    """No gradient at the images; from a random start on one side there is one, which leads to the other class."""

    def model(x):
        return torch.stack((torch.full_like(x[:, 0, 0, 0], 10.0), 30 * (x[:, 0, 0, 0] - 0.55).relu()), dim=1)

    x, y = torch.full((8, 1, 1, 1), 0.5), torch.zeros(8, dtype=torch.int64)
    assert torch.equal(FAB(model, norm, 0.4, steps=4)(x, y), x)
    adversarial = FAB(model, norm, 0.4, steps=4, n_restarts=12)(x, y)
    assert (model(adversarial).argmax(dim=1) == 1).all()
    assert size(adversarial - x, norm).max() <= 0.4
    begun = torch.full_like(x, 0.7)
    assert (model(FAB(model, norm, 0.4, steps=4)(x, y, start=begun)).argmax(dim=1) == 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_result_belongs_to_the_sample(norm, digits):
    model, x, y = digits
    x, y, ids = x[:11], y[:11], torch.arange(11) * 7
    attack = FAB(model, norm, EPS[norm], steps=4, target_classes=2, n_restarts=2)
    whole, order = attack(x, y, ids), torch.tensor([4, 9, 0, 10, 2, 7, 1, 8, 3, 6, 5])
    assert torch.equal(attack(x[order], y[order], ids[order]), whole[order])
    assert torch.equal(torch.cat([attack(x[i : i + 1], y[i : i + 1], ids[i : i + 1]) for i in range(11)]), whole)


def test_done_rows_do_not_change(digits):
    model, x, y = digits
    attack, ids = FAB(model, "Linf", 0.06, steps=2, target_classes=2), torch.arange(32)
    estimator = attack.estimator(model)
    with torch.no_grad():
        state = attack.begin(estimator, Batch(x, y, ids))
        for _ in range(5):
            done, before = state["done"].clone(), {k: v.clone() for k, v in state.items()}
            attack.step(estimator, state)
            assert all(torch.equal(v[done], before[k][done]) for k, v in state.items())
    assert state["done"].all()
    assert state["t"].max() == 4


def test_defense_is_attacked_and_the_global_generator_untouched(digits):
    model, x, y = digits
    state, given = torch.get_rng_state(), x.clone()
    attack = FAB(
        Defense(RT2(4, sigma=0.1), None, model), "L2", 2.0, steps=3, target_classes=1, eot_iter=2, n_restarts=2
    )
    adversarial = attack(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given)
    assert 0 < size(adversarial - x, "L2").max() <= 2


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_useless_gradients_leave_the_images(norm, value):
    x = torch.rand(3, 1, 3, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    nn.init.constant_(model[1].weight, value)
    nn.init.constant_(model[1].bias, 0)
    assert torch.equal(FAB(model, norm, 0.5, steps=2)(x, torch.zeros(3, dtype=torch.int64)), x)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_eps_and_empty_batch(norm):
    x, y = torch.rand(3, 1, 3, 4), torch.tensor([0, 1, 2])
    assert torch.equal(FAB(LINEAR, norm, 0.0, steps=2)(x, y), x)
    assert FAB(LINEAR, norm, 0.5)(x[:0], y[:0]).shape == (0, 1, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: FAB(LINEAR, "L3"), ValueError, "FAB: norm must be one of 'Linf', 'L2', 'L1', got 'L3'"),
        (lambda: FAB(LINEAR, steps=0), ValueError, "FAB: steps must be an integer and >= 1, got 0"),
        (lambda: FAB(LINEAR, target_classes=0), ValueError, "FAB: target_classes must be an integer and >= 1, got 0"),
        (lambda: FAB(LINEAR, n_restarts=0), ValueError, "FAB: n_restarts must be an integer and >= 1, got 0"),
        (lambda: FAB(LINEAR, alpha_max=2.0), ValueError, r"FAB: alpha_max must be finite and in \[0, 1\], got 2"),
        (lambda: FAB(LINEAR, beta=-0.1), ValueError, r"FAB: beta must be finite and in \[0, 1\], got -0.1"),
        (lambda: FAB(LINEAR, eta="x"), TypeError, "FAB: eta must be a number, got str"),
        (
            lambda: FAB(nn.Flatten())(torch.rand(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)),
            ValueError,
            r"FAB: model must be a callable with logits of .* of two classes or more .*, got \(8, 1\)",
        ),
        (
            lambda: FAB(LINEAR)(torch.rand(2, 3, 2, 2), torch.full((2,), 9)),
            ValueError,
            r"FAB: labels must be class indices below the model's \d logits, got 9",
        ),
    ],
)
def test_wrong_input_is_named(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()
