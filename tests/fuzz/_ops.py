"""For every op of the registry, what its arguments may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _strategies import FLOATS, WIDE, T, integers, optional, positive, sizes, some, tensors
from hypothesis import strategies as st

Arguments = tuple[Any, ...]
GENERATORS: dict[str, st.SearchStrategy[Arguments]] = {}
I64 = (-(2**63), 2**63 - 2)


def of(*names: str) -> Callable[[Callable[..., Arguments]], None]:
    """Register a function from (draw, name) to arguments for these ops."""

    def register(function: Callable[..., Arguments]) -> None:
        for name in names:
            GENERATORS[name] = st.composite(function)(name)

    return register


def dtype_of(draw: st.DrawFn, choices: tuple[torch.dtype, ...] = FLOATS) -> torch.dtype:
    return draw(st.sampled_from(choices))


def per_sample(draw: st.DrawFn, batch: int, dtype: torch.dtype) -> T | None:
    shape = draw(st.sampled_from([(), (batch,)]))
    return draw(optional(tensors(shape, dtype, ("unit", "equal", "zero", "tiny"))))


def inner_shape(draw: st.DrawFn) -> tuple[int, ...]:
    """The size of a sample: several vectors, a few elements, one, or none."""
    return draw(
        st.one_of(
            st.tuples(st.integers(1, 3), sizes, sizes),
            st.tuples(st.sampled_from((1, 2, 63, 64, 65, 1000, 4096, 5000))),
            st.just(()),
        )
    )


@of("pgd_step_linf", "pgd_step_linf_", "pgd_step_l2", "pgd_step_l2_", "pgd_step_l1", "apgd_step_linf", "apgd_step_l2")
def steps(draw, name):
    dtype, batch, inner = dtype_of(draw, WIDE), draw(st.integers(0, 4)), inner_shape(draw)
    shape, draws = (batch, *inner), draw(st.sampled_from((0, 1, 2, 3)))
    images = draw(st.sampled_from([("unit",), ("unit", "corners", "mixed", "equal", "zero", "tiny")]))
    grad = draw(tensors((draws, *shape) if draws else shape, dtype))
    x, x0, before = (draw(tensors(shape, dtype, images)) for _ in range(3))
    if name.endswith("_"):
        x = T(x.shape, dtype, x.values, draw(st.sampled_from(("contiguous", "channels_last", "sliced"))), x.seed)
    numbers = [draw(positive) for _ in range(3 if name.startswith("apgd") else 2)]
    values = [per_sample(draw, batch, dtype) for _ in numbers]
    if name == "pgd_step_l1":
        k = draw(st.sampled_from((1, 2, 5, 10**6)))
        return (x, grad, x0, *numbers, k, *values, draw(optional(integers((batch,), 0, 7))))
    return (x, before, grad, x0, *numbers, *values) if name.startswith("apgd") else (x, grad, x0, *numbers, *values)


@of("project_l1")
def project(draw, name):
    dtype, batch, inner = dtype_of(draw, WIDE), draw(st.integers(0, 4)), inner_shape(draw)
    x, x0 = (draw(tensors((batch, *inner), dtype)) for _ in range(2))
    return x, x0, draw(positive), per_sample(draw, batch, dtype)


@of("attack_loss")
def attack_loss(draw, name):
    dtype, batch, kind = dtype_of(draw), draw(st.integers(0, 40)), draw(st.integers(0, 5))
    classes = draw(st.sampled_from((1, 2, 3, 4, 5, 8, 10, 16, 17, 33, 100, 1000)))
    # The op itself takes labels that are no class.
    low, high = draw(st.sampled_from([(0, classes - 1), (-1, classes), I64]))
    targets = None if kind in (0, 4) else draw(optional(integers((batch,), low, high)))
    return draw(tensors((batch, classes), dtype)), draw(integers((batch,), low, high)), targets, kind


@of("gated", "gated_bwd")
def gated(draw, name):
    dtype, batch, half = dtype_of(draw), draw(st.integers(0, 3)), draw(sizes)
    size = (draw(sizes), draw(sizes))
    h = draw(tensors((batch, 2 * half, *size), dtype))
    bias = draw(optional(tensors((2 * half,), draw(st.sampled_from((dtype, torch.float32))))))
    activation = draw(st.integers(0, 1))
    if name == "gated":
        return h, bias, activation
    return draw(tensors((batch, half, *size), dtype)), h, bias, activation, bias is not None and draw(st.booleans())


def key(draw: st.DrawFn, batch: int) -> Arguments:
    draws = draw(st.sampled_from([(), (batch,)]))
    return draw(integers((), *I64)), draw(integers((batch,), 0, 2**48 - 1)), draw(integers(draws, 0, 2**32 - 1))


@of("mask_blocks")
def mask_blocks(draw, name):
    batch, blocks = draw(st.integers(0, 5)), draw(st.sampled_from((0, 1, 2, 3, 4, 16, 17, 64, 100, 1025)))
    masked = draw(integers(draw(st.sampled_from([(), (batch,)])), *draw(st.sampled_from([(-1, blocks + 1), I64]))))
    return *key(draw, batch), masked, blocks, draw(st.sampled_from((1, 2, 3, 4, 7, 255)))


@of("random_normal", "random_bits")
def random_normal(draw, name):
    count = draw(st.sampled_from((0, 1, 2, 3, 4, 5, 31, 32, 127, 128, 129, 1000)))
    return *key(draw, draw(st.integers(0, 5))), draw(st.sampled_from((0, 1, 3, 65535))), count


def blocks_of(draw: st.DrawFn) -> tuple[int, int, int, int, T]:
    """Batch, patch, height, width, and owners of copies up to 4."""
    batch, patch = draw(st.integers(0, 3)), draw(st.sampled_from((1, 1, 2, 3, 4, 8)))
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return batch, patch, rows * patch, columns * patch, draw(integers((batch, rows * columns), 0, 5, torch.uint8))


@of("corrupt", "corrupt_live", "corrupt_bwd")
def corrupt(draw, name):
    batch, patch, height, width, blocks = blocks_of(draw)
    channels, copies = draw(st.sampled_from((0, 1, 2, 3, 4, 9))), draw(st.sampled_from((1, 2, 3, 4)))
    if name == "corrupt_bwd":
        dtype = dtype_of(draw)
        narrow = dtype if dtype == torch.float64 else dtype_of(draw, (torch.float32, torch.bfloat16, torch.float16))
        # With one copy, the bits are 0 where it was masked; the op relies on this.
        blocks = replace(blocks, low=1) if copies == 1 else blocks
        live = draw(integers((batch, channels, -(-height * width // 8)), 0, 255, torch.uint8))
        dy = draw(tensors((batch * copies, channels + 2, height, width), dtype))
        return dy, live, blocks, patch, copies, narrow
    kind = dtype_of(draw, (torch.uint8, *FLOATS))
    given = (draw(some), draw(some)) if draw(st.booleans()) else (height, width)
    shape = (batch, channels, *given)
    x = draw(integers(shape, 0, 255, torch.uint8) if kind == torch.uint8 else tensors(shape, kind))
    sigma = draw(tensors(draw(st.sampled_from([(), (batch,)])), torch.float32, ("unit", "zero", "tiny", "mixed")))
    arguments = (x, blocks, sigma, *key(draw, batch), patch, copies, [height, width])
    wide = kind == torch.float64
    dtype = kind if wide else dtype_of(draw, (torch.float32, torch.bfloat16, torch.float16))
    return arguments if name == "corrupt_live" else (*arguments, dtype, draw(st.booleans()))


@of("assemble", "assemble_bwd")
def assemble(draw, name):
    batch, patch, height, width, blocks = blocks_of(draw)
    channels, copies, dtype = draw(st.sampled_from((0, 1, 3, 8))), draw(st.sampled_from((1, 2, 4))), dtype_of(draw)
    if name == "assemble":
        return draw(tensors((batch * copies, channels, height, width), dtype)), blocks, patch
    return draw(tensors((batch, channels, height, width), dtype)), blocks, patch, copies


@of("resample")
def resample(draw, name):
    dtype, batch, channels = dtype_of(draw), draw(st.integers(0, 3)), draw(st.sampled_from((0, 1, 3, 8)))
    size = (draw(some), draw(some))
    taps: list[T] = []
    for pixels in size:
        groups, rows, count = draw(st.sampled_from((1, batch))), draw(sizes), draw(st.integers(1, min(pixels, 4)))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        taps += [
            draw(integers((groups, rows), 0, pixels - count)),
            draw(tensors((groups, rows, count), wide, ("unit", "normal", "zero"))),
        ]
    return (draw(tensors((batch, channels, *size), dtype)), *taps, *taps)


@of("conv3x3_prepare", "conv3x3", "conv3x3_bwd", "conv3x3_bwd_weight")
def conv3x3(draw, name):
    channels, outputs = draw(st.sampled_from((0, 1, 3, 16, 17))), draw(st.sampled_from((0, 1, 5, 16, 33)))
    plain = ("unit", "normal", "zero", "equal")
    weight = draw(tensors((outputs, channels, 3, 3), torch.float32, plain))
    if name == "conv3x3_prepare":
        return weight, draw(st.booleans())
    batch, size, dilation = draw(st.integers(0, 2)), (draw(sizes), draw(sizes)), draw(st.sampled_from((1, 2, 5, 40)))
    x = draw(tensors((batch, channels, *size), torch.float32, plain))
    dy = draw(tensors((batch, outputs, *size), torch.float32, plain))
    if name == "conv3x3":
        return x, weight, draw(optional(tensors((outputs,), torch.float32, plain))), None, None, dilation
    return (dy, weight, None, dilation) if name == "conv3x3_bwd" else (dy, x, dilation)


@of("contextual_attention", "contextual_attention_bwd")
def attention(draw, name):
    dtype, batch = dtype_of(draw), draw(st.integers(0, 2))
    channels, rows, columns = draw(st.sampled_from((0, 1, 3, 16, 17))), draw(st.integers(1, 7)), draw(st.integers(1, 7))
    shape = (batch, channels, 2 * rows, 2 * columns)
    features = draw(tensors(shape, dtype, ("unit", "normal", "zero", "equal")))
    valid = draw(integers((batch, rows, columns), 0, 1, torch.bool))
    return (features, valid) if name == "contextual_attention" else (draw(tensors(shape, dtype)), features, valid)
