"""contextual_attention: the harness, and what is special to it."""

from __future__ import annotations

import importlib

import _harness as harness
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast import ops

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.contextual_attention")
NAMES = ("contextual_attention", "contextual_attention_bwd")
# No samples, no channels, one place, rows and columns of one, and nothing round.
SHAPES = ((0, 3, 4, 4), (2, 0, 4, 6), (1, 3, 2, 2), (1, 2, 2, 10), (2, 3, 12, 2), (3, 5, 6, 10), (2, 19, 14, 8))


def sample(shape, dtype):
    """Scores of a few units, so that the softmax neither saturates nor is flat; of two samples, one all masked."""
    batch, _, height, width = shape
    valid = torch.rand(batch, height // 2, width // 2, device=DEVICE) < 0.6
    valid[1:2] = False
    return (0.15 * torch.randn(shape, device=DEVICE)).to(dtype), valid


def by_the_definition(features, mask):
    """Steps 1 to 8 of the definition, written with indices; slow, and differentiable."""
    channels, height, width = features.shape[1:]
    rows, columns, step = height // 2, width // 2, 2 * mask.shape[2] // height
    count = rows * columns
    results = []
    for b, m in zip(features, mask[:, 0], strict=True):
        wide = torch.zeros(channels, height + 2, width + 2, dtype=b.dtype, device=b.device)
        wide[:, 1:-1, 1:-1] = b
        small = torch.zeros(channels, rows + 2, columns + 2, dtype=b.dtype, device=b.device)
        small[:, 1:-1, 1:-1] = b[:, ::2, ::2]
        masked = torch.zeros(rows + 2, columns + 2, device=b.device)
        masked[1:-1, 1:-1] = m[::step, ::step]
        places = [(i, j) for i in range(rows) for j in range(columns)]
        keys = torch.stack([small[:, i : i + 3, j : j + 3].flatten() for i, j in places])
        values = [wide[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] for i, j in places]
        valid = torch.stack([(masked[i : i + 3, j : j + 3] == 0).all() for i, j in places]).to(b.dtype)
        scores = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-4) @ keys.T
        # The number of every place in the order of columns.
        turned = [j * rows + i for i, j in places]
        back = sorted(range(count), key=turned.__getitem__)
        for order in (list(range(count)), back):
            s = scores[order][:, order]
            fused = s.clone()
            fused[1:, 1:] = fused[1:, 1:] + s[:-1, :-1]
            fused[:-1, :-1] = fused[:-1, :-1] + s[1:, 1:]
            undo = sorted(range(count), key=order.__getitem__)
            scores = fused[undo][:, undo]
        a = torch.softmax(10 * scores * valid[:, None], dim=0) * valid[:, None]
        pasted = torch.zeros_like(wide)
        for p, (i, j) in enumerate(places):
            pasted[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += sum(a[n, p] * v for n, v in enumerate(values))
        results.append(pasted[:, 1:-1, 1:-1] / 4)
    return torch.stack(results)


SPEC = harness.Spec(
    name="contextual_attention",
    call=spec_module.OP,
    formula=spec_module.formula,
    sample=sample,
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    shapes=SHAPES,
    exact=False,
    ops=NAMES,
)


@cases(op="contextual_attention", size=((2, 2), (8, 6), (2, 10), (10, 2)), scale=(1, 4))
def test_definition(backend, size, scale):
    features = (0.2 * torch.randn(2, 3, *size, device=DEVICE, dtype=torch.float64)).requires_grad_()
    mask = (torch.rand(2, 1, scale * size[0], scale * size[1], device=DEVICE) < 0.1).float()
    expected = by_the_definition(features, mask)
    with harness.owned_by(backend, NAMES):
        y = ops.contextual_attention(features, mask)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
        dy = torch.randn_like(y)
        actual, wanted = (torch.autograd.grad(result, features, dy)[0] for result in (y, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


def test_formula_is_the_definition():
    features = 0.2 * torch.randn(2, 3, 8, 10, dtype=torch.float64)
    mask = (torch.rand(2, 1, 8, 10) < 0.1).float()
    formula = spec_module.formula(features, spec_module._valid(mask, features))
    torch.testing.assert_close(formula, by_the_definition(features, mask), rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("poisoned_memory")
@cases(op="contextual_attention", dtype=SPEC.dtypes, shape=SHAPES)
def test_matches_formula(backend, dtype, shape):
    harness.check_forward(SPEC, backend, sample(shape, dtype))
