"""z = P(x + alpha g / |g|),  x' = P(x + m (z - x) + (1 - m) (x - x_prev))               docs/math.md#apgd_step_l2"""

import functools

import triton
import triton.language as tl

from atop_fast.ops.apgd_step_l2 import STEP

from ._steps import (
    ALL,
    TINY,
    clamp,
    finite,
    gradient_norm,
    launch_with_norms,
    launcher,
    norm,
    place,
    read_gradient,
    read_number,
)


@triton.jit
def apgd_step_l2_fwd_kernel(
    x,  # [B, N]
    grad,  # [DRAWS, B, N]
    x0,  # [B, N]
    x_prev,  # [B, N]
    out,  # [B, N]
    partials,  # [4, B, blocks of a sample], or None
    total,  # [B, N] for the sum of the draws, or None
    alpha,
    alphas,  # [B], or None
    ALPHA_STRIDE,
    eps,
    epsilons,  # [B], or None
    EPS_STRIDE,
    momentum,
    momenta,  # [B], or None
    MOMENTUM_STRIDE,
    DRAWS: tl.constexpr,
    DRAW_STRIDE,
    N,
    PHASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sample, i_block, o, mask = place(N, BLOCK)
    b_g = finite(read_gradient(grad, DRAWS, DRAW_STRIDE, o, mask))
    if total is not None:
        tl.store(total + o, b_g, mask)
    b_g, g_norm, least = gradient_norm(b_g, mask, partials, i_sample, i_block, N, 3, PHASE, BLOCK)
    if PHASE != 0:
        b_x, b_x0 = tl.load(x + o, mask), tl.load(x0 + o, mask)
        radius = read_number(eps, epsilons, EPS_STRIDE, i_sample)
        b_d = b_x + tl.div_rn(read_number(alpha, alphas, ALPHA_STRIDE, i_sample), g_norm + least) * b_g - b_x0
        d_norm = norm(b_d, mask, partials, i_sample, i_block, N, 1, 1, PHASE, BLOCK)
        if PHASE != 1:
            b_prev = tl.load(x_prev + o, mask)
            b_z = clamp(b_x0 + b_d * _shorten(d_norm, radius), 0.0, 1.0)
            m = read_number(momentum, momenta, MOMENTUM_STRIDE, i_sample)
            b_d = b_x + m * (b_z - b_x) + (1.0 - m) * (b_x - b_prev) - b_x0
            d_norm = norm(b_d, mask, partials, i_sample, i_block, N, 2, 2, PHASE, BLOCK)
            if PHASE == 3 or PHASE == ALL:
                tl.store(out + o, clamp(b_x0 + b_d * _shorten(d_norm, radius), 0.0, 1.0), mask)


@triton.jit
def _shorten(length, radius):
    return tl.div_rn(tl.where(radius < length, radius, length), length + TINY)


launch_apgd_step_l2 = launcher(STEP, functools.partial(launch_with_norms, apgd_step_l2_fwd_kernel, 3))
