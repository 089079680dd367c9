"""x' = clamp(clamp(x + alpha sign(g), x0 - eps, x0 + eps), 0, 1)                         docs/math.md#pgd_step_linf"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops.pgd_step_linf import check_arguments, reference

from ._steps import launch_elements, numbers, place, project_linf, read_gradient, read_number, sign, step


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


def launch_pgd_step_linf(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    alpha: float,
    eps: float,
    alphas: Tensor | None = None,
    epsilons: Tensor | None = None,
) -> Tensor:
    """The Triton implementation of atop_fast::pgd_step_linf."""
    check_arguments("pgd_step_linf", x, grad, x0, alpha, eps, alphas, epsilons)
    # Triton passes numbers as float32, so that float64 is left to the reference.
    if x.dtype != torch.float32 or x.numel() == 0:
        return reference(x, grad, x0, alpha, eps, alphas, epsilons)
    return step(functools.partial(_run, numbers((alpha, alphas), (eps, epsilons))), x, grad, (x0,))


def launch_pgd_step_linf_(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    alpha: float,
    eps: float,
    alphas: Tensor | None = None,
    epsilons: Tensor | None = None,
) -> None:
    """The Triton implementation of atop_fast::pgd_step_linf_."""
    check_arguments("pgd_step_linf_", x, grad, x0, alpha, eps, alphas, epsilons)
    if x.dtype != torch.float32 or x.numel() == 0:
        x.copy_(reference(x, grad, x0, alpha, eps, alphas, epsilons))
    else:
        step(functools.partial(_run, numbers((alpha, alphas), (eps, epsilons))), x, grad, (x0,), out=x)


def _run(values: tuple[Any, ...], x: Tensor, grad: Tensor, x0: Tensor, out: Tensor) -> None:
    launch_elements(pgd_step_linf_fwd_kernel, (x, grad, x0, out), grad, values)
