"""x' = clamp(clamp(x + alpha sign(g), x0 - eps, x0 + eps), 0, 1)                         docs/math.md#pgd_step_linf"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atop_fast.ops.pgd_step_linf import check_arguments, reference

from ._launch import in_layout_of, launch


@triton.jit
def pgd_step_linf_fwd_kernel(
    x,  # [N]
    grad,  # [N]
    x0,  # [N]
    out,  # [N], may be x
    alpha,
    eps,
    N,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    b_x = tl.load(x + offsets, mask)
    b_g = tl.load(grad + offsets, mask)
    b_x0 = tl.load(x0 + offsets, mask)
    b_sign = tl.where(b_g > 0, 1.0, tl.where(b_g < 0, -1.0, 0.0))
    b_x = b_x + alpha * b_sign
    # Comparisons rather than tl.clamp, so that NaN passes as in torch.clamp.
    low, high = b_x0 - eps, b_x0 + eps
    b_x = tl.where(b_x < low, low, b_x)
    b_x = tl.where(b_x > high, high, b_x)
    b_x = tl.where(b_x0 != b_x0, b_x0, b_x)
    b_x = tl.where(b_x < 0.0, 0.0, b_x)
    b_x = tl.where(b_x > 1.0, 1.0, b_x)
    tl.store(out + offsets, b_x, mask)


def launch_pgd_step_linf(x: Tensor, grad: Tensor, x0: Tensor, alpha: float, eps: float) -> Tensor:
    """The Triton implementation of atop_fast::pgd_step_linf."""
    check_arguments("pgd_step_linf", x, grad, x0, alpha, eps)
    # Triton passes numbers as float32, so that float64 is left to the reference.
    if x.dtype != torch.float32 or x.numel() == 0:
        return reference(x, grad, x0, alpha, eps)
    out = torch.empty_like(x)
    _launch(in_layout_of(x, out), grad, x0, out, alpha, eps)
    return out


def launch_pgd_step_linf_(x: Tensor, grad: Tensor, x0: Tensor, alpha: float, eps: float) -> None:
    """The Triton implementation of atop_fast::pgd_step_linf_."""
    check_arguments("pgd_step_linf_", x, grad, x0, alpha, eps)
    if x.dtype == torch.float32 and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        _launch(x, grad, x0, x, alpha, eps)
    else:
        x.copy_(launch_pgd_step_linf(x, grad, x0, alpha, eps))


def _launch(x: Tensor, grad: Tensor, x0: Tensor, out: Tensor, alpha: float, eps: float) -> None:
    if n := x.numel():
        grad, x0 = in_layout_of(grad, out), in_layout_of(x0, out)
        launch(pgd_step_linf_fwd_kernel, n, x.device, x, grad, x0, out, alpha, eps, n)
