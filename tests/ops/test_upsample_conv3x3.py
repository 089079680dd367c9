"""upsample_conv3x3: equal to up-sampling and convolution, borders included, with all gradients."""

from __future__ import annotations

import importlib

import pytest
import torch

from atop_fast import ops

spec_module = importlib.import_module("atop_fast.ops.upsample_conv3x3")
# A single pixel is all border.
SHAPES = ((2, 3, 4, 1, 1), (1, 2, 3, 1, 5), (2, 1, 2, 4, 3), (1, 5, 1, 2, 2), (0, 2, 3, 4, 4))


def sample(shape, dtype=torch.float64):
    batch, channels, outputs, height, width = shape
    x = torch.randn(batch, channels, height, width, dtype=dtype)
    return x, torch.randn(outputs, channels, 3, 3, dtype=dtype), torch.randn(outputs, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_formula(shape):
    x, weight, bias = sample(shape)
    for shift in (bias, None):
        expected = spec_module.formula(x, weight, shift)
        torch.testing.assert_close(ops.upsample_conv3x3(x, weight, shift), expected, rtol=1e-13, atol=1e-13)


def test_gradcheck():
    leaves = [t.requires_grad_() for t in sample((2, 2, 3, 2, 3))]
    assert torch.autograd.gradcheck(ops.upsample_conv3x3, leaves)
    assert torch.autograd.gradgradcheck(ops.upsample_conv3x3, leaves)


def test_channels_last_float32():
    x, weight, bias = sample((2, 16, 20, 9, 7), torch.float32)
    y = ops.upsample_conv3x3(x.contiguous(memory_format=torch.channels_last), weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, spec_module.formula(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_autocast():
    """bfloat16 as of a convolution, and no further from the truth than the two steps under the same autocast."""
    x, weight, bias = sample((2, 32, 16, 8, 8), torch.float32)
    expected = spec_module.formula(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        y, own = ops.upsample_conv3x3(x, weight, bias), spec_module.formula(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() <= 1.5 * (own - expected).norm()


def test_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(ops.upsample_conv3x3, fullgraph=True, backend="aot_eager")
    tensors = sample((2, 3, 4, 5, 6), torch.float32)
    assert torch.equal(compiled(*tensors), ops.upsample_conv3x3(*tensors))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(*tensors), ops.upsample_conv3x3(*tensors))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"x": torch.zeros(1, 3, 3, 3)},
            ValueError,
            r"x must be of shape \(B, 2, H, W\), H and W >= 1, got \(1, 3, 3, 3\)",
        ),
        ({"weight": torch.zeros(4, 2, 5, 3)}, ValueError, r"weight must be of shape \(O, C, 3, 3\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be of shape \(4,\), got \(3,\)"),
        ({"x": torch.zeros(1, 2, 3, 3).int()}, TypeError, "x must be a floating-point tensor, got torch.int32"),
    ],
    ids=["x", "weight", "bias", "dtype"],
)
def test_bad_input(change, error, words):
    arguments = {"x": torch.zeros(1, 2, 3, 3), "weight": torch.zeros(4, 2, 3, 3), "bias": None, **change}
    with pytest.raises(error, match=f"upsample_conv3x3: {words}"):
        ops.upsample_conv3x3(**arguments)
