"""frozen_conv: against torch's convolution, and that a sample's result depends on nothing but the sample."""

from __future__ import annotations

import functools
import importlib

import _harness as harness
import pytest
import torch
from _harness import DEVICE
from torch import nn

from atop_fast import ops

spec_module = importlib.import_module("atop_fast.ops.frozen_conv")
NAMES = ("frozen_conv", "frozen_conv_bwd")
cases = functools.partial(harness.cases, op="frozen_conv")
# Batch, channels, outputs, height, width, rows and columns of weights, stride, padding: as networks have them; sizes
# that divide nothing; several bands of rows; strides that jump over pixels; padding beyond the weights.
SHAPES = (
    (2, 3, 24, 16, 16, 3, 3, 2, 1),
    (2, 24, 48, 9, 12, 3, 3, 2, 1),
    (2, 17, 70, 7, 6, 1, 1, 2, 0),
    (1, 64, 20, 40, 41, 5, 3, 1, 2),
    (2, 2, 5, 11, 13, 7, 5, 3, 3),
    (1, 5, 16, 10, 9, 2, 2, 4, 0),
    (3, 1, 1, 1, 1, 1, 1, 1, 2),
    (0, 4, 4, 4, 4, 3, 3, 1, 1),
)


def sample(shape):
    batch, channels, outputs, height, width, rows, columns, stride, padding = shape
    x = torch.randn(batch, channels, height, width, device=DEVICE)
    weight = torch.randn(outputs, channels, rows, columns, device=DEVICE)
    bias = torch.randn(outputs, device=DEVICE)
    return x, weight, bias, torch.randn_like(spec_module.formula(x, weight, bias, stride, padding, None, False))


def call(x, weight, bias, residual, stride, padding, relu):
    prepared = [spec_module.prepare(weight, stride, padding, transposed) for transposed in (False, True)]
    return spec_module.OP(x, weight, bias, *prepared, stride, padding, residual, relu)


@pytest.mark.usefixtures("poisoned_memory")
@cases(shape=SHAPES, residual=(False, True), relu=(False, True))
def test_matches_formula(backend, shape, residual, relu):
    """The outputs, and the gradients in the images and what is added."""
    x, weight, bias, added = sample(shape)
    leaves = [x, added] if residual else [x]
    results = []
    with harness.owned_by(backend, NAMES):
        for function, dtype in ((call, torch.float32), (spec_module.formula, torch.float64)):
            one, *other = (t.to(dtype).requires_grad_() for t in leaves)
            constants = [t.to(dtype) for t in (weight, bias)]
            rest = (*(other or [None]), *shape[-2:], relu)
            if function is call:
                y = call(one, *constants, *rest)
            else:
                y = function(one, *constants, *shape[-2:], *(other or [None]), relu)
            dy = torch.linspace(-1, 2, y.numel(), device=DEVICE, dtype=dtype).view_as(y)
            results.append([y.detach(), *torch.autograd.grad(y, [one, *other], dy)])
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == torch.float32
        bound = 1e-5 * float(expected.abs().max()) if expected.numel() else 0
        torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=bound)


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", layout=harness.LAYOUTS, shape=SHAPES[:2])
def test_layouts(backend, layout, shape):
    """Images in any layout, and their gradients in the layout of the images."""
    x, weight, bias, added = sample(shape)
    with harness.owned_by(backend, NAMES):
        expected = call(x, weight, bias, added, *shape[-2:], True)
        laid = harness.in_layout(x, layout).requires_grad_()
        y = call(laid, harness.in_layout(weight, layout), bias, harness.in_layout(added, layout), *shape[-2:], True)
        assert torch.equal(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)
        (dx,) = torch.autograd.grad(y, laid, harness.in_layout(added, layout))
        z = call(x.requires_grad_(), weight, bias, None, *shape[-2:], False)
        (wanted,) = torch.autograd.grad(z, x, added * (y > 0))
        assert torch.equal(dx, wanted)


@cases(but="eager", shape=((9, 3, 24, 16, 16, 3, 3, 2, 1), (7, 40, 33, 30, 29, 3, 3, 2, 1)))
def test_a_sample_depends_on_nothing_else(backend, shape):
    """The same bits in any batch, at any place of it, with any number of threads."""
    x, weight, bias, added = sample(shape)
    threads = torch.get_num_threads()

    def both(x, added):
        leaf = x.clone().requires_grad_()
        y = call(leaf, weight, bias, None, *shape[-2:], True)
        return torch.cat([y.flatten(1), *torch.autograd.grad(y, leaf, added)[0].flatten(1)[None]], dim=1).detach()

    with harness.owned_by(backend, NAMES):
        expected = torch.cat([both(*pair) for pair in zip(x.split(1), added.split(1), strict=True)])
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(both(x, added), expected)
                assert torch.equal(both(x.flip(0), added.flip(0)), expected.flip(0))
        finally:
            torch.set_num_threads(threads)


@cases(requires_grad=(False, True), traced={"requires_grad": [True]})
def test_opcheck(backend, requires_grad, parts):
    x, weight, bias, added = sample(SHAPES[1])
    prepared = [spec_module.prepare(weight, 2, 1, transposed) for transposed in (False, True)]
    x, added = (t.requires_grad_(requires_grad) for t in (x, added))
    with harness.owned_by(backend, NAMES):
        harness.opcheck(spec_module.OP, (x, weight, bias, *prepared, 2, 1, added, True), parts)
        dy = torch.randn_like(added).detach()
        arguments = (dy, weight, prepared[1], 9, 12, 2, 1, True, added.detach())
        harness.opcheck(spec_module.OP_BWD, arguments, parts)


@cases()
def test_double_backward_raises(backend):
    x, weight, bias, _ = sample(SHAPES[1])
    with harness.owned_by(backend, NAMES):
        y = call(x.requires_grad_(), weight, bias, None, 2, 1, False)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="frozen_conv: double backward is not supported"):
            dx.sum().backward()


@cases()
def test_bad_input(backend):
    x, weight, bias, added = sample(SHAPES[1])
    bad = (
        ((x.double(), weight, bias, added), TypeError, "x must be a float32 tensor, got torch.float64"),
        ((x, weight, bias[1:], added), ValueError, r"bias must be of shape \(48,\), got \(47,\)"),
        ((x, weight, bias, added[1:]), ValueError, r"residual must be of shape \(2, 48, 5, 6\), got \(1, 48, 5, 6\)"),
    )
    with harness.owned_by(backend, NAMES):
        for arguments, error, words in bad:
            with pytest.raises(RuntimeError if backend == "cpp" else error, match=f"frozen_conv: {words}"):
                call(*arguments, 2, 1, False)
        with pytest.raises(ValueError, match="frozen_conv: weight must be without gradients, and bias too"):
            call(x.requires_grad_(), weight.requires_grad_(), bias, added, 2, 1, False)


@pytest.mark.parametrize("kind", [ops.FrozenConv, ops.FrozenConv3x3])
@pytest.mark.parametrize("relu", [False, True])
def test_modules(kind, relu):
    """With a residual, one that is broadcast, and none; in float64 by torch's convolution."""
    options = {"stride": 2, "bias": False} if kind is ops.FrozenConv else {}
    convolution = nn.Conv2d(16, 32, 3, padding=1, **options).requires_grad_(False)
    frozen, x = kind(convolution, relu), torch.randn(2, 16, 8, 12)
    y = convolution(x)
    for residual in (None, torch.randn_like(y), torch.randn(32, 1, 1), torch.randn(5, 2, *y.shape[1:])[:, :1]):
        expected = y if residual is None else y + residual
        expected = expected.relu() if relu else expected
        torch.testing.assert_close(frozen(x, residual), expected, rtol=1e-4, atol=1e-5)
    y = convolution.double()(x.double())
    assert torch.equal(frozen.double()(x.double()), y.relu() if relu else y)


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({}, True),
        ({"stride": 3, "padding": 2, "bias": False}, True),
        ({"kernel_size": (1, 7)}, True),
        ({"stride": (1, 2)}, False),
        ({"padding": (1, 0)}, False),
        ({"stride": 1}, False),
        ({"stride": 1, "in_channels": 15}, True),
        ({"stride": 1, "in_channels": 15, "padding": "same"}, False),
        ({"dilation": 2}, False),
        ({"groups": 2}, False),
        ({"padding_mode": "reflect", "padding": 1}, False),
        ({"dtype": torch.float64}, False),
        ({"out_channels": 2000}, False),
    ],
    ids=str,
)
def test_accepts(options, accepted):
    convolution = nn.Conv2d(**{"in_channels": 16, "out_channels": 32, "kernel_size": 3, "stride": 2, **options})
    assert ops.FrozenConv.accepts(convolution) == accepted
    if not accepted:
        with pytest.raises(ValueError, match="FrozenConv: convolution must be a float32 convolution on the CPU"):
            ops.FrozenConv(convolution)
