"""pgd_step_l2: the harness, and what is special to it."""

from __future__ import annotations

import importlib
import math

import _harness as harness
import _steps
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast import ops
from atop_fast.ops import _registry

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.pgd_step_l2")
ALPHA, EPS = 0.3, 0.5
NAMES = ("pgd_step_l2", "pgd_step_l2_")
STEP = _steps.Step("pgd_step_l2", {"alpha": ALPHA, "eps": EPS}, spec_module.formula, exact=False)
SPEC = STEP.spec(differentiable=(0, 2), ops=NAMES)


def lengths(t):
    return t.flatten(1).norm(dim=1)


@pytest.mark.usefixtures("poisoned_memory")
@cases(dtype=SPEC.dtypes, shape=_steps.SHAPES)
def test_matches_formula(backend, dtype, shape):
    _steps.check_equal(STEP, backend, STEP.sample(shape, dtype), (ALPHA, EPS))


@pytest.mark.usefixtures("poisoned_memory")
@cases(layout=harness.LAYOUTS, shape=((2, 3, 9, 7), (3, 7, 5)))
def test_numbers_and_draws(backend, layout, shape):
    _steps.check_numbers_and_draws(STEP, backend, shape, layout, torch.float32)


@cases(dtype=SPEC.dtypes)
def test_draws_of_scalars_and_of_long_samples(backend, dtype):
    _steps.check_numbers_and_draws(STEP, backend, (5,), "contiguous", dtype)
    tensors = STEP.sample((2, 3, 40, 80), dtype, _steps.DRAWS)
    _steps.check_equal(STEP, backend, tensors, STEP.per_sample(2, dtype))


@cases(layout=harness.LAYOUTS)
def test_in_place(backend, layout):
    _steps.check_in_place(STEP, backend, layout)


@cases()
def test_tensors_like_numbers(backend):
    _steps.check_tensors_like_numbers(STEP, backend)


@cases(inner=((3, 8, 8), (9000,)), interpreted=_steps.LONG)
def test_samples_are_independent(backend, inner):
    _steps.check_samples_are_independent(STEP, backend, inner)


@cases()
def test_stays_in_ball_and_range(backend):
    x, grad, x0 = STEP.sample((4, 3, 16, 16), torch.float32)
    with harness.owned_by(backend, NAMES):
        for _ in range(5):
            x = ops.pgd_step_l2(x, grad, x0, ALPHA, EPS)
    assert lengths(x - x0).max() <= EPS * (1 + 1e-5)
    assert 0 <= x.min() <= x.max() <= 1


@cases()
def test_zero_gradient_and_zero_eps(backend):
    _, grad, x0 = STEP.sample((4, 3, 8, 8), torch.float32)
    with harness.owned_by(backend, NAMES):
        assert torch.equal(ops.pgd_step_l2(x0, torch.zeros_like(grad), x0, ALPHA, EPS), x0)
        assert torch.equal(ops.pgd_step_l2(x0, grad, x0, ALPHA, 0.0), x0)
        assert torch.equal(ops.pgd_step_l2(x0, grad, x0, 0.0, EPS), x0)


@cases(draws=(0, 2))
def test_scale_of_the_gradient_is_immaterial(backend, draws):
    x, grad, x0 = STEP.sample((4, 3, 8, 8), torch.float32, draws)
    with harness.owned_by(backend, NAMES):
        expected = ops.pgd_step_l2(x, grad, x0, ALPHA, EPS)
        for scale in (2.0**-20, 2.0**30):
            torch.testing.assert_close(ops.pgd_step_l2(x, grad * scale, x0, ALPHA, EPS), expected, rtol=0, atol=1e-6)


# A sample of one part and of several.
@cases(inner=((3, 5, 7), (9000,)), draws=(0, 2), interpreted=_steps.LONG)
def test_small_gradients(backend, inner, draws):
    _steps.check_small_gradients(STEP, backend, inner, draws)


@cases(odd=(math.nan, math.inf, -math.inf, 1e30))
def test_odd_gradients(backend, odd):
    """Like the formula: NaN counts as 0, and a norm that overflows is infinite."""
    x, grad, x0 = STEP.sample((3, 3, 5, 7), torch.float32)
    grad[1, 0, 0, ::3] = odd
    with harness.owned_by(backend, NAMES):
        actual = ops.pgd_step_l2(x, grad, x0, ALPHA, EPS)
    torch.testing.assert_close(actual, spec_module.formula(x, grad, x0, ALPHA, EPS), rtol=0, atol=1e-6)


@cases(argument=(0, 2))
def test_nan_in_images_stays_in_its_sample(backend, argument):
    tensors = STEP.sample((3, 3, 5, 7), torch.float32)
    tensors[argument][1, 0, 0, 0] = math.nan
    with harness.owned_by(backend, NAMES):
        actual = ops.pgd_step_l2(*tensors, ALPHA, EPS)
    assert actual[1].isnan().all()
    assert actual[::2].isfinite().all()


@cases(dtype=SPEC.dtypes, shape=((0, 3), (4,), (2, 3, 33, 65)))
def test_gradients(backend, dtype, shape):
    harness.check_gradients(SPEC, backend, STEP.sample(shape, dtype))


@cases()
def test_gradients_of_draws(backend):
    _steps.check_gradients(STEP, backend, differentiable=(0, 2))


@cases()
def test_gradcheck(backend):
    """Inside of the ball, outside of it, with the range clipping, and where eps is 0."""
    x0 = torch.tensor([[0.5, 0.4, 0.3], [0.5, 0.6, 0.7], [0.05, 0.5, 0.9]], device=DEVICE)
    x = x0 + torch.tensor([[0.05, 0.02, -0.03], [0.4, 0.3, -0.3], [-0.3, 0.1, 0.4]], device=DEVICE)
    grad = torch.tensor([[1.0, -2.0, 0.5]] * 3, device=DEVICE)
    for eps in (EPS, 0.3, 0.0):
        spec = STEP.spec(differentiable=(0, 2), ops=NAMES, numbers=(0.1, eps))
        harness.check_gradcheck(spec, backend, (x, grad, x0))


@cases()
def test_second_backward_same(backend):
    harness.check_second_backward_same(SPEC, backend, STEP.sample((2, 3, 5, 7), torch.float32))


@cases(layout=("contiguous", "permuted"), traced={"layout": ["contiguous"]})
def test_opcheck(backend, layout, parts):
    tensors = [harness.in_layout(t, layout) for t in STEP.sample((2, 3, 4, 5), torch.float32)]
    harness.check_opcheck(SPEC, backend, tensors, layout == "contiguous", parts)


@cases()
def test_opcheck_of_draws(backend):
    x, grad, x0 = STEP.sample((2, 3, 4), torch.float32, 2)
    arguments = (x.requires_grad_(), grad, x0, 0.0, 0.0, *STEP.per_sample(2, torch.float32))
    with harness.owned_by(backend, NAMES):
        harness.opcheck(spec_module.STEP.op, arguments)


@cases(layout=("permuted",), traced={})
def test_opcheck_in_place(backend, layout, parts):
    tensors = [harness.in_layout(t, layout) for t in STEP.sample((2, 3, 4, 5), torch.float32)]
    with harness.owned_by(backend, NAMES):
        harness.opcheck(spec_module.STEP_.op, (*tensors, ALPHA, EPS), parts)


@pytest.mark.slow
def test_compiles():
    harness.check_compiled(SPEC, harness.backends(), [STEP.sample((n, 3, 8, 8), torch.float32) for n in (2, 5)])


def test_compiles_once_for_all_numbers():
    _steps.check_compiles_once(STEP)


@cases()
def test_in_place_is_seen_by_autograd(backend):
    x, grad, x0 = STEP.sample((4, 3), torch.float32)
    before = x._version
    with harness.owned_by(backend, NAMES):
        assert ops.pgd_step_l2_(x, grad, x0, ALPHA, EPS) is x
        assert x._version > before
        with pytest.raises(ValueError, match=r"pgd_step_l2_: x0 must be a tensor that does not require grad"):
            ops.pgd_step_l2_(x, grad, x0.requires_grad_(), ALPHA, EPS)


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.backend("eager"))])
def test_in_place_refuses_shared_memory(backend):
    x, grad, x0 = STEP.sample((4, 3), torch.float32)
    with pytest.raises(ValueError, match="pgd_step_l2_: x0 must be a tensor that shares no memory with x"):
        ops.pgd_step_l2_(x, grad, x, ALPHA, EPS)
    with pytest.raises(ValueError, match="pgd_step_l2_: grad must be a tensor that shares no memory with x"):
        ops.pgd_step_l2_(x[1:], x[:-1], x0[1:], ALPHA, EPS)


@cases()
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend):
    _steps.check_bad_input(STEP, backend, NAMES)
    with pytest.raises(ValueError, match=r"pgd_step_l2: x must be of shape \(B, ...\), got a scalar"):
        ops.pgd_step_l2(torch.rand(()), torch.rand(()), torch.rand(()), ALPHA, EPS)
    with harness.owned_by(backend, NAMES), pytest.raises((RuntimeError, ValueError), match="x must be of shape"):
        _registry.OPS["pgd_step_l2"].overload(torch.rand(()), torch.rand(()), torch.rand(()), ALPHA, EPS)
