"""z = P(x + alpha sign(g)),  x' = P(x + m (z - x) + (1 - m) (x - x_prev))               docs/math.md#apgd_step_linf"""

import functools

import triton
import triton.language as tl

from atop_fast.ops.apgd_step_linf import STEP

from ._steps import launch_elements, launcher, place, project_linf, read_gradient, read_number, sign


@triton.jit
def apgd_step_linf_fwd_kernel(
    x,  # [B, N]
    grad,  # [DRAWS, B, N]
    x0,  # [B, N]
    x_prev,  # [B, N]
    out,  # [B, N]
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
    BLOCK: tl.constexpr,
):
    i_sample, _, o, mask = place(N, BLOCK)
    b_g = read_gradient(grad, DRAWS, DRAW_STRIDE, o, mask)
    b_x, b_x0, b_prev = tl.load(x + o, mask), tl.load(x0 + o, mask), tl.load(x_prev + o, mask)
    radius = read_number(eps, epsilons, EPS_STRIDE, i_sample)
    b_z = project_linf(b_x + read_number(alpha, alphas, ALPHA_STRIDE, i_sample) * sign(b_g), b_x0, radius)
    m = read_number(momentum, momenta, MOMENTUM_STRIDE, i_sample)
    b_v = b_x + m * (b_z - b_x) + (1.0 - m) * (b_x - b_prev)
    tl.store(out + o, project_linf(b_v, b_x0, radius), mask)


launch_apgd_step_linf = launcher(STEP, functools.partial(launch_elements, apgd_step_linf_fwd_kernel))
