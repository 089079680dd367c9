"""x' = clamp(clamp(x + alpha sign(g), x0 - eps, x0 + eps), 0, 1)                         docs/math.md#pgd_step_linf"""

import functools

import triton
import triton.language as tl

from atop_fast.ops.pgd_step_linf import STEP, STEP_

from ._steps import launch_elements, launcher, place, project_linf, read_gradient, read_number, sign


@triton.jit
def pgd_step_linf_fwd_kernel(
    x,  # [B, N]
    grad,  # [DRAWS, B, N]
    x0,  # [B, N]
    out,  # [B, N], may be x
    alpha,
    alphas,  # [B], or None
    ALPHA_STRIDE,
    eps,
    epsilons,  # [B], or None
    EPS_STRIDE,
    DRAWS: tl.constexpr,
    DRAW_STRIDE,
    N,
    BLOCK: tl.constexpr,
):
    i_sample, _, o, mask = place(N, BLOCK)
    b_g = read_gradient(grad, DRAWS, DRAW_STRIDE, o, mask)
    b_x, b_x0 = tl.load(x + o, mask), tl.load(x0 + o, mask)
    b_v = b_x + read_number(alpha, alphas, ALPHA_STRIDE, i_sample) * sign(b_g)
    tl.store(out + o, project_linf(b_v, b_x0, read_number(eps, epsilons, EPS_STRIDE, i_sample)), mask)


_run = functools.partial(launch_elements, pgd_step_linf_fwd_kernel)
launch_pgd_step_linf = launcher(STEP, _run)
launch_pgd_step_linf_ = launcher(STEP_, _run)
