"""StAdv: the warp and its gradient, the bound, the strength, and rows of their own."""

from __future__ import annotations

import pytest
import torch
from small_task import places, trained_classifier

from atop_fast import RT2, Defense
from atop_fast.attacks import StAdv, counted_passes, prepared
from atop_fast.attacks.queue import Batch
from atop_fast.attacks.stadv import roughness, warp

X, Y = places(16, seed=999)
MOVE = 2 / 16


def accuracy(images):
    return (trained_classifier()(images).argmax(dim=1) == Y).float().mean()


def defense():
    return Defense(RT2(4, 1 / 16, sigma=0.1), None, trained_classifier())


@pytest.mark.parametrize("size", [(16, 16), (7, 33), (1, 5), (224, 224)])
def test_zero_flow_is_identity(size):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(warp(x, torch.zeros(2, 2, *size)), x, rtol=0, atol=1e-7)


def test_constant_flow_shifts_the_image():
    """2 / W along x is one pixel to the left; beyond the edge the edge's pixels go on."""
    x = torch.rand(2, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    flow = torch.zeros(2, 2, 6, 9)
    flow[0, 0], flow[1, 1] = 2 * 2 / 9, -1 * 2 / 6
    warped = warp(x, flow)
    torch.testing.assert_close(warped[0, :, :, :7], x[0, :, :, 2:], rtol=0, atol=1e-6)
    torch.testing.assert_close(warped[0, :, :, 7:], x[0, :, :, -1:].expand(-1, -1, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(warped[1, :, 1:], x[1, :, :5], rtol=0, atol=1e-6)
    torch.testing.assert_close(warped[1, :, 0], x[1, :, 0], rtol=0, atol=1e-6)


def test_half_a_pixel_is_the_mean_of_two():
    flow = torch.zeros(len(X), 2, 16, 16)
    flow[:, 0] = MOVE / 2
    expected = (X[..., :-1] + X[..., 1:]) / 2
    torch.testing.assert_close(warp(X, flow)[..., :-1], expected, rtol=0, atol=1e-6)


def test_warped_images_stay_in_range():
    x = X.round()
    flow = torch.rand(len(X), 2, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    assert warp(x, flow).min() >= 0
    assert warp(x, flow).max() <= 1


def test_gradient_of_the_flow_is_that_of_finite_differences():
    """The gradient of the whole objective, roughness and all, against a central difference in float64."""
    attack = StAdv(trained_classifier(), smoothness=0.3)
    x = torch.rand(1, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    flow = 0.2 * torch.rand(1, 2, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradient = attack._through_warp({"x0": x, "flow": flow}, weights)

    def objective(f):
        return (warp(x, f) * weights).sum() - 0.3 * roughness(f).sum()

    for index in ((0, 0, 2, 3), (0, 1, 1, 1), (0, 0, 4, 0)):
        change = torch.zeros_like(flow)
        change[index] = 1e-6
        slope = (objective(flow + change) - objective(flow - change)) / 2e-6
        torch.testing.assert_close(gradient[index], slope, rtol=1e-5, atol=1e-7)


def test_roughness_is_the_sum_over_neighbors():
    flow = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2)
    for i in range(3):
        for j in range(4):
            for row, column in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if 0 <= row < 3 and 0 <= column < 4:
                    expected += (flow[:, :, i, j] - flow[:, :, row, column]).norm(dim=1)
    torch.testing.assert_close(roughness(flow), expected)


def test_zero_bound_is_identity():
    assert torch.equal(StAdv(trained_classifier(), bound=0.0, steps=3)(X, Y), X)


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_a_large_bound_leaves_no_accuracy(loss):
    small, large = (StAdv(trained_classifier(), bound, steps=30, loss=loss)(X, Y) for bound in (0.03, 0.15))
    assert accuracy(X) == 1
    assert accuracy(large) < 0.05 < accuracy(small)
    assert large.min() >= 0
    assert large.max() <= 1


def test_flow_stays_within_the_bound():
    attack = StAdv(trained_classifier(), bound=0.1, steps=6, lr=0.05)
    with prepared(trained_classifier()) as network, torch.no_grad():
        estimator = attack.estimator(network)
        state = attack.begin(estimator, Batch(X[:8], Y[:8], torch.arange(8)))
        for _ in range(6):
            attack.step(estimator, state)
    assert state["done"].all()
    assert state["flow"].abs().max() == torch.tensor(0.1)
    assert torch.equal(state["best"], warp(X[:8], state["flow"]))


def test_smoothness_makes_the_flow_smoother():
    rough, smooth = (StAdv(trained_classifier(), steps=15, smoothness=tau) for tau in (0.0, 1.0))
    values = []
    for attack in (rough, smooth):
        with prepared(trained_classifier()) as network, torch.no_grad():
            estimator = attack.estimator(network)
            state = attack.begin(estimator, Batch(X[:8], Y[:8], torch.arange(8)))
            for _ in range(15):
                attack.step(estimator, state)
        values.append(roughness(state["flow"]))
    assert (values[1] < 0.5 * values[0]).all()


def test_early_stop_saves_passes_and_loses_nothing():
    options = {"bound": 0.15, "steps": 30}
    with counted_passes() as all_steps:
        patient = StAdv(trained_classifier(), **options)(X, Y)
    with counted_passes() as fewer_steps:
        stopped = StAdv(trained_classifier(), early_stop=True, **options)(X, Y)
    assert fewer_steps.backward < 0.9 * all_steps.backward
    assert accuracy(stopped) <= accuracy(patient)


@pytest.mark.parametrize("random", [False, True])
def test_result_belongs_to_the_sample(random):
    """Bitwise, in another order, alone, and with more images than the queue has slots."""
    model = defense() if random else trained_classifier()
    options = {"eot_iter": 3} if random else {"early_stop": True}
    attack, count = StAdv(model, 0.1, steps=5, smoothness=0.01, **options), 70
    x, y = places(count, seed=5)
    ids = torch.arange(count) + 100
    whole = attack(x, y, ids)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:20]
    assert torch.equal(attack(x[order], y[order], ids[order]), whole[order])
    for i in (0, 69):
        assert torch.equal(attack(x[i : i + 1], y[i : i + 1], ids[i : i + 1]), whole[i : i + 1])


def test_rows_that_are_done_do_not_change():
    attack = StAdv(trained_classifier(), steps=4)
    with prepared(trained_classifier()) as network, torch.no_grad():
        estimator = attack.estimator(network)
        state = attack.begin(estimator, Batch(X[:8], Y[:8], torch.arange(8)))
        attack.step(estimator, state)
        state["done"][::2] = True
        before = {key: value.clone() for key, value in state.items()}
        for _ in range(3):
            attack.step(estimator, state)
    assert state["done"].all()
    for key, value in state.items():
        assert torch.equal(value[::2], before[key][::2]), key
    assert not torch.equal(state["best"][1::2], before["best"][1::2])


def test_a_defense_loses_most_of_its_accuracy():
    model = defense()
    adversarial = StAdv(model, 0.2, steps=30, eot_iter=4)(X, Y)
    correct = [(model(adversarial, 77, None, draw).argmax(dim=1) == Y).float().mean() for draw in range(10)]
    clean = [(model(X, 77, None, draw).argmax(dim=1) == Y).float().mean() for draw in range(10)]
    assert sum(clean) / 10 > 0.8
    assert sum(correct) / 10 < 0.3


def test_model_inputs_and_global_generator_are_untouched():
    model, x, state = defense().train(), X.clone(), torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    StAdv(model, steps=2)(x, Y)
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()


def test_nan_gradients_leave_valid_images():
    adversarial = StAdv(lambda x: x.flatten(1) * float("nan"), steps=2)(X, Y)
    torch.testing.assert_close(adversarial, X, rtol=0, atol=1e-7)


def test_empty_batch():
    assert StAdv(trained_classifier())(X[:0], Y[:0]).shape == (0, 1, 16, 16)


@pytest.mark.parametrize(
    ("options", "error", "pattern"),
    [
        ({"bound": -1.0}, ValueError, "StAdv: bound must be finite and >= 0, got -1.0"),
        ({"lr": "1"}, TypeError, "StAdv: lr must be a number, got str"),
        ({"smoothness": float("inf")}, ValueError, "StAdv: smoothness must be finite and >= 0"),
        ({"loss": "dlr"}, ValueError, "StAdv: loss must be one of 'ce', 'margin', got 'dlr'"),
        ({"steps": 0}, ValueError, "StAdv: steps must be an integer and >= 1, got 0"),
    ],
)
def test_wrong_input_is_named(options, error, pattern):
    with pytest.raises(error, match=pattern):
        StAdv(trained_classifier(), **options)


def test_start_is_refused():
    with pytest.raises(ValueError, match="StAdv: start must be None"):
        StAdv(trained_classifier())(X, Y, start=X)
