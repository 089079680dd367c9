"""convolve: torch's convolution, whichever implementation serves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from atop_fast import ops


def sample(size, kernel):
    return torch.randn(2, 16, size, size), torch.randn(20, 16, *kernel), torch.randn(20)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (1, 1), (3, 1)], ids=str)
def test_matches_formula(kernel, dilation, stride):
    leaves = [t.requires_grad_() for t in sample(33, kernel)]
    y = ops.convolve(*leaves, stride, dilation)
    padding = [size // 2 * dilation for size in kernel]
    wide = [t.double() for t in leaves]
    expected = F.conv2d(*wide, stride=stride, padding=padding, dilation=dilation)
    assert y.shape[2] == -(-33 // stride)
    dy = torch.randn_like(y)
    for actual, wanted in (
        (y, expected),
        *zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy.double()), strict=True),
    ):
        assert (actual - wanted).norm() <= 2e-6 * wanted.norm()


def test_autocast_is_torch_s():
    x, weight, bias = sample(32, (3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.convolve(x, weight, bias)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.conv2d(x, weight, bias, padding=1))


def test_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(ops.convolve, fullgraph=True, backend="aot_eager")
    tensors = sample(32, (3, 3))
    assert torch.equal(compiled(*tensors), ops.convolve(*tensors))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(*tensors), ops.convolve(*tensors))
