"""hyperplane_step: every backend against the specification. tests/test_fab.py compares it with solvers."""

from __future__ import annotations

import importlib

import _harness as harness
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast import ops

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.hyperplane_step")
NAMES = ("hyperplane_step",)
NORMS = ("Linf", "L2", "L1")


def sample(rows, n, dtype=torch.float32):
    """Points, some at the box's ends; normals, some 0 or small; changes, some negative, 0 or out of reach."""
    x, w = torch.rand(rows, n, dtype=dtype, device=DEVICE), torch.randn(rows, n, dtype=dtype, device=DEVICE)
    w[::3] *= torch.rand_like(w[::3]) > 0.5
    w[1::3] *= torch.rand_like(w[1::3]) ** 4
    x[1::4] = x[1::4].round()
    change = torch.randn(rows, dtype=dtype, device=DEVICE) * n**0.5
    return x, w, change * (torch.arange(rows, device=DEVICE) % 5 > 0)


@pytest.mark.usefixtures("poisoned_memory")
@cases(op="hyperplane_step", norm=NORMS, n=(1, 7, 49, 1025))
def test_matches_formula(backend, norm, n):
    x, w, change = sample(40, n)
    with harness.owned_by(backend, NAMES):
        step = ops.hyperplane_step(norm, x, w, change)
        torch.testing.assert_close(step, spec_module.formula(x, w, change, norm), rtol=1e-5, atol=1e-6)
        assert torch.equal(ops.hyperplane_step(norm, *(t[3:].clone() for t in (x, w, change))), step[3:])
    with harness.owned_by(backend, NAMES):
        wide = [t.double() for t in (x, w, change)]
        torch.testing.assert_close(
            ops.hyperplane_step(norm, *wide), spec_module.formula(*wide, norm), rtol=1e-9, atol=1e-12
        )


@cases(op="hyperplane_step")
def test_no_rows(backend):
    x = torch.rand(0, 5, device=DEVICE)
    with harness.owned_by(backend, NAMES):
        assert spec_module.OP(x, x, x[:, 0], True).shape == (0, 5)


@cases(op="hyperplane_step", l2=(False, True), traced={"l2": [True]})
def test_opcheck(backend, l2, parts):
    with harness.owned_by(backend, NAMES):
        harness.opcheck(spec_module.OP, (*sample(3, 6), l2), parts)


@cases(op="hyperplane_step")
def test_bad_input(backend):
    x, w, change = sample(3, 4)
    bad = (
        ((x.half(), w, change), TypeError, "x must be a float32 or float64 tensor, got torch.float16"),
        ((x[0], w, change), ValueError, r"x must be of shape \(B, n\), got \(4,\)"),
        ((x, w[:2], change), ValueError, r"w must be of dtype and shape of x, \(3, 4\), got \(2, 4\)"),
        ((x, w, change[1:]), ValueError, r"change must be of dtype of x and shape \(3,\), got \(2,\)"),
    )
    with harness.owned_by(backend, NAMES):
        for arguments, error, words in bad:
            with pytest.raises(RuntimeError if backend == "cpp" else error, match=f"hyperplane_step: {words}"):
                spec_module.OP(*arguments, True)
    with pytest.raises(ValueError, match="hyperplane_step: norm must be"):
        ops.hyperplane_step("L3", x, w, change)
