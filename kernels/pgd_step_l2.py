"""v = x + alpha g / |g|,  d = v - x0,  x' = clamp(x0 + d min(1, eps / |d|), 0, 1)         docs/math.md#pgd_step_l2"""

import functools

import triton
import triton.language as tl

from atop_fast.ops.pgd_step_l2 import STEP, STEP_

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
def pgd_step_l2_fwd_kernel(
    x,  # [B, N]
    grad,  # [DRAWS, B, N]
    x0,  # [B, N]
    out,  # [B, N], may be x
    partials,  # [3, B, blocks of a sample], or None
    total,  # [B, N] for the sum of the draws, or None
    alpha,
    alphas,  # [B], or None
    ALPHA_STRIDE,
    eps,
    epsilons,  # [B], or None
    EPS_STRIDE,
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
    b_g, g_norm, least = gradient_norm(b_g, mask, partials, i_sample, i_block, N, 2, PHASE, BLOCK)
    if PHASE != 0:
        b_x, b_x0 = tl.load(x + o, mask), tl.load(x0 + o, mask)
        length = tl.where(g_norm < least, least, g_norm)
        b_d = b_x + tl.div_rn(read_number(alpha, alphas, ALPHA_STRIDE, i_sample), length) * b_g - b_x0
        d_norm = norm(b_d, mask, partials, i_sample, i_block, N, 1, 1, PHASE, BLOCK)
        if PHASE == 2 or PHASE == ALL:
            length = tl.where(d_norm < TINY, TINY, d_norm)
            ratio = tl.div_rn(read_number(eps, epsilons, EPS_STRIDE, i_sample), length)
            b_d = b_d * tl.where(ratio > 1.0, 1.0, ratio)
            tl.store(out + o, clamp(b_x0 + b_d, 0.0, 1.0), mask)


_run = functools.partial(launch_with_norms, pgd_step_l2_fwd_kernel, 2)
launch_pgd_step_l2 = launcher(STEP, _run)
launch_pgd_step_l2_ = launcher(STEP_, _run)
