"""resample, by way of resize and random_resize_pad: torch's interpolation, and the bits of the specification."""

from __future__ import annotations

import importlib
import math
import warnings

import _harness as harness
import pytest
import torch
import torch.nn.functional as F
from _harness import DEVICE, cases

from atop_fast import ops
from atop_fast.randomness import Tag, philox4x32

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.resample")
NAMES = ("resample",)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: {"rtol": 0, "atol": 2e-6}, torch.float64: {"rtol": 0, "atol": 1e-12}}
# Images and their new size: up, down, along one axis, by no integer, from and to one pixel, beyond a block of 1024.
SIZES = {
    "empty": ((0, 3, 5, 7), (9, 4)),
    "same": ((2, 1, 5, 7), (5, 7)),
    "up": ((2, 3, 5, 7), (9, 16)),
    "down": ((1, 2, 11, 13), (4, 3)),
    "mixed": ((2, 5, 12, 3), (5, 8)),
    "from_pixel": ((2, 1, 1, 1), (3, 5)),
    "to_pixel": ((1, 3, 6, 9), (1, 1)),
    "large": ((1, 2, 20, 23), (37, 31)),
    "tiny": ((1, 1, 33, 40), (7, 9)),
}


def images(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def interpolate(x, size, antialias=False):
    return F.interpolate(x, size, mode="bilinear", antialias=antialias)


def random_resize_pad(x):
    return ops.random_resize_pad(x, 4, 9, seed=3, sample_ids=5 + torch.arange(len(x), device=DEVICE), draw=2)


def resize_and_pad(x):
    """The same from torch's functions, image by image, with the places from Python integers."""
    results = []
    for i, image in enumerate(x):
        words = philox4x32((0, 5 + i, 2, Tag.RESIZE << 16), 3)
        side = 4 + (words[0] * 6 >> 32)
        top, left = (word * (10 - side) >> 32 for word in words[1:3])
        small = interpolate(image[None], (side, side))
        results.append(F.pad(small, (left, 9 - side - left, top, 9 - side - top)))
    return torch.cat(results)


def recorded(call):
    """The arguments of the op in `call`: images, rows, columns, and their transposes."""
    found = []

    def record(*arguments):
        found.append(arguments)
        return spec_module.reference(*arguments)

    library = torch.library.Library("atop_fast", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that a kernel is replaced
            library.impl("resample", record, DEVICE.upper(), allow_override=True)
        call()
    finally:
        library._destroy()
    return found[0]


def check_both(backend, call, x):
    """The op as `call` of `x` uses it, and its transpose, against the reference."""
    # Only a recorded call makes the transposed matrices.
    _, *taps = recorded(lambda: call(x.detach().requires_grad_()))
    harness.check_reference(backend, "resample", x, *taps)
    dy = images((*x.shape[:2], taps[0].shape[1], taps[2].shape[1]), x.dtype)
    dy = harness.in_layout(dy, "channels_last" if x.shape[1] == 3 else "sliced")
    harness.check_reference(backend, "resample", dy, *taps[4:], *taps[:4])


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", size=tuple(SIZES), antialias=(False, True))
def test_matches_reference(backend, size, antialias):
    shape, wanted = SIZES[size]
    check_both(backend, lambda x: ops.resize(x, wanted, antialias), images(shape))


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", dtype=DTYPES, layout=harness.LAYOUTS)
def test_dtypes_and_layouts(backend, dtype, layout):
    x = harness.in_layout(images((2, 3, 6, 5), dtype), layout)
    check_both(backend, lambda x: ops.resize(x, (4, 7)), x)
    with harness.owned_by(backend, NAMES):
        y = ops.resize(x, (4, 7))
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@pytest.mark.usefixtures("poisoned_memory")
@cases(
    but="eager", layout=("contiguous", "channels_last"), shape=((3, 2, 7, 7), (2, 1, 5, 11), (2, 1, 1, 1), (0, 1, 4, 4))
)
def test_samples_with_matrices_of_their_own(backend, layout, shape):
    check_both(backend, random_resize_pad, harness.in_layout(images(shape), layout))


@cases(dtype=tuple(TOLERANCES), size=("same", "up", "down", "mixed", "from_pixel", "to_pixel"), antialias=(False, True))
def test_equals_interpolate(backend, dtype, size, antialias):
    """Values and gradients."""
    shape, wanted = SIZES[size]
    mine, theirs = (images(shape, dtype).requires_grad_() for _ in range(2))
    theirs.data.copy_(mine.data)
    expected = interpolate(theirs, wanted, antialias)
    dy = torch.randn_like(expected)
    with harness.owned_by(backend, NAMES):
        y = ops.resize(mine, wanted, antialias)
        (dx,) = torch.autograd.grad(y, mine, dy)
    torch.testing.assert_close(y, expected, **TOLERANCES[dtype])
    scale = max(1.0, math.prod(wanted) / math.prod(shape[2:]))
    tolerance = {"rtol": 0, "atol": scale * TOLERANCES[dtype]["atol"]}
    torch.testing.assert_close(dx, torch.autograd.grad(expected, theirs, dy)[0], **tolerance)


@cases(dtype=tuple(TOLERANCES), shape=((5, 2, 6, 6), (3, 1, 12, 5), (2, 1, 1, 1)))
def test_equals_interpolate_and_pad(backend, dtype, shape):
    mine, theirs = (images(shape, dtype).requires_grad_() for _ in range(2))
    theirs.data.copy_(mine.data)
    expected = resize_and_pad(theirs)
    dy = torch.randn_like(expected)
    with harness.owned_by(backend, NAMES):
        y = random_resize_pad(mine)
        (dx,) = torch.autograd.grad(y, mine, dy)
    torch.testing.assert_close(y, expected, **TOLERANCES[dtype])
    tolerance = {"rtol": 0, "atol": 81 / math.prod(shape[2:]) * TOLERANCES[dtype]["atol"]}
    torch.testing.assert_close(dx, torch.autograd.grad(expected, theirs, dy)[0], **tolerance)


def test_the_samples_of_the_oracle_differ():
    sides = {4 + (philox4x32((0, 5 + i, 2, Tag.RESIZE << 16), 3)[0] * 6 >> 32) for i in range(5)}
    assert len(sides) >= 3


@cases(call=("resize", "antialias", "pad"))
def test_gradgradcheck(backend, call):
    """A linear map: the gradient's gradient is the map itself."""
    x = images((1, 1, 2, 2), torch.float64).requires_grad_()
    function = {
        "resize": lambda x: ops.resize(x, (2, 3)),
        "antialias": lambda x: ops.resize(x, (3, 1), antialias=True),
        "pad": lambda x: ops.random_resize_pad(x, 2, 3),
    }[call]
    with harness.owned_by(backend, NAMES):
        harness.gradcheck(backend, function, x)
        assert torch.autograd.gradgradcheck(function, x)


@cases()
def test_second_backward_same(backend):
    x = images((2, 3, 5, 7)).requires_grad_()
    with harness.owned_by(backend, NAMES):
        for y in (ops.resize(x, (9, 4)), random_resize_pad(x)):
            dy = torch.randn_like(y)
            first = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
            assert torch.equal(torch.autograd.grad(y, x, dy)[0], first)


@cases()
def test_result_belongs_to_the_sample(backend):
    x, (seed, ids, draws) = images((64, 1, 3, 3)), harness.random_key(64)
    with harness.owned_by(backend, NAMES):
        whole = ops.random_resize_pad(x, 2, 4, seed, ids, draws)
        for part in (torch.tensor([63]), torch.tensor([5, 0, 62, 17, 5, 4, 33])):
            part = part.to(DEVICE)
            y = ops.random_resize_pad(x[part], 2, 4, seed, ids[part], draws[part])
            assert torch.equal(y, whole[part])
        one = ops.random_resize_pad(x[9:10], 2, 4, -5, ids[9:10], int(draws[9]))
    assert torch.equal(one, whole[9:10])


@cases(but="eager")
def test_a_tap_of_weight_0_reads_nothing(backend):
    """NaN and infinity reach the pixels that draw on them, and no others."""
    x = images((1, 1, 4, 4))
    x[0, 0, 1, 1], x[0, 0, 3, 2] = math.nan, math.inf
    for size in ((4, 4), (2, 7), (8, 3)):
        check_both(backend, lambda x, size=size: ops.resize(x, size), x)
    with harness.owned_by(backend, NAMES):
        assert torch.equal(ops.resize(x, (4, 4)).isfinite(), x.isfinite())
        assert ops.resize(x, (8, 4))[0, 0, 4:6].isfinite().tolist() == [
            [True, False, True, True],
            [True, True, False, True],
        ]


@cases(
    layout=("contiguous", "channels_last"), requires_grad=(False, True),
    traced={"layout": ["channels_last"], "requires_grad": [True]},
)  # fmt: skip
def test_opcheck(backend, layout, requires_grad, parts):
    x = harness.in_layout(images((2, 3, 4, 5)), layout).requires_grad_(requires_grad)
    with harness.owned_by(backend, NAMES):
        harness.opcheck(spec_module.OP, (x, *recorded(lambda: random_resize_pad(x))[1:]), parts)
        if requires_grad:
            harness.opcheck(torch.ops.atop_fast.resize.default, (x, (3, 7), True), parts)
            harness.opcheck(torch.ops.atop_fast.resize_bwd.default, (x, (3, 7), False), parts)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["resize", "pad"])
def test_compiles(call):
    function = {
        "resize": lambda x: ops.resize(x, (5, 16), antialias=True),
        "pad": lambda x: ops.random_resize_pad(x, 8, 12),
    }[call]
    spec = harness.Spec("resample", function, function, images, (), (), True, ops=NAMES)
    harness.check_compiled(spec, harness.backends("resample"), [(images((n, 3, 8, 11)),) for n in (2, 5)])


BAD = [
    ({"x": torch.zeros(2, 3, 4, 4).int()}, TypeError, "x must be a float32, float64, .* tensor, got torch.int32"),
    ({"x": torch.zeros(3, 4, 4)}, ValueError, r"x must be images of shape \(B, C, H, W\), got \(3, 4, 4\)"),
    ({"row_start": torch.zeros(1, 2)}, TypeError, "row_start must be an int64 tensor, got torch.float32"),
    ({"row_start": torch.zeros(3, 2).long()}, ValueError, r"row_start must be of shape \(1 or 2, n\), got \(3, 2\)"),
    (
        {"row_weight": torch.ones(1, 2, 1).double()},
        TypeError,
        "row_weight must be a torch.float32 tensor, got torch.float",
    ),
    (
        {"row_weight": torch.ones(1, 3, 1)},
        ValueError,
        r"row_weight must be of shape \(1, 2\) and 1 to 4 taps, got \(1, 3,",
    ),
    (
        {"row_weight": torch.ones(1, 2, 5)},
        ValueError,
        r"row_weight must be of shape \(1, 2\) and 1 to 4 taps, got \(1, 2,",
    ),
    (
        {"column_weight": torch.ones(1, 2, 0)},
        ValueError,
        r"column_weight must be of .* and 1 to 4 taps, got \(1, 2, 0\)",
    ),
]


@cases(bad=range(len(BAD)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend, bad):
    change, error, words = BAD[bad]
    start, weight = torch.zeros(1, 2).long(), torch.ones(1, 2, 1)
    taps = {"row_start": start, "row_weight": weight, "column_start": start, "column_weight": weight}
    arguments = {"x": torch.zeros(2, 3, 4, 4), **taps, **{f"{name}_t": t for name, t in taps.items()}, **change}
    raised = RuntimeError if backend == "cpp" else error
    with harness.owned_by(backend, NAMES), pytest.raises(raised, match=f"resample: {words}"):
        torch.ops.atop_fast.resample(**arguments)


X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.resize([0.5], (4, 4)), TypeError, "resize: x must be a torch.Tensor, got list"),
        (lambda: ops.resize(X.byte(), (4, 4)), TypeError, "resize: x must be a float32, .* tensor, got torch.uint8"),
        (
            lambda: ops.resize(X[0], (4, 4)),
            ValueError,
            r"resize: x must be images of shape \(B, C, H, W\), got \(3, 4, 4\)",
        ),
        (lambda: ops.resize(X[:, :, :0], (4, 4)), ValueError, r"resize: x must be .*, got \(2, 3, 0, 4\)"),
        (lambda: ops.resize(X, (4, 0)), ValueError, "resize: size must be an integer and >= 1, got 0"),
        (lambda: ops.resize(X, (4, 4.0)), TypeError, "resize: size must be an integer, got float"),
        (lambda: ops.resize(X, (4, 4, 4)), ValueError, "resize: size must be"),
        (lambda: ops.resize(X, 4), TypeError, "resize: size must be"),
        (lambda: ops.random_resize_pad(X.int(), 2, 4), TypeError, "random_resize_pad: x must be a float32, .*int32"),
        (lambda: ops.random_resize_pad(X[0], 2, 4), ValueError, "random_resize_pad: x must be images of shape"),
        (lambda: ops.random_resize_pad(X, 0, 4), ValueError, "random_resize_pad: min_size must be an integer and >= 1"),
        (
            lambda: ops.random_resize_pad(X, 2, 4.5),
            TypeError,
            "random_resize_pad: max_size must be an integer, got float",
        ),
        (lambda: ops.random_resize_pad(X, 5, 4), ValueError, "max_size must be an integer and >= min_size=5, got 4"),
        (lambda: ops.random_resize_pad(X, 2, 4, "0"), TypeError, "random_resize_pad: seed must be an integer, got str"),
        (
            lambda: ops.random_resize_pad(X, 2, 4, draw=-1),
            ValueError,
            "random_resize_pad: draw must be an integer and in",
        ),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.slow
@pytest.mark.gpu
@cases(but="eager", layout=("contiguous", "channels_last"))
def test_more_than_2_to_the_31_elements(backend, layout):
    x = harness.in_layout(torch.rand(3, 3, 2048, 8192, device=DEVICE).bfloat16(), layout)
    with harness.owned_by(backend, NAMES):
        y = ops.resize(x, (16384, 16384))
        assert torch.equal(y[2:], ops.resize(x[2:], (16384, 16384)))
