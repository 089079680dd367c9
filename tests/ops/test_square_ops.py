"""square_linf and square_bump: every backend against the specification, for squares as Square Attack draws them."""

from __future__ import annotations

import _harness as harness
import pytest
import torch
from _harness import cases

from atop_fast.attacks import Square
from atop_fast.attacks.base import initial_state
from atop_fast.attacks.queue import Batch
from atop_fast.attacks.square import _tables
from atop_fast.ops import square

NAMES = ("square_linf", "square_bump")


def queries(norm, batch=6, channels=3, height=11, width=9):
    """Images, candidates, and the arguments of the ops in each of the next queries."""
    x0, labels = torch.rand(batch, channels, height, width), torch.arange(batch)
    x = (x0 + 0.1 * torch.randn_like(x0)).clamp(0, 1)
    x[0] = x0[0]
    attack = Square(torch.nn.Flatten(), norm, eps=1.0, n_queries=40)
    for first in (0, 24):
        state = initial_state(Batch(x0, labels, labels), x) | {"t": torch.full_like(labels, first)}
        for _, _, drawn in attack._squares(3, state):
            yield attack, x, x0, drawn


@pytest.mark.usefixtures("poisoned_memory")
@cases(op="square_linf", but="eager", dtype=(torch.float32, torch.float64))
def test_squares(backend, dtype):
    with harness.owned_by(backend, NAMES):
        for _, *images, drawn in queries("Linf"):
            arguments = [t.to(dtype) for t in (*images, drawn.signs, drawn.rows, drawn.columns)]
            assert torch.equal(square.OP_LINF(*arguments, 0.25), square.square_linf(*arguments, 0.25))


@pytest.mark.usefixtures("poisoned_memory")
@cases(op="square_linf", but="eager", norm=("L2", "L1"), dtype=(torch.float32, torch.float64))
def test_bumps(backend, norm, dtype):
    changed = 0
    with harness.owned_by(backend, NAMES):
        for attack, x, x0, drawn in queries(norm):
            arguments = [t.to(dtype) if t.is_floating_point() else t for t in (x, x0, *drawn, bumps(attack, x))]
            for eps in (0.05, 1.5):
                expected = square.square_bump(*arguments, eps, norm == "L2")
                actual = square.OP_BUMP(*arguments, eps, norm == "L2")
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
                changed += int((expected != x.to(dtype)).any())
    assert changed == 32


def bumps(attack, x):
    return _tables(attack.norm, attack.p_init, *x.shape[2:], x.device)[2]


@cases(op="square_linf", traced={})
def test_opcheck(backend, parts):
    with harness.owned_by(backend, NAMES):
        _, x, x0, drawn = next(iter(queries("Linf")))
        harness.opcheck(square.OP_LINF, (x, x0, drawn.signs, drawn.rows, drawn.columns, 0.25), parts)
        attack, x, x0, drawn = next(iter(queries("L2")))
        harness.opcheck(square.OP_BUMP, (x, x0, *drawn, bumps(attack, x), 0.25, True), parts)


@cases(op="square_linf", but="eager")
def test_bad_input(backend):
    attack, x, x0, drawn = next(iter(queries("L2")))
    rest = (*drawn[1:], bumps(attack, x), 0.25, True)
    with harness.owned_by(backend, NAMES):
        with pytest.raises(RuntimeError, match="square_bump: x must be a float32 or float64 tensor"):
            square.OP_BUMP(x.half(), x0, drawn.signs, *rest)
        with pytest.raises(RuntimeError, match="square_bump: x0 must be of dtype and shape of x"):
            square.OP_BUMP(x, x0[1:], drawn.signs, *rest)
        with pytest.raises(RuntimeError, match="square_bump: signs must be of 3 numbers for each of 6 samples"):
            square.OP_BUMP(x, x0, drawn.signs[:, :2], *rest)
        with pytest.raises(RuntimeError, match=r"square_bump: bump must be in \[0, 20\), got 20"):
            square.OP_BUMP(x, x0, *drawn[:-1], drawn.bump * 0 + 20, bumps(attack, x), 0.25, True)
