"""apgd_step_l2: the harness, and what is special to it."""

from __future__ import annotations

import importlib
import math

import _harness as harness
import _steps
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast import ops

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.apgd_step_l2")
ALPHA, EPS, MOMENTUM = 1.0, 0.5, 0.75
NAMES = ("apgd_step_l2",)
STEP = _steps.Step(
    "apgd_step_l2",
    {"alpha": ALPHA, "eps": EPS, "momentum": MOMENTUM},
    spec_module.formula,
    exact=False,
    others=("x_prev",),
)
SPEC = STEP.spec(differentiable=())


@pytest.mark.usefixtures("poisoned_memory")
@cases(dtype=SPEC.dtypes, shape=_steps.SHAPES)
def test_matches_formula(backend, dtype, shape):
    _steps.check_equal(STEP, backend, STEP.sample(shape, dtype), (ALPHA, EPS, MOMENTUM))


@pytest.mark.usefixtures("poisoned_memory")
@cases(layout=harness.LAYOUTS, shape=((2, 3, 9, 7), (3, 7, 5)))
def test_numbers_and_draws(backend, layout, shape):
    _steps.check_numbers_and_draws(STEP, backend, shape, layout, torch.float32)


@cases(dtype=SPEC.dtypes)
def test_draws_of_scalars_and_of_long_samples(backend, dtype):
    _steps.check_numbers_and_draws(STEP, backend, (5,), "contiguous", dtype)
    tensors = STEP.sample((2, 3, 40, 80), dtype, _steps.DRAWS)
    _steps.check_equal(STEP, backend, tensors, STEP.per_sample(2, dtype))


@cases()
def test_tensors_like_numbers(backend):
    _steps.check_tensors_like_numbers(STEP, backend)


@cases(inner=((3, 8, 8), (9000,)), interpreted=_steps.LONG)
def test_samples_are_independent(backend, inner):
    _steps.check_samples_are_independent(STEP, backend, inner)


@cases()
def test_matches_autoattack(backend):
    """The iterates of APGDAttack.attack_single_run, for gradients of a linear model and steps that are halved."""
    autopgd = pytest.importorskip("pyautoattack.autopgd_base")
    x0 = torch.rand(6, 3, 8, 8)
    weight = torch.randn(10, 192)
    points = []

    def model(x):
        points.append(x.detach().clone())
        return x.flatten(1) @ weight.T

    attack = autopgd.APGDAttack(model, n_iter=12, norm="L2", eps=EPS, seed=0, loss="ce", device="cpu")
    attack.init_hyperparam(x0)
    labels = model(x0).argmax(dim=1)
    # It halves step sizes and returns to the best points at checkpoints, the first after two iterations.
    points.clear()
    attack.attack_single_run(x0, labels)
    x_prev = x = points[0]
    for i in range(2):
        leaf = x.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf.flatten(1) @ weight.T, labels, reduction="sum")
        (grad,) = torch.autograd.grad(loss, leaf)
        momentum = 0.75 if i else 1.0
        with harness.owned_by(backend, NAMES):
            tensors = (t.to(DEVICE) for t in (x, x_prev, grad, x0))
            moved = ops.apgd_step_l2(*tensors, torch.full((6,), 2 * EPS, device=DEVICE), EPS, momentum)
        torch.testing.assert_close(moved.cpu(), points[i + 1], rtol=0, atol=1e-6)
        assert not torch.equal(points[i + 1], points[i])
        x_prev, x = x, points[i + 1]


@cases()
def test_stays_in_ball_and_range(backend):
    x, x_prev, grad, x0 = STEP.sample((4, 3, 16, 16), torch.float32)
    with harness.owned_by(backend, NAMES):
        for _ in range(5):
            x, x_prev = ops.apgd_step_l2(x, x_prev, grad, x0, ALPHA, EPS, MOMENTUM), x
    assert (x - x0).flatten(1).norm(dim=1).max() <= EPS * (1 + 1e-5)
    assert 0 <= x.min() <= x.max() <= 1


@cases()
def test_zero_gradient_and_zero_eps(backend):
    _, _, grad, x0 = STEP.sample((4, 3, 8, 8), torch.float32)
    with harness.owned_by(backend, NAMES):
        assert torch.equal(ops.apgd_step_l2(x0, x0, torch.zeros_like(grad), x0, ALPHA, EPS, MOMENTUM), x0)
        assert torch.equal(ops.apgd_step_l2(x0, x0, grad, x0, ALPHA, 0.0, MOMENTUM), x0)


# A sample of one part and of several.
@cases(inner=((3, 5, 7), (9000,)), draws=(0, 2), interpreted=_steps.LONG)
def test_small_gradients(backend, inner, draws):
    _steps.check_small_gradients(STEP, backend, inner, draws)


@cases(odd=(math.nan, math.inf, 1e30))
def test_odd_gradients(backend, odd):
    tensors = STEP.sample((3, 3, 5, 7), torch.float32)
    tensors[2][1, 0, 0, ::3] = odd
    with harness.owned_by(backend, NAMES):
        actual = ops.apgd_step_l2(*tensors, ALPHA, EPS, MOMENTUM)
    expected = spec_module.formula(*tensors, ALPHA, EPS, MOMENTUM)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@cases(argument=(0, 1, 3))
def test_nan_in_images_stays_in_its_sample(backend, argument):
    tensors = STEP.sample((3, 3, 5, 7), torch.float32)
    tensors[argument][1, 0, 0, 0] = math.nan
    with harness.owned_by(backend, NAMES):
        actual = ops.apgd_step_l2(*tensors, ALPHA, EPS, MOMENTUM)
    assert actual[1].isnan().all()
    assert actual[::2].isfinite().all()


@cases(layout=("contiguous", "permuted"), traced={"layout": ["permuted"]})
def test_opcheck(backend, layout, parts):
    tensors = [harness.in_layout(t, layout) for t in STEP.sample((2, 3, 4, 5), torch.float32)]
    harness.check_opcheck(SPEC, backend, tensors, False, parts)


@cases()
def test_opcheck_of_draws(backend):
    tensors = STEP.sample((2, 3, 4), torch.float32, 2)
    with harness.owned_by(backend, NAMES):
        arguments = (*tensors, 0.0, 0.0, 0.0, *STEP.per_sample(2, torch.float32))
        harness.opcheck(spec_module.STEP.op, arguments)


def test_compiles_once_for_all_numbers():
    _steps.check_compiles_once(STEP)


def test_refuses_gradients():
    _steps.check_refuses_gradients(STEP)


@cases()
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend):
    _steps.check_bad_input(STEP, backend, NAMES)
