"""conv3x3: the harness, its accuracy, and that a sample's result depends on nothing but the sample."""

from __future__ import annotations

import copy
import functools
import importlib

import _harness as harness
import pytest
import torch
import torch.nn.functional as F
from _harness import DEVICE
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from atop_fast import ops
from atop_fast.ops import _registry

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.conv3x3")
NAMES = ("conv3x3_prepare", "conv3x3", "conv3x3_bwd", "conv3x3_bwd_weight")
cases = functools.partial(harness.cases, op="conv3x3")
native = pytest.mark.skipif("cpp" in _registry.MISSING, reason="no native build")
# Batch, channels, outputs, height, width: whole tiles, vectors and panels; one less or more; less than a tile.
SHAPES = (
    (2, 16, 64, 8, 8),
    (1, 17, 65, 9, 7),
    (2, 33, 130, 5, 12),
    (1, 3, 5, 13, 17),
    (3, 1, 1, 1, 1),
    (2, 7, 20, 3, 2),
    (0, 4, 4, 4, 4),
)


def sample(shape):
    batch, channels, outputs, height, width = shape
    x = torch.randn(batch, channels, height, width, device=DEVICE)
    return x, torch.randn(outputs, channels, 3, 3, device=DEVICE), torch.randn(outputs, device=DEVICE)


def call(x, weight, bias, dilation):
    return spec_module.OP(x, weight, bias, None, None, dilation)


SPEC = harness.Spec(
    name="conv3x3",
    call=call,
    formula=spec_module.formula,
    sample=lambda shape, dtype: sample(shape),
    dtypes=(torch.float32,),
    shapes=SHAPES,
    exact=False,
    numbers=(1,),
    differentiable=(0, 1, 2),
    ops=NAMES,
)


def close(actual, function, *tensors):
    """Assert a small error, in units of what the sum of products would be if none of them canceled."""
    expected = function(*(t.double() for t in tensors))
    assert (actual.shape, actual.dtype) == (expected.shape, torch.float32)
    if actual.numel():
        largest = function(*(t.double().abs() for t in tensors)).max()
        assert (actual - expected).abs().max() <= 1e-6 * largest


@pytest.mark.usefixtures("poisoned_memory")
@cases(shape=SHAPES, dilation=(1, 2, 8))
def test_matches_formula(backend, shape, dilation):
    with harness.owned_by(backend, NAMES):
        x, weight, bias = sample(shape)
        close(call(x, weight, bias, dilation), lambda *t: spec_module.formula(*t, dilation), x, weight, bias)
        close(call(x, weight, None, dilation), lambda *t: spec_module.formula(*t, None, dilation), x, weight)


@pytest.mark.usefixtures("poisoned_memory")
@cases(shape=SHAPES, dilation=(1, 2, 8))
def test_gradients(backend, shape, dilation):
    tensors = sample(shape)
    dy = torch.randn_like(spec_module.formula(*tensors, dilation))
    leaves = [t.requires_grad_() for t in tensors]
    with harness.owned_by(backend, NAMES):
        actual = torch.autograd.grad(call(*leaves, dilation), leaves, dy)
    for i, gradient in enumerate(actual):

        def formula(dy, *tensors, i=i):
            leaves = [t.detach().requires_grad_() for t in tensors]
            return torch.autograd.grad(spec_module.formula(*leaves, dilation), leaves, dy)[i]

        close(gradient, formula, dy, *(t.detach() for t in tensors))


@pytest.mark.usefixtures("poisoned_memory")
@cases(shape=SHAPES, residual=(False, True), relu=(False, True), frozen=(False, True))
def test_sum_and_clamp(backend, shape, residual, relu, frozen):
    """Fused bias, residual and ReLU, and all gradients, also with frozen weights."""
    x, weight, bias = sample(shape)
    added = torch.randn_like(spec_module.formula(x, weight, bias, 1))
    leaves = [t.requires_grad_() for t in ([x] if frozen else [x, weight, bias]) + ([added] if residual else [])]
    with harness.owned_by(backend, NAMES):
        y = spec_module.OP(x, weight, bias, None, None, 1, added if residual else None, relu)
        plain = call(x, weight, bias, 1) + (added if residual else 0)
        assert torch.equal(y, plain.relu() if relu else plain)
        mine, expected = (torch.autograd.grad(z, leaves, added) for z in (y, plain.relu() if relu else plain))
    for one, other in zip(mine, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("poisoned_memory")
@cases(layout=harness.LAYOUTS, weights=harness.LAYOUTS)
def test_layouts(backend, layout, weights):
    x, weight, bias = sample((2, 6, 20, 9, 7))
    dy = torch.randn(2, 20, 9, 7, device=DEVICE)
    laid_x, laid_dy = (harness.in_layout(t, layout) for t in (x, dy))
    laid_weight, laid_bias = harness.in_layout(weight, weights), torch.stack([bias, bias], dim=1)[:, 0]
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    with harness.owned_by(backend, NAMES):
        for actual, expected in (
            (call(laid_x, laid_weight, laid_bias, 2), call(x, weight, bias, 2)),
            (spec_module.OP_BWD(laid_dy, laid_weight, None, 2), spec_module.OP_BWD(dy, weight, None, 2)),
            (
                spec_module.OP_BWD(laid_dy, laid_weight, None, 2, dy.square()),
                spec_module.OP_BWD(dy, weight, None, 2),
            ),
            (
                spec_module.OP(laid_x, laid_weight, laid_bias, None, None, 2, dy, True),
                spec_module.OP(x, weight, bias, None, None, 2, laid_dy, True),
            ),
        ):
            assert actual.is_contiguous(memory_format=wanted)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        dw = spec_module.OP_BWD_WEIGHT(laid_dy, laid_x, 2)
        assert dw.is_contiguous()
        torch.testing.assert_close(dw, spec_module.OP_BWD_WEIGHT(dy, x, 2), rtol=1e-5, atol=1e-4)


@cases(transposed=(False, True), weights=harness.LAYOUTS)
def test_prepare(backend, transposed, weights):
    weight = harness.in_layout(torch.randn(40, 6, 3, 3, device=DEVICE), weights)
    expected = spec_module.reference_prepare(weight, transposed)
    with harness.owned_by(backend, NAMES):
        actual = spec_module.OP_PREPARE(weight, transposed)
        assert torch.equal(spec_module.OP_PREPARE(weight.transpose(0, 1).flip(2, 3), not transposed), actual)
    # Both are computed in float64, in another order, and rounded once.
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(torch.float32).eps, atol=1e-12)
    assert actual.shape == (36, *((1, 40, 16) if transposed else (3, 6, 16)))


@cases(but="eager", dilation=(1, 2))
def test_prepared_is_plain(backend, dilation):
    x, weight, bias = sample((2, 20, 40, 8, 9))
    dy = torch.randn(2, 40, 8, 9)
    with harness.owned_by(backend, NAMES):
        forward, backward = (spec_module.OP_PREPARE(weight, transposed) for transposed in (False, True))
        y = spec_module.OP(x, weight, bias, forward, backward, dilation)
        assert torch.equal(y, call(x, weight, bias, dilation))
        dx = spec_module.OP_BWD(dy, weight, backward, dilation)
        assert torch.equal(dx, spec_module.OP_BWD(dy, weight, None, dilation))


@cases(but="eager", shape=((9, 16, 80, 8, 12), (37, 5, 20, 3, 5), (3, 70, 16, 21, 22)), dilation=(1, 2))
def test_a_sample_depends_on_nothing_else(backend, shape, dilation):
    """The same bits in any batch, at any place of it, with any number of threads."""
    x, weight, bias = sample(shape)
    x = x.contiguous(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    with harness.owned_by(backend, NAMES):
        expected = torch.cat([call(image, weight, bias, dilation) for image in x.split(1)])
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(call(x, weight, bias, dilation), expected)
                assert torch.equal(call(x.flip(0), weight, bias, dilation), expected.flip(0))
                assert torch.equal(call(x[2:], weight, bias, dilation), expected[2:])
        finally:
            torch.set_num_threads(threads)


@cases(but="eager", shape=((9, 16, 80, 8, 12), (37, 5, 20, 3, 5), (3, 70, 16, 21, 22)), dilation=(1, 2))
def test_weight_gradient_has_the_same_bits_on_any_threads(backend, shape, dilation):
    x, _, _ = sample(shape)
    dy = torch.randn(shape[0], shape[2], *shape[3:], device=DEVICE)
    threads = torch.get_num_threads()
    with harness.owned_by(backend, NAMES):
        try:
            torch.set_num_threads(1)
            expected = spec_module.OP_BWD_WEIGHT(dy, x, dilation)
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                assert torch.equal(spec_module.OP_BWD_WEIGHT(dy, x, dilation), expected)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.usefixtures("poisoned_memory")
@cases(batch=(2, 9, 40))
def test_weight_gradient_of_many_tiles(backend, batch):
    """One chunk of tiles; several; several groups in each, and the last ones not full."""
    x, _, _ = sample((batch, 18, 20, 21, 31))
    dy = torch.randn(batch, 20, 21, 31, device=DEVICE)

    def formula(dy, x):
        return spec_module.formula_bwd(dy, x, x.new_empty(20, 18, 3, 3), 2, (False, True))[1]

    with harness.owned_by(backend, NAMES):
        close(spec_module.OP_BWD_WEIGHT(dy, x, 2), formula, dy, x)


@native
@pytest.mark.backend("cpp")
@pytest.mark.parametrize(("channels", "size", "bound"), [(64, 16, 1e-6), (256, 8, 2e-6)])
def test_accuracy(channels, size, bound):
    """On a network's layers the error is that which docs/math.md states."""
    x = torch.randn(4, channels, size, size).relu()
    weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
    expected = spec_module.formula(x.double(), weight.double(), None, 1)
    assert (call(x, weight, None, 1) - expected).norm() <= bound * expected.norm()
    dy = torch.randn_like(x)
    _, expected = spec_module.formula_bwd(dy.double(), x.double(), weight.double(), 1, (False, True))
    assert (spec_module.OP_BWD_WEIGHT(dy, x, 1) - expected).norm() <= bound * expected.norm()


@cases()
def test_second_backward_same(backend):
    harness.check_second_backward_same(SPEC, backend, sample((2, 4, 6, 5, 7)))


@cases()
def test_double_backward_raises(backend):
    x, weight, bias = sample((1, 2, 2, 4, 4))
    with harness.owned_by(backend, NAMES):
        (dx,) = torch.autograd.grad(call(x.requires_grad_(), weight, bias, 1).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="conv3x3: double backward is not supported"):
            dx.sum().backward()
        weight.requires_grad_()
        (dw,) = torch.autograd.grad(call(x, weight, bias, 1).square().sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="conv3x3: double backward is not supported"):
            dw.sum().backward()


@cases(
    layout=harness.LAYOUTS, requires_grad=(False, True),
    traced={"layout": ["channels_last"], "requires_grad": [True]},
)  # fmt: skip
def test_opcheck(backend, layout, requires_grad, parts):
    x, weight, bias = sample((2, 4, 6, 4, 5))
    leaves = [t.requires_grad_(requires_grad) for t in (harness.in_layout(x, layout).detach(), weight, bias)]
    with harness.owned_by(backend, NAMES):
        harness.opcheck(spec_module.OP, (*leaves, None, None, 2), parts)
        dy, weight = harness.in_layout(torch.randn(2, 6, 4, 5, device=DEVICE), layout), weight.detach()
        harness.opcheck(spec_module.OP_BWD, (dy, weight, None, 2), parts)
        harness.opcheck(spec_module.OP_BWD_WEIGHT, (dy, leaves[0].detach(), 2), parts)
        harness.opcheck(spec_module.OP_PREPARE, (weight, requires_grad), parts)


@cases()
def test_compiles(backend):
    """The public function, with its rule, and images for which it chooses the op."""
    spec = harness.Spec(**{**vars(SPEC), "call": ops.conv3x3})
    samples = [sample((n, 16, 16, 32, 32)) for n in (2, 5)]
    harness.check_compiled(spec, [backend], samples)


OP_BAD = [
    (
        {"x": torch.zeros(1, 2, 3, 3).double()},
        TypeError,
        r"conv3x3: x must be a float32 tensor, got torch.float64",
    ),
    (
        {"x": torch.zeros(1, 3, 3, 3)},
        ValueError,
        r"conv3x3: x must be of shape \(B, 2, H, W\), H and W >= 1, got \(1, 3, 3, 3\)",
    ),
    (
        {"x": torch.zeros(2, 3, 3)},
        ValueError,
        r"x must be of shape \(B, 2, H, W\), H and W >= 1, got \(2, 3, 3\)",
    ),
    (
        {"weight": torch.zeros(4, 2, 5, 3)},
        ValueError,
        r"conv3x3: weight must be of shape \(O, C, 3, 3\), O and C >= 1, got \(4, 2, 5, 3\)",
    ),
    ({"bias": torch.zeros(3)}, ValueError, r"conv3x3: bias must be of shape \(4,\), got \(3,\)"),
    ({"dilation": 0}, ValueError, r"conv3x3: dilation must be an integer and in \[1, 65535\], got 0"),
]


@cases(bad=range(len(OP_BAD)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend, bad):
    change, error, words = OP_BAD[bad]
    arguments = {"x": torch.zeros(1, 2, 3, 3), "weight": torch.zeros(4, 2, 3, 3), "bias": None, "dilation": 1, **change}
    with harness.owned_by(backend, NAMES):
        with pytest.raises(RuntimeError if backend == "cpp" else error, match=words):
            spec_module.OP(**arguments, prepared=None, prepared_t=None)
        if error is ValueError:  # the public function takes any dtype
            with pytest.raises(error, match=words):
                ops.conv3x3(**arguments)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_bad_types(name):
    arguments = {"x": torch.zeros(1, 2, 3, 3), "weight": torch.zeros(4, 2, 3, 3), "bias": torch.zeros(4)}
    with pytest.raises(TypeError, match=f"conv3x3: {name} must be a torch.Tensor, got list"):
        ops.conv3x3(**{**arguments, name: [1.0]})
    with pytest.raises(TypeError, match=f"conv3x3: {name} must be a floating-point tensor, got torch.int32"):
        ops.conv3x3(**{**arguments, name: arguments[name].int()})


@cases(but="eager")
def test_bad_prepared(backend):
    x, weight, _ = sample((1, 4, 6, 4, 4))
    words = r"conv3x3: prepared must be of shape \(36, 1, 4, 16\), got \(36, 1, 6, 16\)"
    with harness.owned_by(backend, NAMES), pytest.raises(RuntimeError, match=words):
        spec_module.OP(x, weight, None, spec_module.OP_PREPARE(weight, True), None, 1)
    words = r"conv3x3_bwd: dy must be of shape \(B, 6, H, W\), H and W >= 1, got \(1, 4, 4, 4\)"
    with harness.owned_by(backend, NAMES), pytest.raises(RuntimeError, match=words):
        spec_module.OP_BWD(x, weight, None, 1)


@cases()
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input_of_weight_gradient(backend):
    dy, x = torch.zeros(1, 4, 3, 3), torch.zeros(1, 2, 3, 3)
    bad = (
        ((dy.double(), x, 1), TypeError, "dy must be a float32 tensor, got torch.float64"),
        ((dy, x[0], 1), ValueError, r"x must be of shape \(B, C, H, W\), C, H and W >= 1, got \(2, 3, 3\)"),
        ((dy[:, :, 1:], x, 1), ValueError, r"dy must be of shape \(1, O, 3, 3\), O >= 1, got \(1, 4, 2, 3\)"),
        ((dy, x, 0), ValueError, r"dilation must be an integer and in \[1, 65535\], got 0"),
    )
    with harness.owned_by(backend, NAMES):
        for arguments, error, words in bad:
            with pytest.raises(RuntimeError if backend == "cpp" else error, match=f"conv3x3_bwd_weight: {words}"):
                spec_module.OP_BWD_WEIGHT(*arguments)


@pytest.mark.parametrize("dilation", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 4, 5, 13, 32])
def test_tiles_of_the_rule(size, dilation):
    starts = sum(len(range(first, size, 4 * dilation)) for first in range(min(dilation, size)))
    assert spec_module._tiles(size, dilation) == starts


@native
def test_rule():
    """The rule excludes the cases that lost to oneDNN, and does not depend on the batch."""

    def wins(size, channels=64, outputs=64, dilation=1, prepared=True, dtype=torch.float32, batch=1):
        x = torch.empty(batch, channels, size, size, dtype=dtype)
        return spec_module.wins(x, torch.empty(outputs, channels, 3, 3, dtype=dtype), dilation, prepared)

    assert all(wins(size) for size in (3, 4, 6, 7, 8, 16, 32, 64))
    assert not any(wins(size) for size in (1, 2, 5))
    assert wins(64, dilation=16)
    assert not wins(64, dilation=32)
    assert wins(32, channels=16)
    assert not wins(32, channels=3)
    assert not wins(32, outputs=10)
    assert wins(32, prepared=False)
    assert not wins(16, prepared=False, batch=1000)
    assert not wins(32, dtype=torch.float64)


def test_public_function_takes_any_dtype():
    x, weight = torch.randn(2, 16, 32, 32).double(), torch.randn(16, 16, 3, 3).double()
    assert torch.equal(ops.conv3x3(x, weight, dilation=2), F.conv2d(x, weight, padding=2, dilation=2))


class Seen(TorchDispatchMode):
    """The names of the ops that run inside."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name().partition("::")[2])
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.names = set()
        return super().__enter__()


@native
@pytest.mark.backend("cpp")
def test_frozen_convolution():
    """Equal to the op, without a gradient of the weights, and a copy."""
    convolution = nn.Conv2d(16, 20, 3, padding=2, dilation=2)
    frozen = ops.FrozenConv3x3(convolution)
    x = torch.randn(2, 16, 9, 8, requires_grad=True)
    expected = call(x, convolution.weight, convolution.bias, 2)
    with Seen() as seen:
        y = frozen(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, expected)
    assert torch.equal(dx, torch.autograd.grad(expected.sum(), x)[0])
    assert {"conv3x3", "conv3x3_bwd"} <= seen.names
    assert not {"convolution", "convolution_backward", "conv3x3_prepare"} & seen.names
    assert not list(frozen.parameters())
    assert not frozen.state_dict()
    with torch.no_grad():
        convolution.weight.zero_()
        assert torch.equal(copy.deepcopy(frozen)(x), y)


@native
def test_frozen_convolution_falls_back():
    """To torch's convolution, for images that the rule excludes, and after a change of dtype."""
    convolution = nn.Conv2d(16, 16, 3, padding=1)
    frozen = ops.FrozenConv3x3(convolution)
    x = torch.randn(2, 16, 2, 2)
    assert torch.equal(frozen(x), convolution(x))
    x = torch.randn(2, 16, 8, 8).double()
    assert torch.equal(frozen.double()(x), convolution.double()(x))


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"padding": 1}, True),
        ({"padding": 2, "dilation": 2, "bias": False}, True),
        ({"padding": "same", "dilation": 3}, True),
        ({"padding": 0}, False),
        ({"padding": 2}, False),
        ({"padding": 1, "stride": 2}, False),
        ({"padding": 1, "groups": 2}, False),
        ({"padding": 1, "padding_mode": "reflect"}, False),
        ({"padding": (1, 2), "dilation": (1, 2)}, False),
        ({"padding": 1, "dtype": torch.float64}, False),
        ({"padding": 1, "out_channels": 10}, False),
        ({"padding": 1, "kernel_size": (3, 1)}, False),
    ],
    ids=str,
)
def test_accepts(options, accepted):
    convolution = nn.Conv2d(**{"in_channels": 32, "out_channels": 32, "kernel_size": 3, **options})
    assert ops.FrozenConv3x3.accepts(convolution) == accepted
    if accepted:
        x = torch.randn(1, 32, 8, 7)
        torch.testing.assert_close(ops.FrozenConv3x3(convolution)(x), convolution(x), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="FrozenConv3x3: convolution must be a float32 3x3 convolution"):
            ops.FrozenConv3x3(convolution)


def test_accepts_no_other_modules():
    assert not ops.FrozenConv3x3.accepts(nn.Linear(16, 16))
    assert not ops.FrozenConv3x3.accepts(nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1)))
    with pytest.raises(TypeError, match=r"FrozenConv3x3: convolution must be an nn.Conv2d, got Linear"):
        ops.FrozenConv3x3(nn.Linear(16, 16))


class Block(nn.Module):
    """A residual block."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return F.relu(x + self.second(F.relu(self.first(x))))


@native
@pytest.mark.backend("cpp")
def test_residual_blocks():
    """A network keeps its outputs and the signs of its input gradient."""
    network = nn.Sequential(Block(), Block()).requires_grad_(False)
    frozen = copy.deepcopy(network)
    for name, module in list(frozen.named_modules()):
        if ops.FrozenConv3x3.accepts(module):
            frozen.set_submodule(name, ops.FrozenConv3x3(module))
    assert sum(isinstance(module, ops.FrozenConv3x3) for module in frozen.modules()) == 4
    x = torch.randn(4, 32, 12, 10).contiguous(memory_format=torch.channels_last)
    results = []
    for function, images in ((network.double(), x.double()), (frozen, x)):
        leaf = images.requires_grad_()
        y = function(leaf)
        results.append((y.detach().double(), torch.autograd.grad(y.square().sum(), leaf)[0].double()))
    (expected, gradient), (actual, mine) = results
    assert (actual - expected).norm() <= 2e-6 * expected.norm()
    assert (mine.sign() == gradient.sign()).double().mean() >= 0.9999
