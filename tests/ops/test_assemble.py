"""assemble: every pixel from its copy, the gradient back to it, and the inverse of corrupt's masks."""

from __future__ import annotations

import importlib
import math

import _harness as harness
import pytest
import torch
from _harness import DEVICE, cases, random_owners

from atop_fast import ops

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.assemble")
NAMES = ("assemble", "assemble_bwd")
ALL_NAMES = (*NAMES, "random_normal", "mask_blocks", "corrupt")
# Samples, channels, height, width; patch; copies.
GEOMETRY = {
    "empty": ((0, 3, 8, 8), 4, 2),
    "no_channels": ((2, 0, 8, 8), 4, 2),
    "pixel": ((2, 3, 1, 1), 1, 1),
    "whole": ((3, 1, 9, 9), 9, 2),
    "odd": ((2, 3, 5, 7), 1, 4),
    "rows": ((2, 5, 6, 10), 2, 3),
    "strips": ((2, 2, 40, 44), 4, 2),
    "odd_strips": ((1, 1, 33, 35), 1, 5),
}


def sample(geometry, dtype=torch.float32):
    (batch, *plane), patch, copies = GEOMETRY[geometry]
    purified = torch.randn(batch * copies, *plane, device=DEVICE).to(dtype)
    return purified, random_owners(batch, plane[1:], patch, copies), patch, copies


def check_all(backend, purified, blocks, patch, copies, layout="contiguous"):
    """Both ops against their references."""
    harness.check_reference(backend, "assemble", purified, blocks, patch)
    dy = torch.randn(len(blocks), *purified.shape[1:], device=DEVICE).to(purified.dtype)
    harness.check_reference(backend, "assemble_bwd", harness.in_layout(dy, layout), blocks, patch, copies)


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", geometry=tuple(GEOMETRY))
def test_matches_reference(backend, geometry):
    check_all(backend, *sample(geometry))


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", dtype=spec_module.FLOATS, layout=harness.LAYOUTS)
def test_dtypes_and_layouts(backend, dtype, layout):
    purified, blocks, patch, copies = sample("rows", dtype)
    purified = harness.in_layout(purified, layout)
    check_all(backend, purified, harness.in_layout(blocks, "sliced"), patch, copies, layout)
    with harness.owned_by(backend, NAMES):
        y = ops.assemble(purified, blocks, patch)
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@cases(geometry=("pixel", "odd", "rows"))
def test_formula(backend, geometry):
    """Values and gradients of torch's own operations."""
    purified, blocks, patch, _ = sample(geometry)
    mine, theirs = (purified.clone().requires_grad_() for _ in range(2))
    expected = spec_module.formula(theirs, blocks, patch)
    dy = torch.randn_like(expected)
    with harness.owned_by(backend, NAMES):
        y = ops.assemble(mine, blocks, patch)
        (dx,) = torch.autograd.grad(y, mine, dy)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, theirs, dy)[0], rtol=0, atol=0)


@cases()
def test_takes_nothing_from_other_copies(backend):
    """NaN and infinity pass from the copy that masked a block, and from no other."""
    blocks = torch.tensor([[0, 1, 2, 0]], dtype=torch.uint8, device=DEVICE)
    purified = torch.tensor([math.nan, math.inf], device=DEVICE).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    with harness.owned_by(backend, NAMES):
        y = ops.assemble(purified, blocks, 2)[0, 0, ::2, ::2].flatten()
        dx = spec_module.OP_BWD(torch.full((1, 1, 4, 4), math.nan, device=DEVICE), blocks, 2, 2)[:, 0, ::2, ::2]
    torch.testing.assert_close(y, torch.tensor([math.nan, math.inf, 0, math.nan], device=DEVICE), equal_nan=True)
    assert dx.flatten(1).isnan().tolist() == [[True, False, False, True], [False, True, False, False]]


@cases(copies=(1, 2, 3, 6))
def test_undoes_the_masks_of_corrupt(backend, copies):
    """The masks of all copies cover the image once: a purifier that restores what is masked restores everything."""
    x = torch.rand(3, 2, 12, 8, device=DEVICE)
    keys = {"seed": 3, "sample_ids": torch.tensor([5, 2, 9], device=DEVICE)}
    with harness.owned_by(backend, ALL_NAMES):
        y = ops.corrupt(x, patch=4, mask_ratio=1.0, copies=copies, sigma=0.0, **keys)
        blocks = ops.mask_blocks(6, 6, copies=copies, **keys)
        restored = torch.where(y[:, 3:] == 1, (2 * x - 1).repeat_interleave(copies, dim=0), math.nan)
        assert torch.equal(ops.assemble(restored, blocks, 4), 2 * x - 1)
    assert (y[:, 3].unflatten(0, (3, copies)).sum(dim=1) == 1).all()


@cases()
def test_gradcheck(backend):
    purified = torch.randn(4, 1, 2, 4, device=DEVICE, dtype=torch.float64, requires_grad=True)
    blocks = torch.tensor([[0, 1], [2, 0]], dtype=torch.uint8, device=DEVICE)
    with harness.owned_by(backend, NAMES):
        harness.gradcheck(backend, lambda t: ops.assemble(t, blocks, 2), purified)


@cases()
def test_second_backward_same(backend):
    purified, blocks, patch, _ = sample("rows")
    purified.requires_grad_()
    with harness.owned_by(backend, NAMES):
        y = ops.assemble(purified, blocks, patch)
        dy = torch.randn_like(y)
        first = torch.autograd.grad(y, purified, dy, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(y, purified, dy)[0], first)


@cases()
def test_double_backward_raises(backend):
    purified, blocks, patch, _ = sample("rows")
    purified.requires_grad_()
    with harness.owned_by(backend, NAMES):
        y = ops.assemble(purified, blocks, patch)
        (dx,) = torch.autograd.grad(y, purified, torch.ones_like(y).requires_grad_(), create_graph=True)
        with pytest.raises(RuntimeError, match="assemble: double backward is not supported"):
            dx.sum().backward()


@cases(
    layout=("contiguous", "channels_last"), requires_grad=(False, True),
    traced={"layout": ["channels_last"], "requires_grad": [True]},
)  # fmt: skip
def test_opcheck(backend, layout, requires_grad, parts):
    purified, blocks, patch, copies = sample("odd")
    purified = harness.in_layout(purified, layout).detach().requires_grad_(requires_grad)
    with harness.owned_by(backend, NAMES):
        harness.opcheck(spec_module.OP, (purified, blocks, patch), parts)
        if requires_grad:
            harness.opcheck(spec_module.OP_BWD, (purified.detach()[:2], blocks, patch, copies), parts)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", harness.COMPILERS)
def test_compiles(compiler):
    def call(purified, blocks):
        return ops.assemble(purified, blocks, 4)

    def tensors(n):
        return torch.randn(2 * n, 3, 8, 12, device=DEVICE), random_owners(n, (8, 12), 4, 2)

    spec = harness.Spec("assemble", call, call, tensors, (), (), True, ops=NAMES)
    harness.check_compiled(spec, harness.backends(), [tensors(n) for n in (2, 5, 7)], compiler)


BAD = [
    ({"copies": torch.zeros(4, 3, 4, 4).int()}, TypeError, "copies must be a float32, .* tensor, got torch.int32"),
    (
        {"copies": torch.zeros(3, 3, 4, 4)},
        ValueError,
        r"copies must be of shape \(B \* N, C, H, W\) for B = 2, got \(3,",
    ),
    ({"copies": torch.zeros(4, 4, 4)}, ValueError, r"copies must be .*\(.*C, H, W\).*, got \(4, 4, 4\)"),
    ({"blocks": torch.zeros(2, 4)}, TypeError, "blocks must be a uint8 tensor, got torch.float32"),
    ({"blocks": torch.zeros(2, 3).byte()}, ValueError, r"blocks must be of shape \(B, 4\), got \(2, 3\)"),
    ({"blocks": torch.zeros(4).byte()}, ValueError, r"blocks must be of shape \(B, (4|blocks)\), got \(4,\)"),
    ({"copies": torch.tensor(0.0)}, ValueError, r"copies must be .*C, H, W\).*, got \(\)"),
    ({"blocks": torch.tensor(0).byte()}, ValueError, r"blocks must be of shape \(B, blocks\), got \(\)"),
    ({"patch": 3}, ValueError, "copies must be of a height and width divisible by patch=3, got 4 x 4"),
    (
        {"patch": 0},
        ValueError,
        "(copies must be of a height and width divisible by patch=0|patch must be an integer and >= 1, got 0)",
    ),
]


@cases(bad=range(len(BAD)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend, bad):
    change, error, words = BAD[bad]
    arguments = {"copies": torch.zeros(4, 3, 4, 4), "blocks": torch.zeros(2, 4).byte(), "patch": 2, **change}
    with harness.owned_by(backend, NAMES):
        with pytest.raises(error, match=f"assemble: {words}"):
            ops.assemble(**arguments)
        with pytest.raises(RuntimeError if backend == "cpp" else error, match=f"assemble: {words}"):
            torch.ops.atop_fast.assemble(**arguments)


@cases()
def test_bad_upstream_gradient(backend):
    blocks, error = torch.zeros(2, 4, device=DEVICE).byte(), RuntimeError if backend in ("cpp", "cuda") else ValueError
    with harness.owned_by(backend, NAMES):
        for dy in (torch.zeros(3, 3, 4, 4, device=DEVICE), torch.zeros(2, 4, 4, device=DEVICE)):
            with pytest.raises(error, match=r"assemble_bwd: (dy|blocks) must be"):
                spec_module.OP_BWD(dy, blocks, 2, 2)


def test_wrong_types():
    purified, blocks = torch.zeros(4, 3, 4, 4), torch.zeros(2, 4).byte()
    with pytest.raises(TypeError, match=r"assemble: copies must be a torch.Tensor, got list"):
        ops.assemble([0.5], blocks, 2)
    with pytest.raises(TypeError, match=r"assemble: blocks must be a torch.Tensor, got int"):
        ops.assemble(purified, 4, 2)
    with pytest.raises(TypeError, match="assemble: patch must be an integer, got float"):
        ops.assemble(purified, blocks, 2.0)
