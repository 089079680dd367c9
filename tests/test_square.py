"""Square: the ball, the search, the original's success, and what every attack must keep."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from torch import nn

from atop_fast import RT2, Defense, build_classifier
from atop_fast.attacks import Square, counted_passes, prepared
from atop_fast.attacks.queue import Batch
from atop_fast.attacks.square import QUERIES, _bump
from atop_fast.ops import project_l1
from atop_fast.randomness import seeded

NORMS = {"Linf": torch.inf, "L2": 2, "L1": 1}
# Radii at which some of the digits are fooled in 100 queries.
EPS = {"Linf": 0.1, "L2": 1.6, "L1": 16.0}

with seeded(0):
    SMALL = build_classifier("small_cnn", channels=1, width=4).eval()
DEFENSE = Defense(RT2(4, sigma=0.1), None, SMALL)


@pytest.fixture(scope="module")
def digits():
    """A classifier, and 128 digits that it gets right."""
    model, x, y = models.standard_mnist(), models.mnist().images[:200], models.mnist().labels[:200]
    right = (model(x).argmax(dim=1) == y).nonzero()[:128, 0]
    return model, x[right], y[right]


def size(x, norm):
    return torch.linalg.vector_norm(x.flatten(1), NORMS[norm], dim=1)


def margin(model, x, y):
    z = model(x).detach()
    return z.scatter(1, y[:, None], -torch.inf).amax(dim=1) - z.gather(1, y[:, None])[:, 0]


def images(*shape):
    """Images with some pixels at 0 or 1."""
    return (1.4 * torch.rand(shape, generator=torch.Generator().manual_seed(2)) - 0.2).clamp(0, 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 12, 17), (2, 1, 9), (3, 5, 1), (1, 1, 1), (2, 2, 2)])
def test_stays_in_ball_and_range(norm, shape):
    with seeded(3):
        model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 5))
    x, y = images(9, *shape), torch.arange(9) % 5
    for early_stop in (True, False):
        adversarial = Square(model, norm, 0.3, n_queries=30, early_stop=early_stop)(x, y)
        distance = size(adversarial - x, norm)
        assert distance.max() <= 0.3 * (1 + 1e-5)
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
    assert distance.min() > 0
    assert margin(model, adversarial, y).mean() > margin(model, x, y).mean()


@pytest.mark.parametrize("norm", NORMS)
def test_loss_never_falls_and_done_rows_do_not_change(norm, digits):
    model, x, y = digits
    attack = Square(model, norm, EPS[norm], n_queries=40)
    with torch.no_grad(), prepared(model) as network:
        estimator = attack.estimator(network)
        state, ended = attack.begin(estimator, Batch(x, y, torch.arange(128))), []
        while not state["done"].all():
            done, before = state["done"].clone(), {k: v.clone() for k, v in state.items()}
            attack.step(estimator, state)
            assert (state["loss"] >= before["loss"]).all()
            assert all(torch.equal(v[done], before[k][done]) for k, v in state.items())
            ended.append(int(state["done"].sum()))
    assert len(ended) == 40 // QUERIES
    assert 0 < ended[0] < ended[-2] < 128
    torch.testing.assert_close(state["loss"], margin(model, state["best"], y), rtol=1e-4, atol=1e-4)
    assert torch.equal(state["best"], attack(x, y))


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_fools_as_many_as_the_original(norm, digits):
    square = pytest.importorskip("pyautoattack.square")
    model, x, y = digits
    ours = (margin(model, Square(model, norm, EPS[norm], n_queries=100)(x, y), y) > 0).sum().item()
    with torch.no_grad(), seeded(0):
        theirs = square.SquareAttack(model, norm, 100, EPS[norm], seed=1).perturb(x, y)
    theirs = (margin(model, theirs, y) > 0).sum().item()
    assert 15 < ours < 113
    # Three standard deviations of the difference of two independent runs would be at most 24.
    assert abs(ours - theirs) <= 16


def test_linf_square_is_a_square_of_two_values_in_each_channel():
    """The change of one query, where nothing is clipped: one square, with one sign in every channel."""
    x = torch.full((64, 3, 10, 14), 0.5)
    attack = Square(lambda x: x.mean(dim=(1, 2, 3))[:, None].repeat(1, 2), eps=0.1, p_init=0.4, resc_schedule=False)
    batch = Batch(x, torch.zeros(64, dtype=torch.int64), torch.arange(64), x)
    state = attack.begin(attack.estimator(attack.model), batch)
    side, tops = 7, set()
    for _, _, square in attack._squares(5, state):
        assert square.rows.sum(dim=2).eq(side).all()
        assert square.columns.sum(dim=3).eq(side).all()
        assert square.rows.unfold(2, side, 1).prod(dim=-1).sum(dim=2).eq(1).all()
        assert set(square.signs.unique().tolist()) == {-1.0, 1.0}
        tops |= set(square.rows[:, 0, :, 0].argmax(dim=1).tolist())
    # Also the one that reaches the last row.
    assert tops == {0, 1, 2, 3}


def test_sizes_follow_the_schedule_of_the_original():
    square = pytest.importorskip("pyautoattack.square")
    for rescale in (False, True):
        original = square.SquareAttack(None, n_queries=5000, eps=1.0, resc_schedule=rescale)
        attack = Square(SMALL, eps=0.1, n_queries=5000, resc_schedule=rescale)
        t = torch.tensor([0, 5, 6, 10, 11, 25, 26, 50, 51, 200, 201, 500, 501, 999, 1001, 2001, 3001, 4500, 4992])
        x = torch.zeros(len(t), 1, 32, 32)
        state = {"x": x, "t": t, "done": t < 0, "ids": t}
        for query, (_, _, got) in enumerate(attack._squares(0, state)):
            for row, number in enumerate((t + query).tolist()):
                side = max(1, round((original.p_selection(number) * 1024) ** 0.5))
                assert int((got.rows * got.columns)[row].sum()) == side * side


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 9, 24])
def test_bump_equals_the_original(norm, side):
    square = pytest.importorskip("pyautoattack.square")
    original = square.SquareAttack(None, norm, device=torch.device("cpu"))
    with seeded(0):
        theirs = original.eta(side)
    ours = _bump(side, norm, torch.device("cpu"))
    if not torch.allclose(ours, theirs, atol=1e-6):
        torch.testing.assert_close(ours.T, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 0.5, 3.0, 100.0])
def test_l1_projection_is_the_nearest_point(eps):
    optimize = pytest.importorskip("scipy.optimize")
    center = images(12, 1, 2, 3).double()
    x = center + torch.randn(center.shape, generator=torch.Generator().manual_seed(0)).double()
    projected = project_l1(x, center, eps)
    assert size(projected - center, "L1").max() <= eps + 1e-9
    for c, p, y in zip(*(v.flatten(1).numpy() for v in (center, projected, x)), strict=True):
        # With d = up - down: minimize |c + d - y|^2, sum(up + down) <= eps.
        split = np.concatenate((np.eye(6), -np.eye(6)), axis=1)
        result = optimize.minimize(
            lambda v, c=c, y=y, split=split: ((c + split @ v - y) ** 2).sum(),
            np.zeros(12),
            bounds=[(0, b) for b in np.concatenate((1 - c, c))],
            constraints={"type": "ineq", "fun": lambda v: eps - v.sum()},
            options={"ftol": 1e-13, "maxiter": 500},
        )
        np.testing.assert_allclose(p, c + split @ result.x, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", [SMALL, DEFENSE], ids=["classifier", "defense"])
def test_result_belongs_to_the_sample(norm, model):
    x, y, ids = images(11, 1, 16, 16), torch.arange(11) % 10, torch.arange(11) * 5
    attack = Square(model, norm, EPS[norm], n_queries=20, n_restarts=2)
    whole, order = attack(x, y, ids), torch.tensor([4, 9, 0, 10, 2, 7, 1, 8, 3, 6, 5])
    assert torch.equal(attack(x[order], y[order], ids[order]), whole[order])
    assert torch.equal(torch.cat([attack(x[i : i + 1], y[i : i + 1], ids[i : i + 1]) for i in range(11)]), whole)


def test_forward_passes_alone_and_no_more_than_asked_for():
    """A model without gradients; a robust one takes all queries, one more for the start and one for the image."""

    @torch.no_grad()
    def model(x):
        return torch.stack((x.mean(dim=(1, 2, 3)) + 10, x.amax(dim=(1, 2, 3))), dim=1)

    x, y = images(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64)
    with counted_passes() as passes:
        Square(model, eps=0.1, n_queries=24, max_batch=16)(x, y)
    assert passes.forward == 16 * (24 + 2)
    assert passes.backward == 0
    with counted_passes() as passes:
        assert torch.equal(Square(model, eps=0.1, n_queries=5000)(x, y + 1), x)
    assert passes.forward < 16 * 14


def test_restarts_and_draws_go_on_where_an_image_is_robust(digits):
    model, x, y = digits
    once = margin(model, Square(model, eps=0.05, n_queries=16)(x, y), y)
    again = margin(model, Square(model, eps=0.05, n_queries=16, n_restarts=4)(x, y), y)
    assert (again >= once - 1e-4).all()
    assert (again > 0).sum() > (once > 0).sum()


def test_defense_keeps_the_best_estimate_and_the_global_generator():
    x, y, generator = images(6, 1, 16, 16), torch.arange(6), torch.get_rng_state()
    given, attack = x.clone(), Square(DEFENSE, eps=0.1, n_queries=32, eot_iter=4, n_restarts=2)
    assert not attack.early_stop
    adversarial = attack(x, y)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x, given)
    assert not torch.equal(adversarial, attack(x, y, torch.arange(6) + 6))
    estimator = Square(DEFENSE, eot_iter=64, seed=9).estimator(DEFENSE)
    ids = torch.arange(6)
    before, after = (estimator.evaluate(v, y, ids, 0 * ids).loss.mean() for v in (x, adversarial))
    assert after > before


@pytest.mark.parametrize("norm", NORMS)
def test_start_is_taken_into_the_ball(norm):
    x, y = images(5, 1, 16, 16), torch.arange(5)
    adversarial = Square(SMALL, norm, 0.2, n_queries=8, early_stop=False)(x, y, start=1 - x)
    assert size(adversarial - x, norm).max() <= 0.2 * (1 + 1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_eps_empty_batch_and_nan(norm):
    x, y = images(5, 1, 16, 16), torch.arange(5)
    for early_stop in (True, False):
        zero = Square(SMALL, norm, 0.0, n_queries=10, early_stop=early_stop)(x, y)
        torch.testing.assert_close(zero, x, rtol=0, atol=1e-6)
    assert Square(SMALL, norm, 0.5)(x[:0], y[:0]).shape == (0, 1, 16, 16)
    broken = Square(lambda x: x.flatten(1) * float("nan"), norm, 0.1, n_queries=10)(x, y)
    assert size(broken - x, norm).max() <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: Square(SMALL, "L3"), ValueError, "Square: norm must be one of 'Linf', 'L2', 'L1', got 'L3'"),
        (lambda: Square(SMALL, n_queries=0), ValueError, "Square: n_queries must be an integer and >= 1, got 0"),
        (lambda: Square(SMALL, n_restarts=0), ValueError, "Square: n_restarts must be an integer and >= 1, got 0"),
        (lambda: Square(SMALL, p_init=1.5), ValueError, r"Square: p_init must be finite and in \[0, 1\], got 1.5"),
        (lambda: Square(SMALL, eps="x"), TypeError, "Square: eps must be a number, got str"),
        (lambda: Square(DEFENSE, early_stop=True), ValueError, "Square: early_stop must be False for a Defense"),
    ],
)
def test_wrong_input_is_named(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()
