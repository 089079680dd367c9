"""Shared by the kernels of the projected steps: element offsets, the gradient, and norms.

A program handles a block of elements of one sample. For samples of several blocks, each norm takes one launch: in phase
r, the programs store the sums of squares of their blocks for norm r, and in later phases they add them up. A sample of
one block takes a single launch, in phase ALL.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops import _steps as ops_steps

from ._launch import EXACT, in_layout_of, launch, stride_of

# In kernels with norms, blocks are as long as registers allow; a sample of up to this many elements is a single block.
NORM_BLOCK = 4096
NORM_WARPS = 8
ALL = tl.constexpr(-1)
# The largest float32, to which torch.nan_to_num maps infinity.
LARGEST = tl.constexpr(3.4028234663852886e38)
TINY = tl.constexpr(ops_steps.TINY)
SMALL = tl.constexpr(ops_steps.SMALL)
MAGNIFIED = tl.constexpr(ops_steps.MAGNIFIED[torch.float32])
LEAST_DIVISOR = tl.constexpr(1 / ops_steps.MAGNIFIED[torch.float32])


@triton.jit
def place(N, BLOCK: tl.constexpr):
    """The program's sample, its block in the sample, its element offsets, and the mask of valid elements."""
    i_program, n_blocks = tl.program_id(0), tl.cdiv(N, BLOCK)
    i_sample, i_block = (i_program // n_blocks).to(tl.int64), i_program % n_blocks
    o = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i_sample, i_block, i_sample * N + o, o < N


@triton.jit
def read_number(number, values, STRIDE, i_sample):
    """A number, or the number of the sample."""
    if values is None:
        return number
    else:
        return tl.load(values + i_sample * STRIDE)


@triton.jit
def read_gradient(grad, DRAWS: tl.constexpr, DRAW_STRIDE, o, mask):
    """The gradients of all draws added up in order."""
    b_g = tl.load(grad + o, mask, other=0.0)
    for i_draw in range(1, DRAWS):
        b_g += tl.load(grad + (i_draw * DRAW_STRIDE + o), mask, other=0.0)
    return b_g


@triton.jit
def sign(b_g):
    return tl.where(b_g > 0, 1.0, tl.where(b_g < 0, -1.0, 0.0))


@triton.jit
def clamp(b_v, low, high):
    # Comparisons instead of tl.clamp, so that NaN passes as in torch.clamp.
    b_v = tl.where(b_v < low, low, b_v)
    return tl.where(b_v > high, high, b_v)


@triton.jit
def project_linf(b_v, b_x0, eps):
    low = b_x0 - eps
    b_v = clamp(b_v, low, b_x0 + eps)
    return clamp(tl.where(low != low, low, b_v), 0.0, 1.0)


@triton.jit
def finite(b_g):
    """As torch.nan_to_num."""
    return tl.where(b_g != b_g, 0.0, clamp(b_g, -LARGEST, LARGEST))


@triton.jit
def norm(
    b_v, mask, partials, i_sample, i_block, N, ROW: tl.constexpr, R: tl.constexpr, PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm R of the sample from phase R + 1 on, from row ROW of `partials`.

    In phase R, it is the norm of this block, whose sum of squares is stored; before phase R, it is 0.
    """
    if PHASE == ALL:
        return tl.sqrt_rn(tl.sum(tl.where(mask, b_v * b_v, 0.0)))
    else:
        n_blocks = tl.cdiv(N, BLOCK)
        p_row = partials + (ROW * (tl.num_programs(0) // n_blocks) + i_sample) * n_blocks
        b_sum = 0.0
        if PHASE == R:
            b_sum = tl.sum(tl.where(mask, b_v * b_v, 0.0))
            tl.store(p_row + i_block, b_sum)
        if PHASE > R:
            i_first = 0
            while i_first < n_blocks:
                o = i_first + tl.arange(0, 128)
                b_sum += tl.sum(tl.load(p_row + o, o < n_blocks, other=0.0))
                i_first += 128
        return tl.sqrt_rn(b_sum)


@triton.jit
def gradient_norm(
    b_g, mask, partials, i_sample, i_block, N, NORMS: tl.constexpr, PHASE: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient, scaled by a power of two if its squares could underflow; its norm; the lower bound of divisors."""
    length = norm(b_g, mask, partials, i_sample, i_block, N, 0, 0, PHASE, BLOCK)
    is_small = length < SMALL
    if is_small:
        # All blocks of a small sample are small, so every value read from the last row has been stored.
        length = norm(b_g * MAGNIFIED, mask, partials, i_sample, i_block, N, NORMS, 0, PHASE, BLOCK)
    b_g = b_g * tl.where(is_small, MAGNIFIED, 1.0)
    return b_g, length, tl.where(is_small, LEAST_DIVISOR, TINY)


def dense_arguments(x: Tensor, grad: Tensor, others: tuple[Tensor, ...], out: Tensor) -> tuple[Tensor, ...] | None:
    """The tensors in the layout of `out`, or None unless samples are dense in it and in every draw."""
    if not (out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)):
        return None
    if grad.dim() == x.dim():
        grad = in_layout_of(grad, out)
    elif grad.stride()[1:] != out.stride():
        if not out.is_contiguous():
            return None
        grad = grad.contiguous()
    return (in_layout_of(x, out), grad, *(in_layout_of(t, out) for t in others))


def launcher(step: ops_steps.Step, run: Callable[..., None]) -> Callable[..., Any]:
    """The Triton implementation of the op of `step`.

    `run(tensors, values)` launches the kernel on dense tensors: x, grad, x0, x_prev if the step has one, and the
    output, which may be x. `values` has for each number the number, the tensor that replaces it, and its stride.
    """

    def launch_step(*arguments: Any) -> Tensor | None:
        tensors, pairs = step.parts(arguments)
        x, *before, grad, x0 = tensors
        # Triton passes numbers as float32, so that float64 is left to the reference.
        if x.dtype != torch.float32 or x.numel() == 0:
            return step.reference(*arguments)
        values = tuple(
            item for number, values in pairs for item in (number, values, 0 if values is None else stride_of(values))
        )
        out = x if step.in_place else torch.empty_like(x)
        dense = dense_arguments(x, grad, (x0, *before), out)
        if dense is not None:
            run((*dense, out), values)
        else:
            flat = [t.contiguous() for t in (x, grad, x0, *before)]
            target = torch.empty_like(flat[0])
            run((*flat, target), values)
            out.copy_(target)
        return None if step.in_place else out

    return launch_step


def draws(x: Tensor, grad: Tensor) -> tuple[int, int]:
    """The number of draws, and the stride between them."""
    return (grad.shape[0], grad.stride(0)) if grad.dim() > x.dim() else (1, 0)


def launch_elements(kernel: Any, tensors: tuple[Tensor, ...], values: tuple[Any, ...]) -> None:
    """Run `kernel` without norms; all samples are treated as one unless a number is given per sample."""
    x, grad = tensors[:2]
    rows = len(x) if any(isinstance(v, Tensor) and v.dim() for v in values) else 1
    n = x.numel() // rows
    launch(kernel, n, x.device, *tensors, *values, *draws(x, grad), n, rows=rows, **EXACT)


def launch_with_norms(kernel: Any, count: int, tensors: tuple[Tensor, ...], values: tuple[Any, ...]) -> None:
    """Run `kernel` with `count` norms over each sample."""
    x, grad, *others = tensors
    n, rows = x.numel() // len(x), len(x)
    options = {"rows": rows, "num_warps": NORM_WARPS, **EXACT}
    if n <= NORM_BLOCK:
        block = max(128, triton.next_power_of_2(n))
        launch(
            kernel, n, x.device, x, grad, *others, None, None, *values, *draws(x, grad), n, -1, block=block, **options
        )
        return
    partials = x.new_empty((count + 1) * rows * -(-n // NORM_BLOCK))
    n_draws, stride = draws(x, grad)
    total = torch.empty_like(x) if n_draws > 1 else None
    for phase in range(count + 1):
        scratch = (partials, total if phase == 0 else None)
        args = (x, grad, *others, *scratch, *values, n_draws, stride, n, phase)
        launch(kernel, n, x.device, *args, block=NORM_BLOCK, **options)
        if total is not None:
            grad, n_draws, stride = total, 1, 0
