"""z = P(x + alpha sign(g)),  x' = P(x + m (z - x) + (1 - m) (x - x_prev))               docs/math.md#apgd_step_linf"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops.apgd_step_linf import check_arguments, reference

from ._steps import launch_elements, numbers, place, project_linf, read_gradient, read_number, sign, step


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


def launch_apgd_step_linf(
    x: Tensor,
    x_prev: Tensor,
    grad: Tensor,
    x0: Tensor,
    alpha: float,
    eps: float,
    momentum: float,
    alphas: Tensor | None = None,
    epsilons: Tensor | None = None,
    momenta: Tensor | None = None,
) -> Tensor:
    """The Triton implementation of atop_fast::apgd_step_linf."""
    check_arguments("apgd_step_linf", x, x_prev, grad, x0, alpha, eps, momentum, alphas, epsilons, momenta)
    # Triton passes numbers as float32, so that float64 is left to the reference.
    if x.dtype != torch.float32 or x.numel() == 0:
        return reference(x, x_prev, grad, x0, alpha, eps, momentum, alphas, epsilons, momenta)
    values = numbers((alpha, alphas), (eps, epsilons), (momentum, momenta))
    return step(functools.partial(_run, values), x, grad, (x0, x_prev))


def _run(values: tuple[Any, ...], x: Tensor, grad: Tensor, x0: Tensor, x_prev: Tensor, out: Tensor) -> None:
    launch_elements(apgd_step_linf_fwd_kernel, (x, grad, x0, x_prev, out), grad, values)
