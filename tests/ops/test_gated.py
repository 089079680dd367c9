"""gated_elu: the harness, and what is special to it."""

from __future__ import annotations

import importlib
import math

import _harness as harness
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast import ops

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.gated_elu")
NAMES = ("gated_elu", "gated_elu_bwd")
# Outputs of 0, 1, a block and one less or more, and nothing round.
SHAPES = ((0, 4, 3, 3), (2, 0, 3, 3), (1, 2, 1, 1), (1, 2, 3, 341), (1, 2, 25, 41), (1, 2, 32, 32), (2, 6, 33, 35))


def sample(shape, dtype):
    return ((3 * torch.randn(shape, device=DEVICE)).to(dtype),)


SPEC = harness.Spec(
    name="gated_elu",
    call=ops.gated_elu,
    formula=spec_module.formula,
    sample=sample,
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    shapes=SHAPES,
    exact=False,
    ops=NAMES,
)


@pytest.mark.usefixtures("poisoned_memory")
@cases(dtype=SPEC.dtypes, shape=SHAPES)
def test_matches_formula(backend, dtype, shape):
    harness.check_forward(SPEC, backend, sample(shape, dtype))


@pytest.mark.usefixtures("poisoned_memory")
@cases(dtype=SPEC.dtypes, shape=SHAPES)
def test_gradients(backend, dtype, shape):
    harness.check_gradients(SPEC, backend, sample(shape, dtype))


@pytest.mark.usefixtures("poisoned_memory")
@cases(layout=harness.LAYOUTS, dtype=SPEC.dtypes)
def test_layouts(backend, layout, dtype):
    h = harness.in_layout(*sample((2, 6, 9, 7), dtype), layout)
    harness.check_forward(SPEC, backend, (h,))
    harness.check_gradients(SPEC, backend, (h,))
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert harness.run(SPEC, backend, (h,)).is_contiguous(memory_format=wanted)


@cases(layout=harness.LAYOUTS)
def test_upstream_gradient_in_another_layout(backend, layout):
    (h,) = sample((2, 6, 9, 7), torch.float32)
    dy = torch.randn(2, 3, 9, 7, device=DEVICE)
    expected = spec_module.reference_bwd(dy, h)
    with harness.owned_by(backend, NAMES):
        actual = spec_module.OP_BWD(harness.in_layout(dy, layout), h)
    torch.testing.assert_close(actual, expected)


@cases(dtype=SPEC.dtypes)
def test_nan_and_infinity(backend, dtype):
    odd = torch.tensor([0.5, -0.5, 0.0, -0.0, math.nan, math.inf, -math.inf, 3.0], device=DEVICE)
    f, g = torch.meshgrid(odd, odd, indexing="ij")
    h = torch.stack([f, g])[None].to(dtype)
    harness.check_forward(SPEC, backend, (h,))
    with harness.owned_by(backend, NAMES):
        dh = spec_module.OP_BWD(torch.ones_like(h[:, :1]), h)
    torch.testing.assert_close(dh, spec_module.reference_bwd(torch.ones_like(h[:, :1]), h), equal_nan=True)


@cases()
def test_saturates(backend):
    """Large arguments overflow nowhere; below the smallest normal number the result may be 0."""
    odd = torch.tensor([0.5, -0.5, 80.0, -80.0, 90.0, -90.0, 800.0, -800.0], device=DEVICE)
    f, g = torch.meshgrid(odd, odd, indexing="ij")
    h = torch.stack([f, g])[None]
    y, expected = harness.run(SPEC, backend, (h,)).double(), spec_module.formula(h.double())
    torch.testing.assert_close(y, expected, rtol=4e-7, atol=800 * torch.finfo(torch.float32).tiny)


@cases()
def test_relative_accuracy_near_zero(backend):
    """elu(f) is f itself for small f; 1 - exp would lose every digit."""
    f = -torch.logspace(-30, -1, 301, device=DEVICE).reshape(1, 1, 7, 43)
    h = torch.cat([f, torch.zeros_like(f)], dim=1)
    y = harness.run(SPEC, backend, (h,))
    expected = spec_module.formula(h.double())
    assert ((y - expected) / expected).abs().max() < 2.5 * torch.finfo(torch.float32).eps


@cases()
def test_gradcheck(backend):
    h = torch.randn(2, 4, 3, 2, device=DEVICE, dtype=torch.float64)
    harness.check_gradcheck(SPEC, backend, (h + 0.1 * h.sign(),))


@cases()
def test_second_backward_same(backend):
    harness.check_second_backward_same(SPEC, backend, sample((2, 4, 5, 7), torch.float32))


@cases()
def test_double_backward_raises(backend):
    h = torch.randn(1, 2, 3, 3, device=DEVICE, requires_grad=True)
    with harness.owned_by(backend, NAMES):
        (dh,) = torch.autograd.grad(ops.gated_elu(h).sum(), h, create_graph=True)
        with pytest.raises(RuntimeError, match="gated_elu: double backward is not supported"):
            dh.sum().backward()


@cases(layout=harness.LAYOUTS, requires_grad=(False, True))
def test_opcheck(backend, layout, requires_grad):
    harness.check_opcheck(
        SPEC, backend, [harness.in_layout(*sample((2, 4, 4, 5), torch.float32), layout)], requires_grad
    )


@cases(layout=harness.LAYOUTS)
def test_opcheck_bwd(backend, layout):
    (h,) = sample((2, 4, 4, 5), torch.float32)
    with harness.owned_by(backend, NAMES):
        dy = torch.randn(2, 2, 4, 5, device=DEVICE)
        torch.library.opcheck(spec_module.OP_BWD, (dy, harness.in_layout(h, layout)))


@cases()
def test_compiles(backend):
    harness.check_compiled(SPEC, backend, [sample((n, 4, 8, 8), torch.float32) for n in (2, 5, 7)])


BAD = [
    (
        torch.zeros(1, 2, 3, 3).int(),
        TypeError,
        "h must be a float32, float64, bfloat16 or float16 tensor, got torch.int32",
    ),
    (torch.zeros(1, 3, 2, 2), ValueError, r"h must be of shape \(B, 2C, H, W\), got \(1, 3, 2, 2\)"),
    (torch.zeros(4, 2), ValueError, r"h must be of shape \(B, 2C, H, W\), got \(4, 2\)"),
]


@cases(bad=range(len(BAD)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend, bad):
    h, error, words = BAD[bad]
    with harness.owned_by(backend, NAMES):
        with pytest.raises(error, match="gated_elu: " + words):
            ops.gated_elu(h)
        with pytest.raises(RuntimeError if backend == "cpp" else error, match="gated_elu: " + words):
            torch.ops.atop_fast.gated_elu(h)


@cases()
def test_bad_upstream_gradient(backend):
    error = RuntimeError if backend in ("cpp", "cuda") else ValueError
    h = torch.zeros(1, 4, 2, 3, device=DEVICE)
    with harness.owned_by(backend, NAMES), pytest.raises(error, match=r"dy must be of the shape of y \(1, 2, 2, 3\)"):
        spec_module.OP_BWD(torch.zeros(1, 4, 2, 3, device=DEVICE), h)


@pytest.mark.slow
@pytest.mark.gpu
@cases(layout=("contiguous", "channels_last"))
def test_more_than_2_to_the_31_elements(backend, layout):
    h = torch.full((2, 64, 4096, 4224), 0.5, device=DEVICE, dtype=torch.bfloat16)
    h = harness.in_layout(h, layout)
    h[-1, :, -1, -1] = 2.0
    y = harness.run(SPEC, backend, (h,))
    expected = spec_module.formula(h[-1:, :, -1:, -2:].double())
    torch.testing.assert_close(y[-1:, :, -1:, -2:].double(), expected, rtol=2**-8, atol=0)
