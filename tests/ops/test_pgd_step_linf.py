"""pgd_step_linf: the harness, and what is special to it."""

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
spec_module = importlib.import_module("atop_fast.ops.pgd_step_linf")
ALPHA, EPS = 2 / 255, 8 / 255
BLOCK = 1024
SHAPES = ((), (0,), (1,), (BLOCK - 1,), (BLOCK + 1,), (2, 3, 0, 5), (2, 3, 33, 65), (3, 7, 5))
STEPS = {"functional": ops.pgd_step_linf, "in_place": lambda x, *rest: ops.pgd_step_linf_(clone(x), *rest)}
NAMES = ("pgd_step_linf", "pgd_step_linf_")
STEP = _steps.Step("pgd_step_linf", {"alpha": ALPHA, "eps": EPS}, spec_module.formula, exact=True)


def clone(t):
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def sample(shape, dtype):
    """Images, a gradient with some zeros, and clean images; the step leaves the ball and the range in places."""
    x0 = torch.rand(shape, dtype=dtype, device=DEVICE)
    x = x0 + EPS * torch.randn(shape, dtype=dtype, device=DEVICE)
    grad = torch.randn(shape, dtype=dtype, device=DEVICE).relu() - torch.rand(shape, dtype=dtype, device=DEVICE).round()
    return x, grad, x0


SPEC = harness.Spec(
    name="pgd_step_linf",
    call=ops.pgd_step_linf,
    formula=spec_module.formula,
    sample=sample,
    dtypes=(torch.float32, torch.float64),
    shapes=SHAPES,
    exact=True,
    numbers=(ALPHA, EPS),
    differentiable=(0, 2),
    ops=NAMES,
)


@pytest.mark.usefixtures("poisoned_memory")
@cases(step=tuple(STEPS), dtype=SPEC.dtypes, shape=SHAPES)
def test_matches_formula(backend, step, dtype, shape):
    tensors = sample(shape, dtype)
    with harness.owned_by(backend, NAMES):
        actual = STEPS[step](*tensors, ALPHA, EPS)
    torch.testing.assert_close(actual, spec_module.formula(*tensors, ALPHA, EPS), rtol=0, atol=0)


@pytest.mark.usefixtures("poisoned_memory")
@cases(step=tuple(STEPS), layout=harness.LAYOUTS, shape=((2, 3, 9, 7), (3, 7, 5)))
def test_layouts(backend, step, layout, shape):
    tensors = [harness.in_layout(t, layout) for t in sample(shape, torch.float32)]
    with harness.owned_by(backend, NAMES):
        actual = STEPS[step](*tensors, ALPHA, EPS)
    torch.testing.assert_close(actual, spec_module.formula(*tensors, ALPHA, EPS), rtol=0, atol=0)
    assert actual.stride() == (tensors[0] if step == "in_place" else torch.empty_like(tensors[0])).stride()


@cases(step=tuple(STEPS))
def test_mixed_layouts(backend, step):
    x, grad, x0 = sample((2, 3, 9, 7), torch.float32)
    tensors = x, harness.in_layout(grad, "channels_last"), harness.in_layout(x0, "sliced")
    with harness.owned_by(backend, NAMES):
        assert torch.equal(STEPS[step](*tensors, ALPHA, EPS), spec_module.formula(*tensors, ALPHA, EPS))


@cases(step=tuple(STEPS), dtype=SPEC.dtypes)
def test_nan_and_infinity(backend, step, dtype):
    odd = torch.tensor([0.5, math.nan, math.inf, -math.inf, -0.0], dtype=dtype, device=DEVICE)
    tensors = [t.flatten() for t in torch.meshgrid(odd, odd, odd, indexing="ij")]
    with harness.owned_by(backend, NAMES):
        actual = STEPS[step](*tensors, ALPHA, EPS)
    torch.testing.assert_close(actual, spec_module.formula(*tensors, ALPHA, EPS), rtol=0, atol=0, equal_nan=True)


@cases(numbers=((0.0, 0.1), (0.1, 0.0), (-0.1, 0.05), (10.0, 20.0)))
def test_numbers(backend, numbers):
    tensors = sample((5, 3, 8, 8), torch.float32)
    with harness.owned_by(backend, NAMES):
        assert torch.equal(ops.pgd_step_linf(*tensors, *numbers), spec_module.formula(*tensors, *numbers))


@cases(dtype=SPEC.dtypes, shape=((0,), (2, 3, 33, 65)))
def test_gradients(backend, dtype, shape):
    harness.check_gradients(SPEC, backend, sample(shape, dtype))


@cases()
def test_gradcheck(backend):
    x0 = torch.tensor([0.5, 0.5, 0.5, 0.002, 0.998, 0.5], device=DEVICE)
    x = torch.tensor([0.5, 0.56, 0.44, 0.0, 1.0, 0.51], device=DEVICE)
    grad = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, 0.0], device=DEVICE)
    harness.check_gradcheck(SPEC, backend, (x, grad, x0))


@cases()
def test_second_backward_same(backend):
    harness.check_second_backward_same(SPEC, backend, sample((2, 3, 5, 7), torch.float32))


@cases(
    layout=harness.LAYOUTS, requires_grad=(False, True),
    traced={"layout": ["channels_last"], "requires_grad": [True]},
)  # fmt: skip
def test_opcheck(backend, layout, requires_grad, parts):
    tensors = [harness.in_layout(t, layout) for t in sample((2, 3, 4, 5), torch.float32)]
    harness.check_opcheck(SPEC, backend, tensors, requires_grad, parts)


@cases(layout=harness.LAYOUTS, traced={"layout": ["channels_last"]})
def test_opcheck_in_place(backend, layout, parts):
    tensors = [harness.in_layout(t, layout) for t in sample((2, 3, 4, 5), torch.float32)]
    with harness.owned_by(backend, NAMES):
        harness.opcheck(spec_module.STEP_.op, (*tensors, ALPHA, EPS), parts)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "compiler"), harness.compilers_of(*STEPS))
def test_compiles(step, compiler):
    def call(x, *rest):
        return ops.pgd_step_linf(x, *rest) if step == "functional" else ops.pgd_step_linf_(x.clone(), *rest)

    spec = harness.Spec(**{**vars(SPEC), "call": call})
    samples = [sample((n, 3, 8, 8), torch.float32) for n in (2, 5, 7)]
    harness.check_compiled(spec, harness.backends(), samples, compiler)


@cases()
def test_in_place_counts_the_version_up(backend):
    x, grad, x0 = sample((4,), torch.float32)
    before = x._version
    with harness.owned_by(backend, NAMES):
        assert ops.pgd_step_linf_(x, grad, x0, ALPHA, EPS) is x
    assert x._version > before


@cases()
def test_in_place_refuses_what_requires_grad(backend):
    tensors = sample((4,), torch.float32)
    tensors[0].requires_grad_()
    with harness.owned_by(backend, NAMES):
        with pytest.raises(ValueError, match=r"pgd_step_linf_: x must be a tensor that does not require grad"):
            ops.pgd_step_linf_(*tensors, ALPHA, EPS)
        with torch.no_grad():
            ops.pgd_step_linf_(*tensors, ALPHA, EPS)


@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.backend("eager"))])
def test_in_place_refuses_shared_memory(backend):
    x, grad, x0 = sample((8,), torch.float32)
    with pytest.raises(ValueError, match="pgd_step_linf_: x0 must be a tensor that shares no memory with x"):
        ops.pgd_step_linf_(x, grad, x, ALPHA, EPS)
    with pytest.raises(ValueError, match="pgd_step_linf_: grad must be a tensor that shares no memory with x"):
        ops.pgd_step_linf_(x[1:], x[:-1], x0[1:], ALPHA, EPS)


@cases()
def test_stays_in_ball_and_range(backend):
    x, grad, x0 = sample((4, 3, 16, 16), torch.float32)
    with harness.owned_by(backend, NAMES):
        for _ in range(5):
            x = ops.pgd_step_linf(x, grad, x0, ALPHA, EPS)
    assert (x - x0).abs().max() <= EPS + 1e-7
    assert 0 <= x.min() <= x.max() <= 1


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


@cases(layout=harness.LAYOUTS)
def test_in_place_draws_and_numbers(backend, layout):
    _steps.check_in_place(STEP, backend, layout)


@cases()
def test_gradients_of_draws(backend):
    _steps.check_gradients(STEP, backend, differentiable=(0, 2))


def test_compiles_once_for_all_numbers():
    _steps.check_compiles_once(STEP)


@cases()
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend):
    _steps.check_bad_input(STEP, backend, NAMES)


def test_wrong_types():
    with pytest.raises(TypeError, match=r"pgd_step_linf: x must be a torch.Tensor, got list"):
        ops.pgd_step_linf([0.5], torch.rand(1), torch.rand(1), ALPHA, EPS)
    with pytest.raises(TypeError, match="pgd_step_linf: eps must be a number, got str"):
        ops.pgd_step_linf(torch.rand(1), torch.rand(1), torch.rand(1), ALPHA, "8/255")


@pytest.mark.slow
@pytest.mark.gpu
@cases()
def test_more_than_2_to_the_31_elements(backend):
    n = 2**31 + 5
    x0 = torch.full((n,), 0.5, device=DEVICE)
    x, grad = x0.clone(), torch.ones_like(x0)
    with harness.owned_by(backend, NAMES):
        ops.pgd_step_linf_(x, grad, x0, ALPHA, EPS)
    assert torch.equal(x[-9:], torch.full((9,), 0.5 + ALPHA, device=DEVICE))
