"""corrupt: the bits of the specification, the gradients of the formula, and what it keeps for them."""

from __future__ import annotations

import importlib
import math

import _harness as harness
import pytest
import torch
import torch.nn.functional as F
from _harness import DEVICE, SHORT, cases, random_owners

from atop_fast import ops
from atop_fast.ops import _registry
from atop_fast.randomness import Tag, philox4x32

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.corrupt")
NAMES = ("random_normal", "mask_blocks", "corrupt", "corrupt_live", "corrupt_bwd", "resample")
# Shape of the images, size, patch, copies: no multiples of 4 or 8, more pixels than a strip of 1024, up and down.
GEOMETRY = {
    "empty": ((0, 3, 8, 8), (8, 8), 4, 2),
    "no_channels": ((2, 0, 4, 4), (4, 4), 2, 1),
    "pixel": ((2, 3, 1, 1), (1, 1), 1, 1),
    "whole": ((2, 1, 9, 9), (9, 9), 9, 2),
    "odd": ((2, 3, 5, 7), (5, 7), 1, 4),
    "fours": ((1, 5, 6, 10), (6, 10), 2, 1),
    "strips": ((2, 2, 40, 44), (40, 44), 4, 1),
    "odd_strips": ((1, 3, 33, 35), (33, 35), 1, 2),
    "up": ((2, 3, 5, 3), (35, 30), 5, 1),
    "down": ((2, 2, 19, 23), (6, 9), 3, 2),
}
WIDE = ("fp32", "bf16", "fp16")
# Types of images and result.
DTYPES = ("fp64-fp64", *(f"{x}-{y}" for x in ("uint8", *WIDE) for y in WIDE))
RESIZED = ("fp64-fp64", "uint8-fp32", "fp32-fp32", "bf16-bf16", "fp16-fp16")
NAMED = {"uint8": torch.uint8, **{name: dtype for dtype, name in SHORT.items()}}


def images(shape, dtype=torch.float32):
    """Images that leave [0, 1] here and there."""
    x = torch.rand(shape, device=DEVICE) * 1.4 - 0.2
    return (x.clamp(0, 1) * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)


def key(batch):
    """A sigma for every sample, down to 0, seed, sample ids, draws."""
    return torch.linspace(0.4, 0, batch, device=DEVICE), *harness.random_key(batch)


def formula(x, blocks, sigma, seed, ids, draws, patch, copies, size, dtype):
    """The op as a user would write it."""
    v = x if x.dtype == torch.float64 else x.float()
    v = v / 255 if x.dtype == torch.uint8 else v
    v = F.interpolate(v, size, mode="bilinear") if tuple(size) != tuple(x.shape[2:]) else v
    v = v + sigma.reshape(-1, 1, 1, 1).to(v.dtype) * ops.random_normal(v.shape[1:], seed, ids, draws).to(v.dtype)
    grid = blocks.view(len(x), 1, size[0] // patch, size[1] // patch).float()
    owner = F.interpolate(grid, scale_factor=patch, mode="nearest").repeat_interleave(copies, dim=0)
    mask = (owner == torch.arange(copies, device=DEVICE).repeat(len(x)).view(-1, 1, 1, 1)).to(v.dtype)
    t = (2 * v.clamp(0, 1) - 1).repeat_interleave(copies, dim=0)
    return torch.cat((torch.where(mask == 1, 0, t), torch.ones_like(mask), mask), dim=1).to(dtype)


def check_all(backend, x, blocks, keys, patch, copies, size, dtype):
    """The three ops against their references."""
    harness.check_reference(backend, "corrupt", x, blocks, *keys, patch, copies, size, dtype, True)
    harness.check_reference(backend, "corrupt_live", x, blocks, *keys, patch, copies, size)
    live = spec_module.reference_live(x, blocks, *keys, patch, copies, size)
    dy = torch.randn(len(x) * copies, x.shape[1] + 2, *size, device=DEVICE).to(dtype)
    narrow = torch.float32 if x.dtype == torch.uint8 else x.dtype
    harness.check_reference(backend, "corrupt_bwd", dy, live, blocks, patch, copies, narrow)


def run(backend, x, **options):
    with harness.owned_by(backend, NAMES):
        return ops.corrupt(x, **{"patch": 4, "seed": 5, **options})


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", geometry=tuple(GEOMETRY))
def test_matches_reference(backend, geometry):
    shape, size, patch, copies = GEOMETRY[geometry]
    blocks = random_owners(shape[0], size, patch, copies)
    check_all(backend, images(shape), blocks, key(shape[0]), patch, copies, size, torch.float32)


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", dtypes=(*DTYPES, *(f"{pair}-resized" for pair in RESIZED)))
def test_dtypes(backend, dtypes):
    x_dtype, dtype = (NAMED[name] for name in dtypes.split("-")[:2])
    size = (4, 6) if dtypes.endswith("resized") else (6, 10)
    check_all(backend, images((1, 2, 6, 10), x_dtype), random_owners(1, size, 2, 2), key(1), 2, 2, size, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@cases(but="eager", layout=harness.LAYOUTS, size=((9, 7), (6, 9)))
def test_layouts(backend, layout, size):
    copies = 1 if size == (9, 7) else 2
    x = harness.in_layout(images((2, 3, 9, 7)), layout)
    blocks = random_owners(4, size, 1, copies)[::2]
    sigma, seed, ids, draws = key(4)
    keys = (sigma[::2], seed, ids[1::2], draws[:1].expand(2))
    check_all(backend, x, blocks, keys, 1, copies, size, torch.float32)
    y = spec_module.OP(x, blocks, *keys, 1, copies, size, torch.float32, False)[0]
    plain = spec_module.OP(x.contiguous(), blocks, *keys, 1, copies, size, torch.float32, False)[0]
    assert torch.equal(y, plain)
    assert y.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@cases(but="eager", layout=harness.LAYOUTS, copies=(1, 2))
def test_upstream_gradient_in_another_layout(backend, layout, copies):
    """Also one of a sum, whose elements share their memory."""
    blocks = random_owners(2, (9, 7), 1, copies)
    live = spec_module.reference_live(images((2, 3, 9, 7)), blocks, *key(2), 1, copies, (9, 7))
    dy = harness.in_layout(torch.randn(2 * copies, 5, 9, 7, device=DEVICE), layout)
    for upstream in (dy, dy[:1, :1, :1, :1].expand_as(dy)):
        harness.check_reference(backend, "corrupt_bwd", upstream, live, blocks, 1, copies, torch.float32)


@cases(case=("odd-fp32", "strips-fp32", "up-fp32", "down-fp32", "down-fp64", "odd-bf16"))
def test_formula(backend, case):
    """Values and gradients of torch's own operations; not resized, the values are equal in every bit."""
    geometry, name = case.split("-")
    dtype = NAMED[name]
    shape, size, patch, copies = GEOMETRY[geometry]
    blocks, keys = random_owners(shape[0], size, patch, copies), key(shape[0])
    mine, theirs = (images(shape, dtype).requires_grad_() for _ in range(2))
    theirs.data.copy_(mine.data)
    expected = formula(theirs, blocks, *keys, patch, copies, size, dtype)
    with harness.owned_by(backend, NAMES):
        y = spec_module.OP(mine, blocks, *keys, patch, copies, size, dtype, True)[0]
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, mine, dy)
    if size == shape[2:]:
        harness.same_bits(y.detach(), expected.detach(), ulps=harness.ulps_of(backend, dtype))
    torch.testing.assert_close(y, expected)
    # bfloat16: two ulps of a sum of copies.
    torch.testing.assert_close(dx, torch.autograd.grad(expected, theirs, dy)[0])


@cases(number=("sigma", "mask_ratio"), value=(0, 1))
def test_public_function(backend, number, value):
    """The op's tensors are those that the arguments say, a number as well as one for every sample."""
    x = images((3, 2, 8, 12))
    options = {"sigma": 0.2, "mask_ratio": 0.4, number: value}
    ids = torch.arange(3, device=DEVICE)
    blocks = ops.mask_blocks(6, round(options["mask_ratio"] * 6), 5, ids)
    keys = torch.tensor(float(options["sigma"]), device=DEVICE), torch.tensor(5), ids, torch.tensor(0)
    expected = formula(x, blocks, *keys, 4, 1, (8, 12), torch.float32)
    assert torch.equal(run(backend, x, **options), expected)
    tensors = {name: torch.full((3,), float(v), device=DEVICE) for name, v in options.items()}
    assert torch.equal(run(backend, x, **tensors), expected)
    assert torch.equal(run(backend, x, **{name: t[0] for name, t in tensors.items()}), expected)


@cases()
def test_range_of_mask_ratios(backend):
    """The count of a sample is a word of its own, scaled to the counts from 1 to 5."""
    ids, x = torch.tensor([2**33 + 3, 0, 7, 1], device=DEVICE), images((4, 2, 8, 12))
    words = [philox4x32((0, int(i) & 0xFFFFFFFF, 6, int(i) >> 32 | Tag.RATIO << 16), 5)[0] for i in ids]
    ratios = torch.tensor([(1 + (word * 5 >> 32)) / 6 for word in words], device=DEVICE)
    keys = {"seed": 5, "sample_ids": ids, "draw": 6}
    assert torch.equal(run(backend, x, mask_ratio=(0.2, 0.8), **keys), run(backend, x, mask_ratio=ratios, **keys))


@cases(copies=(1, 2, 3))
def test_masks_are_counted_and_disjoint(backend, copies):
    ratio = torch.tensor([0, 0.1, 0.25, 0.5, 1], device=DEVICE)
    y = run(backend, images((5, 1, 12, 8)), mask_ratio=ratio, copies=copies, sample_ids=torch.full((5,), 3))
    masks = y[:, -1, ::4, ::4].flatten(1).unflatten(0, (5, copies))
    assert ((masks == 0) | (masks == 1)).all()
    assert masks.sum(dim=1).max() <= 1
    assert masks.sum(dim=(1, 2)).tolist() == [0, 1, 2, 3, 6]
    assert (y[:, 0] * y[:, -1] == 0).all()
    assert (y[:, 1] == 1).all()


@cases()
def test_shared_mask(backend):
    x = images((6, 1, 8, 8))
    masks = run(backend, x, shared_mask=True, patch=2)[:, -1]
    assert len(masks.unique(dim=0)) == 1
    assert len(run(backend, x, patch=2)[:, -1].unique(dim=0)) > 1
    assert not torch.equal(run(backend, x, shared_mask=True, patch=2, draw=1)[:, -1], masks)
    # The noise still belongs to the sample.
    alone = run(backend, x[3:4], shared_mask=True, patch=2, sample_ids=torch.tensor([3]))
    assert torch.equal(alone, run(backend, x, shared_mask=True, patch=2)[3:4])


@cases(count=(64,), interpreted={"count": (10,)})
def test_result_belongs_to_the_sample(backend, count):
    """The whole batch is channels_last, its parts are not."""
    x, (sigma, seed, ids, draws) = images((count, 1, 4, 4)), key(count)
    x = x.contiguous(memory_format=torch.channels_last)
    options = {"patch": 2, "copies": 2, "mask_ratio": 1.0, "seed": seed}
    whole = run(backend, x, sigma=sigma, sample_ids=ids, draw=draws, **options).unflatten(0, (count, 2))
    for part in (torch.tensor([count - 1]), torch.tensor([5, 0, count - 2, 7, 5, 4, 3])):
        part = part.to(DEVICE)
        some = {"sigma": sigma[part], "sample_ids": ids[part], "draw": draws[part]}
        y = run(backend, x[part].contiguous(), **options, **some)
        assert torch.equal(y.unflatten(0, (-1, 2)), whole[part])
    one = {"sigma": float(sigma[9]), "sample_ids": ids[9:10], "draw": int(draws[9])}
    assert torch.equal(run(backend, x[9:10], **options, **one), whole[9])


@cases(dtype=(torch.float32, torch.float64, torch.float16), copies=(1, 2))
def test_nan_and_infinity(backend, dtype, copies):
    """They pass where they are not masked, and their gradient is 0."""
    x = images((2, 2, 5, 8), dtype)
    x[:, :, 1:3] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1.0, 0.0, math.nan, 2.0], device=DEVICE)
    blocks, keys = random_owners(2, (5, 8), 1, copies), (torch.zeros((), device=DEVICE), *key(2)[1:])
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = formula(theirs, blocks, *keys, 1, copies, (5, 8), dtype)
    with harness.owned_by(backend, NAMES):
        y = spec_module.OP(mine, blocks, *keys, 1, copies, (5, 8), dtype, True)[0]
        dy = torch.randn_like(y)
        dy[:, :, 2] = math.nan
        (dx,) = torch.autograd.grad(y, mine, dy)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert not y[:, :2][y[:, 3:].expand(-1, 2, -1, -1) == 1].any()
    torch.testing.assert_close(dx, torch.autograd.grad(expected, theirs, dy)[0], equal_nan=True)


@cases(but="eager")
def test_nan_and_infinity_resized(backend):
    x = images((2, 1, 6, 5))
    x[0, 0, 2, 3], x[1, 0, 0, 0], x[1, 0, 5, 2] = math.nan, math.inf, -math.inf
    check_all(backend, x, random_owners(2, (9, 4), 1, 2), key(2), 1, 2, (9, 4), torch.float32)


# Size of the result, copies, recompute.
GRADCHECKS = ((None, 3, True), ((2, 4), 1, False), ((4, 2), 3, False))


@cases(number=range(len(GRADCHECKS)))
def test_gradcheck(backend, number):
    """Small noise on mid-range pixels keeps clear of the clip's kinks."""
    size, copies, recompute = GRADCHECKS[number]
    options = {"patch": 1, "sigma": 0.01, "mask_ratio": 0.5, "size": size, "copies": copies, "recompute": recompute}
    x = (torch.rand(1, 1, 2, 2, device=DEVICE, dtype=torch.float64) / 2 + 0.25).requires_grad_()
    with harness.owned_by(backend, NAMES):
        harness.gradcheck(backend, lambda x: ops.corrupt(x, **options)[:, :1], x)


def gradient(x, dy_seed=1, times=1, **options):
    x = x.detach().requires_grad_()
    y = ops.corrupt(x, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(dy_seed)).to(y)
    return [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(times)]


@cases(copies=(1, 3))
def test_backward_twice_and_recomputed(backend, copies):
    """A second pass over a kept graph gives the same bits, and so does computing the noise again."""
    size = (20, 12) if copies == 1 else None
    x, options = images((2, 3, 8, 8)), {"patch": 4, "size": size, "copies": copies}
    with harness.owned_by(backend, NAMES):
        first, second = gradient(x, times=2, **options)
        again, too = gradient(x, times=2, recompute=True, **options)
    assert first.abs().sum() > 0
    for other in (second, again, too):
        assert torch.equal(first, other)


@cases(recompute=(False, True))
@pytest.mark.parametrize("copies", [1, 4])
def test_saves_one_bit_an_element(backend, recompute, copies):
    x = images((2, 3, 16, 12)).requires_grad_()
    saved = []
    with harness.owned_by(backend, NAMES), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        ops.corrupt(x, patch=4, copies=copies, recompute=recompute)
    assert any(t.data_ptr() == x.data_ptr() for t in saved) == recompute
    if not recompute:
        assert sum(t.nbytes for t in saved) == x.numel() // 8 + 2 * 12


@cases(size=(None, (4, 4)))
def test_double_backward_raises(backend, size):
    x = torch.rand(1, 1, 8, 8, device=DEVICE, requires_grad=True)
    with harness.owned_by(backend, NAMES):
        y = ops.corrupt(x, patch=4, size=size)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y).requires_grad_(), create_graph=True)
        with pytest.raises(RuntimeError, match="corrupt: double backward is not supported"):
            dx.sum().backward()


def opcheck(backend, parts, name, *arguments):
    with harness.owned_by(backend, NAMES):
        harness.opcheck(_registry.OPS[name].overload, arguments, parts)


@cases(
    layout=("contiguous", "channels_last"), requires_grad=(False, True),
    traced={"layout": ["channels_last"], "requires_grad": [True]},
)  # fmt: skip
def test_opcheck(backend, layout, requires_grad, parts):
    x = harness.in_layout(images((1, 3, 4, 5)), layout).detach().requires_grad_(requires_grad)
    owners = random_owners(1, (4, 5), 1, 2)
    opcheck(backend, parts, "corrupt", x, owners, *key(1), 1, 2, (4, 5), torch.float32, requires_grad)


@cases(save=(False, True), traced={"save": [True]})
def test_opcheck_resized(backend, save, parts):
    """`save` False: where the gradient passes is computed again."""
    size = (6, 4) if save else (4, 5)
    x = images((2, 1, 4, 5), torch.float64).requires_grad_()
    if parts == "registered":
        opcheck(backend, parts, "corrupt", x, random_owners(2, size, 1, 1), *key(2), 1, 1, size, torch.float64, save)
    opcheck(backend, parts, "corrupt_live", x.detach(), random_owners(2, size, 1, 1), *key(2), 1, 1, size)


@cases(layout=("contiguous", "channels_last"), traced={"layout": ["channels_last"]})
def test_opcheck_bwd(backend, layout, parts):
    dy = harness.in_layout(torch.randn(4, 5, 4, 5, device=DEVICE), layout)
    live = torch.randint(0, 256, (2, 3, 3), device=DEVICE).to(torch.uint8)
    owners = random_owners(2, (4, 5), 1, 2)
    opcheck(backend, parts, "corrupt_bwd", dy, live, owners, 1, 2, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "recompute"), [(None, False), ((4, 8), True)], ids=["plain", "resized"])
def test_compiles_with_its_gradient(size, recompute):
    def call(x, sigma, seed, ids, draws):
        keys = {"seed": seed, "sample_ids": ids, "draw": draws}
        return ops.corrupt(x, patch=4, sigma=sigma, size=size, copies=2, recompute=recompute, **keys)

    samples = [(images((n, 1, 8, 4)).requires_grad_(), *key(n)) for n in (2, 3)]
    spec = harness.Spec("corrupt", call, call, images, (), (), True, ops=NAMES)
    compiled = harness.check_compiled(spec, harness.backends(), samples)
    for x, *keys in samples:
        gradients = [torch.autograd.grad(f(x, *keys).square().sum(), x)[0] for f in (compiled, call)]
        torch.testing.assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.gpu
@cases(but="eager", layout=("contiguous", "channels_last"))
def test_more_than_2_to_the_31_elements(backend, layout):
    """The last sample of many is the same as alone."""
    x = torch.full((3, 2, 16384, 16384), 0.5, device=DEVICE, dtype=torch.bfloat16)
    x = harness.in_layout(x, layout).requires_grad_()
    y = run(backend, x, patch=1024)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last = x.detach()[2:].requires_grad_()
    alone = run(backend, last, patch=1024, sample_ids=torch.tensor([2], device=DEVICE))
    assert torch.equal(y[2:], alone)
    assert torch.equal(dx[2:], torch.autograd.grad(alone, last, torch.ones_like(alone))[0])
