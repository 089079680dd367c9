"""gated_elu and gated_relu: the harness, and what is special to them."""

from __future__ import annotations

import functools
import importlib
import math

import _harness as harness
import pytest
import torch
import torch.nn.functional as F
from _harness import DEVICE, cases

from atop_fast import ops
from atop_fast.ops import gated

NAMES = ("gated", "gated_bwd")
# Outputs of 0, 1, a block and one less or more, and nothing round.
SHAPES = ((0, 4, 3, 3), (2, 0, 3, 3), (1, 2, 1, 1), (1, 2, 3, 341), (1, 2, 25, 41), (1, 2, 32, 32), (2, 6, 33, 35))
# In channels_last: rows of less than a vector, of some and a part of one, of vectors only, and longer than a run.
CHANNELS = (2, 6, 24, 30, 96, 1042)
# For Triton's interpreter: several blocks over lines and images; a column of channels, part of a second, a wide one.
INTERPRETED_SHAPES = {"shape": (*SHAPES[:-1], (2, 6, 17, 13))}
INTERPRETED_CHANNELS = {"channels": (2, 6, 24, 30, 34, 128)}


def sample(shape, dtype, bias=True):
    h = (3 * torch.randn(shape, device=DEVICE)).to(dtype)
    return (h, torch.randn(shape[1], device=DEVICE).to(dtype)) if bias else (h,)


def spec_of(activation, bias=True):
    def formula(h, shift=None):
        return gated.formula(h, shift, gated.ACTIVATIONS.index(activation))

    return harness.Spec(
        name="gated",
        call={"elu": ops.gated_elu, "relu": ops.gated_relu}[activation],
        formula=formula,
        sample=functools.partial(sample, bias=bias),
        dtypes=gated.FLOATS,
        shapes=SHAPES,
        exact=False,
        differentiable=(0, 1) if bias else (0,),
        ops=NAMES,
    )


# Both activations without bias, and one with it where nothing else is at stake.
SPECS = {
    "elu": spec_of("elu", False),
    "relu": spec_of("relu", False),
    "bias": spec_of("elu"),
    "bias_relu": spec_of("relu"),
}
BIASED = ("bias", "bias_relu")


@pytest.mark.usefixtures("poisoned_memory")
@cases(kind=("elu", "relu", "bias"), dtype=gated.FLOATS, shape=SHAPES, interpreted=INTERPRETED_SHAPES)
def test_matches_formula(backend, kind, dtype, shape):
    harness.check_forward(SPECS[kind], backend, SPECS[kind].sample(shape, dtype))


@pytest.mark.usefixtures("poisoned_memory")
@cases(kind=("elu", "relu", "bias"), dtype=gated.FLOATS, shape=SHAPES, interpreted=INTERPRETED_SHAPES)
def test_gradients(backend, kind, dtype, shape):
    check_gradients(kind, backend, SPECS[kind].sample(shape, dtype))


@pytest.mark.usefixtures("poisoned_memory")
@cases(kind=SPECS, layout=harness.LAYOUTS, dtype=gated.FLOATS, interpreted={"dtype": (torch.float32, torch.bfloat16)})
def test_layouts(backend, kind, layout, dtype):
    h, *bias = SPECS[kind].sample((2, 6, 9, 7), dtype)
    h = harness.in_layout(h, layout)
    check_gradients(kind, backend, (h, *bias))
    y = harness.check_forward(SPECS[kind], backend, (h, *bias))
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=wanted)


@pytest.mark.usefixtures("poisoned_memory")
@cases(
    kind=("elu", "bias"),
    dtype=(torch.float32, torch.bfloat16),
    channels=CHANNELS,
    interpreted=INTERPRETED_CHANNELS,
)
def test_channels_last(backend, kind, dtype, channels):
    h, *bias = SPECS[kind].sample((2, channels, 5, 9), dtype)
    h = harness.in_layout(h, "channels_last")
    harness.check_forward(SPECS[kind], backend, (h, *bias))
    check_gradients(kind, backend, (h, *bias))


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager cpp cuda", layout=("contiguous", "channels_last"))
def test_parts_of_sums(backend, layout, monkeypatch):
    """Sums of several programs, and a last part that is shorter, with parts small enough for the interpreter."""
    part = 32 if layout == "contiguous" else 17 * 32
    monkeypatch.setattr(importlib.import_module("atop_fast.kernels.gated"), "PART", part)
    h, bias = sample((2, 34, 5, 9), torch.float32)
    check_gradients("bias", backend, (harness.in_layout(h, layout), bias))


def check_gradients(kind, backend, tensors):
    """Like the harness, but the bias's gradient, a sum in another order, has a tolerance for its rounding and terms."""
    spec = SPECS[kind]
    if len(tensors) == 1:
        return harness.check_gradients(spec, backend, tensors)
    dy = torch.randn_like(spec.formula(*tensors))
    exact = harness.gradients(spec.formula, spec, [t.double() for t in tensors], dy.double())
    eager = harness.gradients(spec.formula, spec, tensors, dy)
    with harness.owned_by(backend, NAMES):
        dh, db = harness.gradients(spec.call, spec, tensors, dy)
    harness.close(spec, dh, exact[0], eager[0])
    assert db.dtype == tensors[1].dtype
    wide = torch.float64 if db.dtype == torch.float64 else torch.float32
    terms = exact[0].abs().sum(dim=(0, 2, 3))
    allowed = 4 * torch.finfo(wide).eps * terms + torch.finfo(db.dtype).eps * exact[1].abs()
    assert ((db - exact[1]).abs() <= allowed).all()


@cases(dtype=(torch.bfloat16, torch.float16), layout=("contiguous", "channels_last"))
def test_float32_bias_of_16_bit_input(backend, dtype, layout):
    """The bias is not rounded to the input's dtype, and its gradient is float32."""
    h, bias = harness.in_layout(sample((2, 6, 5, 7), dtype)[0], layout), torch.randn(6, device=DEVICE)
    y = harness.run(SPECS["bias"], backend, (h, bias))
    assert y.dtype == dtype
    harness.same_bits(y, gated.reference(h, bias, gated.ELU), 1)
    dy = torch.randn(2, 3, 5, 7, device=DEVICE).to(dtype)
    with harness.owned_by(backend, NAMES):
        _, db = gated.OP_BWD(dy, h, bias, gated.ELU, True)
    expected = gated.reference_bwd(dy.double(), h.double(), bias, gated.ELU, True)[1]
    torch.testing.assert_close(db, expected)
    assert db.dtype == torch.float32


@cases(kind=BIASED, layout=("contiguous", "channels_last"))
def test_bias_without_gradient_has_none(backend, kind, layout):
    h, bias = SPECS[kind].sample((2, 6, 5, 7), torch.float32)
    h = harness.in_layout(h, layout).requires_grad_()
    with harness.owned_by(backend, NAMES):
        SPECS[kind].call(h, bias).sum().backward()
        with_bias = h.grad
        assert bias.grad is None
        dh, db = gated.OP_BWD(torch.ones_like(h[:, :3]), h, bias, kind == "bias_relu", False)
    assert db.numel() == 0
    assert torch.equal(dh, with_bias)


@cases(kind=BIASED, layout=("contiguous", "channels_last"), channels=(2, 24, 30), interpreted={"channels": (2, 6)})
def test_gradient_of_bias_changes_no_other(backend, kind, layout, channels):
    """dh has the same bits whether it is summed or not, and the bias added inside or outside; ragged runs included."""
    size = (5, 7) if harness.is_interpreted(backend) else (17, 19)
    h, bias = SPECS[kind].sample((2, channels, *size), torch.float32)
    h, dy = harness.in_layout(h, layout), torch.randn(2, channels // 2, *size, device=DEVICE)
    relu = int(kind == "bias_relu")
    with harness.owned_by(backend, NAMES):
        summed, _ = gated.OP_BWD(dy, h, bias, relu, True)
        assert torch.equal(summed, gated.OP_BWD(dy, h, bias, relu, False)[0])
        assert torch.equal(summed, gated.OP_BWD(dy, h + bias[:, None, None], None, relu, False)[0])
        assert torch.equal(gated.OP(h, bias, relu), gated.OP(h + bias[:, None, None], None, relu))


@cases(but="triton", layout=("contiguous", "channels_last"), dtype=(torch.float32, torch.bfloat16))
def test_large_sums_are_accurate(backend, layout, dtype):
    """A sum of 2 * 10^5 numbers of one sign, which one after the other would be off by 10^-3."""
    h = harness.in_layout((0.1 + torch.rand(2, 6, 320, 320, device=DEVICE)).to(dtype), layout)
    dy, bias = torch.ones_like(h[:, :3]), torch.rand(6, device=DEVICE)
    with harness.owned_by(backend, NAMES):
        _, db = gated.OP_BWD(dy, h, bias, gated.ELU, True)
    _, expected = gated.reference_bwd(dy.double(), h.double(), bias, gated.ELU, True)
    torch.testing.assert_close(db, expected, rtol=1e-6, atol=0)


@pytest.mark.skipif(DEVICE != "cpu", reason="of threads of the CPU")
@cases(but="triton", layout=("contiguous", "channels_last"), channels=(6, 96))
def test_any_number_of_threads(backend, layout, channels):
    h, bias = SPECS["bias"].sample((2, channels, 97, 101), torch.float32)
    h, dy = harness.in_layout(h, layout), torch.randn(2, channels // 2, 97, 101)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with harness.owned_by(backend, NAMES):
                results.append(gated.OP_BWD(dy, h, bias, gated.ELU, True))
    finally:
        torch.set_num_threads(before)
    if backend == "cpp":
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    for dh, db in results[1:]:
        torch.testing.assert_close((dh, db), results[0])


@cases(kind=BIASED, dtype=(torch.bfloat16, torch.float16))
def test_autocast_casts_nothing(backend, kind, dtype):
    convolution = torch.nn.Conv2d(3, 8, 3, bias=False, device=DEVICE)
    x, bias = torch.randn(2, 3, 6, 6, device=DEVICE), torch.randn(8, device=DEVICE, requires_grad=True)
    with harness.owned_by(backend, NAMES):
        with torch.autocast(DEVICE, dtype):
            h = convolution(x)
            y, wide = SPECS[kind].call(h, bias), SPECS[kind].call(h.float(), bias)
        assert (h.dtype, y.dtype, wide.dtype) == (dtype, dtype, torch.float32)
        y.float().sum().backward()
    assert bias.grad.dtype == torch.float32
    assert convolution.weight.grad.isfinite().all()


@cases(layout=harness.LAYOUTS, activation=(0, 1))
def test_upstream_gradient_in_another_layout(backend, layout, activation):
    h, bias = sample((2, 6, 9, 7), torch.float32)
    dy = torch.randn(2, 3, 9, 7, device=DEVICE)
    expected = gated.reference_bwd(dy, h, bias, activation, True)
    with harness.owned_by(backend, NAMES):
        actual = gated.OP_BWD(harness.in_layout(dy, layout), h, bias, activation, True)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@cases(kind=SPECS, dtype=gated.FLOATS, layout=("contiguous", "channels_last"))
def test_nan_and_infinity(backend, kind, dtype, layout):
    odd = torch.tensor([0.5, -0.5, 0.0, -0.0, math.nan, math.inf, -math.inf, 3.0], device=DEVICE)
    f, g = torch.meshgrid(odd, odd, indexing="ij")
    h = harness.in_layout(torch.stack([f, f, g, g])[None].to(dtype), layout)
    bias = [torch.tensor([0.0, 1.0, 0.0, math.inf], device=DEVICE).to(dtype)] * (kind in BIASED)
    harness.check_forward(SPECS[kind], backend, (h, *bias))
    arguments = (torch.ones_like(h[:, :2]), h, bias[0] if bias else None, int("relu" in kind), bool(bias))
    with harness.owned_by(backend, NAMES):
        actual = gated.OP_BWD(*arguments)
    torch.testing.assert_close(actual, gated.reference_bwd(*arguments), equal_nan=True)


@cases(activation=(0, 1))
def test_saturates(backend, activation):
    """Large arguments overflow nowhere; below the smallest normal number the result may be 0."""
    odd = torch.tensor([0.5, -0.5, 80.0, -80.0, 90.0, -90.0, 800.0, -800.0], device=DEVICE)
    f, g = torch.meshgrid(odd, odd, indexing="ij")
    h, bias = torch.stack([f, g])[None], torch.tensor([0.25, -0.25], device=DEVICE)
    spec = SPECS[BIASED[activation]]
    y, expected = harness.run(spec, backend, (h, bias)).double(), spec.formula(h.double(), bias.double())
    torch.testing.assert_close(y, expected, rtol=4e-7, atol=800 * torch.finfo(torch.float32).tiny)


@cases()
def test_relative_accuracy_near_zero(backend):
    """elu(f) is f itself for small f; 1 - exp would lose every digit."""
    f = -torch.logspace(-30, -1, 301, device=DEVICE).reshape(1, 1, 7, 43)
    h = torch.cat([f, torch.zeros_like(f)], dim=1)
    y = harness.run(SPECS["elu"], backend, (h,))
    expected = SPECS["elu"].formula(h.double())
    assert ((y - expected) / expected).abs().max() < 2.5 * torch.finfo(torch.float32).eps


@cases()
def test_slope_of_relu_at_zero_is_that_of_torch(backend):
    f = torch.tensor([-1.0, -0.0, 0.0, 1.0, math.nan], device=DEVICE)
    h = torch.stack([f, torch.full_like(f, 0.3)])[None, :, None].requires_grad_()
    with harness.owned_by(backend, NAMES):
        (dh,) = torch.autograd.grad(ops.gated_relu(h).sum(), h)
    (expected,) = torch.autograd.grad((F.relu(h[:, :1]) * h[:, 1:].sigmoid()).sum(), h)
    torch.testing.assert_close(dh, expected, equal_nan=True)
    assert dh[0, 0, 0, 1:3].eq(0).all()


@cases(kind=SPECS)
def test_gradcheck(backend, kind):
    h, *bias = SPECS[kind].sample((1, 4, 2, 1), torch.float64)
    shift = bias[0][:, None, None] if bias else 0
    # Away from the kinks of what is added.
    moved = h + shift + 0.1 * (h + shift).sign() - shift
    harness.check_gradcheck(SPECS[kind], backend, (moved, *bias))


@cases(kind=SPECS)
def test_second_backward_same(backend, kind):
    harness.check_second_backward_same(SPECS[kind], backend, SPECS[kind].sample((2, 4, 5, 7), torch.float32))


@cases(kind=("elu", "bias_relu"))
def test_double_backward_raises(backend, kind):
    h, *bias = SPECS[kind].sample((1, 2, 3, 3), torch.float32)
    h.requires_grad_()
    with harness.owned_by(backend, NAMES):
        (dh,) = torch.autograd.grad(SPECS[kind].call(h, *bias).sum(), h, create_graph=True)
        with pytest.raises(RuntimeError, match="gated: double backward is not supported"):
            dh.sum().backward()


@cases(
    kind=("relu", "bias"), layout=harness.LAYOUTS, requires_grad=(False, True),
    traced={"kind": ["bias"], "layout": ["channels_last"], "requires_grad": [True]},
)  # fmt: skip
def test_opcheck(backend, kind, layout, requires_grad, parts):
    h, *bias = SPECS[kind].sample((2, 4, 4, 5), torch.float32)
    leaves = [t.requires_grad_(requires_grad) for t in (harness.in_layout(h, layout).detach(), *bias)]
    with harness.owned_by(backend, NAMES):
        harness.opcheck(gated.OP, (leaves[0], leaves[1] if bias else None, int(kind == "relu")), parts)


@cases(layout=harness.LAYOUTS, with_db=(False, True), traced={"layout": ["channels_last"], "with_db": [True]})
def test_opcheck_bwd(backend, layout, with_db, parts):
    h, bias = sample((2, 4, 4, 5), torch.float32)
    with harness.owned_by(backend, NAMES):
        dy = torch.randn(2, 2, 4, 5, device=DEVICE)
        arguments = (dy, harness.in_layout(h, layout), bias, gated.RELU, with_db)
        harness.opcheck(gated.OP_BWD, arguments, parts)


@pytest.mark.parametrize(("kind", "compiler"), harness.compilers_of("elu", "bias_relu"))
def test_compiles(kind, compiler):
    samples = [SPECS[kind].sample((n, 4, 8, 8), torch.float32) for n in (2, 5, 7)]
    harness.check_compiled(SPECS[kind], harness.backends(), samples, compiler)


H = torch.zeros(1, 4, 2, 2)
BAD = [
    (
        (torch.zeros(1, 2, 3, 3).int(),),
        TypeError,
        "h must be a float32, float64, bfloat16 or float16 tensor, got torch.int32",
    ),
    ((torch.zeros(1, 3, 2, 2),), ValueError, r"h must be of shape \(B, 2C, H, W\), got \(1, 3, 2, 2\)"),
    ((torch.zeros(4, 2),), ValueError, r"h must be of shape \(B, 2C, H, W\), got \(4, 2\)"),
    ((H, torch.zeros(2)), ValueError, r"bias must be of shape \(4,\), got \(2,\)"),
    ((H, torch.zeros(4, 1)), ValueError, r"bias must be of shape \(4,\), got \(4, 1\)"),
    (
        (H, torch.zeros(4).double()),
        TypeError,
        "bias must be of the dtype of h torch.float32 or float32, got torch.float64",
    ),
]


@cases(bad=range(len(BAD)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend, bad):
    arguments, error, words = BAD[bad]
    with harness.owned_by(backend, NAMES):
        for function in (ops.gated_elu, ops.gated_relu):
            with pytest.raises(error, match=f"{function.__name__}: {words}"):
                function(*arguments)
        h, bias = (*arguments, None)[:2]
        with pytest.raises(RuntimeError if backend == "cpp" else error, match="gated: " + words):
            gated.OP(h, bias, gated.ELU)
        with pytest.raises(RuntimeError if backend == "cpp" else ValueError, match="activation must be 0 or 1, got 2"):
            gated.OP(H, None, 2)


@cases()
def test_bad_upstream_gradient(backend):
    error = RuntimeError if backend in ("cpp", "cuda") else ValueError
    h = torch.zeros(1, 4, 2, 3, device=DEVICE)
    with harness.owned_by(backend, NAMES):
        with pytest.raises(error, match=r"dy must be of the shape of y \(1, 2, 2, 3\)"):
            gated.OP_BWD(h, h, None, gated.ELU, False)
        with pytest.raises(error, match="with_db must be False without a bias, got True"):
            gated.OP_BWD(h[:, :2], h, None, gated.ELU, True)


@pytest.mark.slow
@pytest.mark.gpu
@cases(layout=("contiguous", "channels_last"))
def test_more_than_2_to_the_31_elements(backend, layout):
    h = torch.full((2, 64, 4096, 4224), 0.5, device=DEVICE, dtype=torch.bfloat16)
    h = harness.in_layout(h, layout)
    h[-1, :, -1, -1] = 2.0
    for kind in ("elu", "bias"):
        bias = [torch.linspace(-1, 1, 64, device=DEVICE)] * (kind == "bias")
        y = harness.run(SPECS[kind], backend, (h, *bias))
        expected = SPECS[kind].formula(h[-1:, :, -1:, -2:].double(), *bias)
        torch.testing.assert_close(y[-1:, :, -1:, -2:].double(), expected, rtol=2**-8, atol=1e-3)
