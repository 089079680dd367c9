"""contextual_attention: the harness, and what is special to it."""

from __future__ import annotations

import importlib

import _harness as harness
import pytest
import torch
from _harness import DEVICE, cases

from atop_fast import ops
from atop_fast.ops import _registry

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.contextual_attention")
NAMES = ("contextual_attention", "contextual_attention_bwd")
# No samples, no channels, one place, rows and columns of one, and nothing round.
SHAPES = ((0, 3, 4, 4), (2, 0, 4, 6), (1, 3, 2, 2), (1, 2, 2, 10), (2, 3, 12, 2), (3, 5, 6, 10), (2, 19, 14, 8))

# In Triton's interpreter a case takes a second: there, one of each kind.
INTERPRETED = "triton" if DEVICE == "cpu" else ""
TRITON = pytest.mark.skipif("triton" not in harness.backends(NAMES[0]), reason="no triton")


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


# Errors relative to the largest number. The products are other ones than the formula's, and so is their rounding.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 2e-5}

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


def close(actual, expected, dtype):
    assert (actual.dtype, actual.shape) == (dtype, expected.shape)
    if actual.numel():
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCES[dtype] * expected.abs().max() + torch.finfo(torch.float32).tiny


def check(backend, features, valid):
    """The result and its gradient equal those of the formula in float64."""
    dy, results = torch.randn_like(features), []
    exact = (spec_module.formula, features.double(), dy.double())
    for function, inputs, upstream in (exact, (spec_module.OP, features, dy)):
        leaf = inputs.detach().requires_grad_()
        with harness.owned_by(backend, NAMES):
            y = function(leaf, valid)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, upstream)))
    for expected, actual in zip(*results, strict=True):
        close(actual, expected, features.dtype)
    return results[1][0]


@cases(INTERPRETED, op="contextual_attention", size=((2, 2), (8, 6), (2, 10), (10, 2)), scale=(1, 4))
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
@cases(INTERPRETED, op="contextual_attention", dtype=SPEC.dtypes, shape=SHAPES)
def test_matches_formula(backend, dtype, shape):
    check(backend, *sample(shape, dtype))


@pytest.mark.backend("triton")
@TRITON
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((0, 3, 4, 4), torch.float32, "contiguous"),
        ((2, 0, 4, 6), torch.float32, "channels_last"),
        ((1, 3, 2, 2), torch.float64, "sliced"),
        ((1, 2, 2, 10), torch.float16, "contiguous"),
        ((2, 3, 12, 2), torch.float64, "permuted"),
        ((3, 5, 6, 10), torch.bfloat16, "channels_last"),
        ((2, 19, 14, 8), torch.float32, "contiguous"),
    ],
)
def test_triton_in_every_dtype_and_layout(shape, dtype, layout):
    features, valid = sample(shape, dtype)
    check("triton", harness.in_layout(features, layout), valid)


@pytest.mark.backend("triton")
@TRITON
def test_triton_opcheck():
    """Backend-specific guarantees: the arguments are not modified, and the results have the documented form."""
    features, valid = sample((1, 2, 4, 6), torch.float32)
    features = features.contiguous(memory_format=torch.channels_last)
    with harness.owned_by("triton", NAMES):
        for op, arguments in ((spec_module.OP, ()), (spec_module.OP_BWD, (torch.randn(1, 2, 4, 6, device=DEVICE),))):
            torch.library.opcheck(op, (*arguments, features, valid), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("poisoned_memory")
@cases(INTERPRETED, op="contextual_attention", layout=harness.LAYOUTS, dtype=SPEC.dtypes)
def test_layouts(backend, layout, dtype):
    features, valid = sample((3, 18, 6, 8), dtype)
    y = check(backend, harness.in_layout(features, layout), valid)
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@cases(INTERPRETED, op="contextual_attention", layout=harness.LAYOUTS)
def test_upstream_gradient_in_another_layout(backend, layout):
    features, valid = sample((3, 5, 6, 8), torch.float32)
    dy = torch.randn_like(features)
    expected = spec_module.reference_bwd(dy, features, valid)
    with harness.owned_by(backend, NAMES):
        actual = spec_module.OP_BWD(harness.in_layout(dy, layout), features, valid)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@cases(op="contextual_attention", mask=(0, 1))
def test_nothing_or_everything_masked(backend, mask):
    """Without a valid patch there is nothing to paste, and nothing to learn."""
    features = torch.randn(2, 4, 8, 8, device=DEVICE).requires_grad_()
    with harness.owned_by(backend, NAMES):
        y = ops.contextual_attention(features, torch.full((2, 1, 16, 16), float(mask), device=DEVICE))
        (dfeatures,) = torch.autograd.grad(y, features, torch.ones_like(y))
    for result in (y.detach(), dfeatures):
        assert result.isfinite().all()
        assert result.any() == (mask == 0)


@cases(op="contextual_attention", value=(0.0, 1e-6))
def test_norms_below_the_least(backend, value):
    """Keys are divided by 1e-4 at least, and then their norm has no gradient."""
    features = torch.zeros(1, 3, 6, 6, dtype=torch.float64, device=DEVICE)
    features[..., :3] = value * torch.randn(1, 3, 6, 3, dtype=torch.float64, device=DEVICE)
    valid, dy = torch.ones(1, 3, 3, dtype=torch.bool, device=DEVICE), torch.randn_like(features)
    expected, mine = spec_module.formula, spec_module.OP
    with harness.owned_by(backend, NAMES):
        results = []
        for function in (expected, mine):
            leaf = features.clone().requires_grad_()
            y = function(leaf, valid)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
    for actual, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-15)


@cases(op="contextual_attention", place=((0, 0), (3, 5)))
def test_nan_stays_in_its_sample(backend, place):
    features, valid = torch.randn(2, 3, 6, 8, device=DEVICE), torch.ones(2, 3, 4, dtype=torch.bool, device=DEVICE)
    expected = harness.run(SPEC, backend, (features, valid))
    features[0, 0, place[0], place[1]] = float("nan")
    y = harness.run(SPEC, backend, (features, valid))
    assert y[0].isnan().any()
    harness.same_bits(y[1], expected[1])


@cases(op="contextual_attention")
def test_gradcheck(backend):
    features, valid = sample((1, 2, 4, 4) if backend == INTERPRETED else (2, 3, 6, 4), torch.float64)
    valid[-1, 0, 0] = True
    with harness.owned_by(backend, NAMES):
        harness.gradcheck(backend, lambda t: spec_module.OP(t, valid), features.requires_grad_())


@cases(op="contextual_attention")
def test_autocast_changes_nothing(backend):
    """Products of float32 are not rounded to 16 bits on the way."""
    features, valid = sample((1, 5, 4, 4) if backend == INTERPRETED else (1, 5, 6, 8), torch.float32)
    results = []
    for enabled in (False, True):
        with harness.owned_by(backend, NAMES), torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            y = spec_module.OP(features, valid)
            results.append((y, spec_module.OP_BWD(torch.ones_like(y), features, valid)))
    for actual, expected in zip(*results, strict=True):
        harness.same_bits(actual, expected)


@pytest.mark.backend("triton")
@TRITON
def test_triton_rows_in_parts(monkeypatch):
    """Rows of more places than a tile has columns."""
    kernels = importlib.import_module("atop_fast.kernels.contextual_attention")
    monkeypatch.setattr(kernels, "_tile_of", lambda count, block, most: (block // 16, 16))
    check("triton", *sample((1, 3, 6, 14), torch.float32))


@cases(INTERPRETED, op="contextual_attention")
def test_second_backward_same(backend):
    harness.check_second_backward_same(SPEC, backend, sample((2, 4, 6, 8), torch.float32))


@cases(INTERPRETED, op="contextual_attention")
def test_double_backward_raises(backend):
    features, valid = sample((1, 2, 4, 4), torch.float32)
    features.requires_grad_()
    with harness.owned_by(backend, NAMES):
        (d,) = torch.autograd.grad(spec_module.OP(features, valid).sum(), features, create_graph=True)
        with pytest.raises(RuntimeError, match="contextual_attention: double backward is not supported"):
            d.sum().backward()


@cases(INTERPRETED, "contextual_attention", layout=("channels_last", "sliced"), traced={"layout": ["channels_last"]})
def test_opcheck(backend, layout, parts):
    features, valid = sample((2, 4, 4, 6), torch.float32)
    harness.check_opcheck(SPEC, backend, (harness.in_layout(features, layout), valid), True, parts)


@cases(INTERPRETED, "contextual_attention", layout=("channels_last", "sliced"), traced={"layout": ["channels_last"]})
def test_opcheck_bwd(backend, layout, parts):
    features, valid = sample((2, 4, 4, 6), torch.float32)
    with harness.owned_by(backend, NAMES):
        arguments = (torch.randn_like(features), harness.in_layout(features, layout), valid)
        harness.opcheck(spec_module.OP_BWD, arguments, parts)


@pytest.mark.backend("cpp")
@pytest.mark.skipif("cpp" in _registry.MISSING or DEVICE != "cpu", reason="no native build, or a GPU")
def test_bits_depend_on_nothing_else():
    """A sample's result has the same bits in every batch, at every place in it, and with any number of threads."""
    features, valid = sample((5, 20, 22, 18), torch.float32)
    dy, threads, results = torch.randn_like(features), torch.get_num_threads(), []
    try:
        # With more threads than samples they share one; with fewer, each has its own.
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            for size in (1, 2, 5):
                parts = [t.split(size) for t in (dy, features, valid)]
                y = torch.cat([spec_module.OP(*part) for part in zip(*parts[1:], strict=True)])
                d = torch.cat([spec_module.OP_BWD(*part) for part in zip(*parts, strict=True)])
                results.append((y, d))
    finally:
        torch.set_num_threads(threads)
    for y, d in results[1:]:
        harness.same_bits(y, results[0][0])
        harness.same_bits(d, results[0][1])


@pytest.mark.slow
def test_compiles():
    # All sizes of the first sample differ: torch.compile takes equal ones for one size.
    samples = [sample((n, 4, 6, 4), torch.float32) for n in (5, 7)]
    harness.check_compiled(SPEC, harness.backends("contextual_attention"), samples)


def test_public_function_compiles():
    features = torch.randn(2, 3, 8, 6, device=DEVICE)
    mask = (torch.rand(2, 1, 16, 12, device=DEVICE) < 0.1).float()
    torch._dynamo.reset()
    compiled = torch.compile(ops.contextual_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, mask), ops.contextual_attention(features, mask))


SHAPE = r"features must be of shape \(B, C, h, w\), h and w even, got"
BAD_FEATURES = [
    (torch.zeros(1, 2, 4, 4).int(), TypeError, "features must be a float32, float64, bfloat16 or float16 tensor"),
    (
        torch.zeros(1, 2, 3, 4),
        ValueError,
        r"features must be of shape \(B, C, h, w\), h and w even, got \(1, 2, 3, 4\)",
    ),
    (
        torch.zeros(1, 2, 0, 4),
        ValueError,
        r"features must be of shape \(B, C, h, w\), h and w even, got \(1, 2, 0, 4\)",
    ),
    (torch.zeros(4, 2), ValueError, r"features must be of shape \(B, C, h, w\), h and w even, got \(4, 2\)"),
]


@cases(op="contextual_attention", bad=range(len(BAD_FEATURES)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_features(backend, bad):
    features, error, words = BAD_FEATURES[bad]
    with harness.owned_by(backend, NAMES):
        with pytest.raises(error, match="contextual_attention: " + words):
            ops.contextual_attention(features, torch.zeros(1, 1, 8, 8))
        with pytest.raises(RuntimeError if backend == "cpp" else error, match="contextual_attention: " + words):
            torch.ops.atop_fast.contextual_attention(features, torch.ones(1, 2, 2, dtype=torch.bool))


@cases(op="contextual_attention")
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_valid(backend):
    kinds = (RuntimeError, RuntimeError) if backend == "cpp" else (TypeError, ValueError)
    features = torch.zeros(1, 2, 4, 6)
    with harness.owned_by(backend, NAMES):
        with pytest.raises(kinds[0], match=r"valid must be a bool tensor, got torch.float32"):
            spec_module.OP(features, torch.zeros(1, 2, 3))
        with pytest.raises(kinds[1], match=r"valid must be of shape \(1, 2, 3\), got \(1, 3, 2\)"):
            spec_module.OP(features, torch.zeros(1, 3, 2, dtype=torch.bool))
        with pytest.raises(kinds[1], match=r"dy must be of the shape of y \(1, 2, 4, 6\), got \(1, 2, 6, 4\)"):
            spec_module.OP_BWD(torch.zeros(1, 2, 6, 4), features, torch.zeros(1, 2, 3, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(1, 1, 9, 12), (1, 1, 8, 6), (2, 1, 8, 12), (1, 2, 8, 12), (1, 1, 2, 3), (8, 12)])
def test_bad_mask(shape):
    with pytest.raises(ValueError, match=r"mask must be of shape \(1, 1, 4 k, 6 k\) for an integer k, got "):
        ops.contextual_attention(torch.zeros(1, 2, 4, 6), torch.zeros(shape))
