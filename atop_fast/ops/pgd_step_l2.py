"""One projected normalized-gradient step in the L2 ball."""

from __future__ import annotations

import torch
from torch import Tensor

from ._steps import TINY, define_step, norm, spread, sum_of_draws, with_norm


def formula(x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor) -> Tensor:
    """The op as a user would write it; the baseline of the benchmarks."""
    g = torch.nan_to_num(sum_of_draws(grad, x))
    return _project(x + spread(alpha, x) * g / norm(g).clamp_min(TINY), x0, spread(eps, x))


def specification(x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor) -> Tensor:
    """`formula` except for small gradients."""
    return _project(_moved(x, grad, spread(alpha, x)), x0, spread(eps, x))


def _gradient(
    dy: Tensor, x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Through the scale c(d) of x' = clamp(x0 + d c(d)); docs/math.md#pgd_step_l2."""
    delta = _moved(x, grad, alpha) - x0
    length = norm(delta)
    ratio = eps / length.clamp_min(TINY)
    scale = ratio.clamp_max(1)
    projected = x0 + delta * scale
    dy = dy * ((projected >= 0) & (projected <= 1))
    along = (dy * delta)[:, None].flatten(1).sum(dim=1).view_as(length) / length.clamp_min(TINY) ** 2
    # The scale is constant if the length is below TINY or v lies inside the ball.
    dx = dy * scale - torch.where((ratio <= 1) & (length >= TINY), delta * (along * scale), 0)
    return dx, dy - dx


def _moved(x: Tensor, grad: Tensor, alpha: float | Tensor) -> Tensor:
    g, length, least = with_norm(torch.nan_to_num(sum_of_draws(grad, x)))
    # In this order nothing overflows: alpha times the largest number is infinite, and so is the norm.
    return x + alpha * (g / torch.maximum(length, least))


def _project(v: Tensor, x0: Tensor, eps: float | Tensor) -> Tensor:
    delta = v - x0
    return (x0 + delta * (eps / norm(delta).clamp_min(TINY)).clamp_max(1)).clamp(0, 1)


STEP = define_step("pgd_step_l2", specification, per_sample=True, kernels="pgd_step_l2", gradient=_gradient)
STEP_ = define_step("pgd_step_l2_", specification, per_sample=True, kernels="pgd_step_l2")


def pgd_step_l2(x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor) -> Tensor:
    r"""Step along the normalized gradient, then project onto the L2 ball around `x0`, and clip to the image range.

    .. math:: v = x + \alpha g / |g|_2, \quad x' = \mathrm{clamp}(x_0 + (v - x_0) \min(1, \epsilon / |v - x_0|_2), 0, 1)

    Args:
        x: The current images in [0, 1], (B, ...), float32 or float64; norms are taken over each sample.
        grad: The loss gradient at `x`; shape, dtype and device of `x`. Or the gradients of several draws,
            (draws, *x.shape), which the step adds up in order.
        x0: The clean images in [0, 1], the center of the ball; shape, dtype and device of `x`.
        alpha: The length of the step in units of [0, 1], finite; negative to descend. A number, or a tensor of shape ()
            or (B,), one number per sample, of dtype and device of `x`.
        eps: The radius of the ball in units of [0, 1], finite and >= 0; a number or a tensor like `alpha`.

    Returns:
        x', shape and dtype of `x`, in the memory layout of torch.empty_like(x).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or number is not as described. Values of tensors are not checked.

    Notes:
        NaN in the gradient counts as 0 and infinity as the largest number (torch.nan_to_num). A gradient of 0 moves
        nothing; any other gradient, however small, moves the sample by `alpha` (a norm in [2^-40, 1e-12) counts as
        1e-12). NaN in a sample of `x` or `x0` makes that sample NaN.
        Clipping follows the projection onto the ball: the result lies in both sets but is not always the nearest point.
        Differentiable once in `x` and `x0`; `grad`, `alpha` and `eps` receive no gradient.
        torch.compile makes one graph for each pair of numbers, and one for all tensors.

    Reference:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, equation 2, for L2.

    Example:
        >>> x0 = torch.rand(8, 3, 32, 32)
        >>> x = atop_fast.ops.pgd_step_l2(x0, torch.randn_like(x0), x0, alpha=0.1, eps=0.5)
        >>> bool((x - x0).flatten(1).norm(dim=1).max() <= 0.1 + 1e-6)
        True
    """
    return STEP(x, grad, x0, alpha, eps)


def pgd_step_l2_(x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor) -> Tensor:
    r"""Take the step of :func:`pgd_step_l2` in place.

    .. math:: x \leftarrow x'

    Args:
        x: The images to move; see :func:`pgd_step_l2`. Must not share memory with `grad` or `x0`.
        grad: The loss gradient at `x`, or those of several draws.
        x0: The clean images.
        alpha: The length of the step.
        eps: The radius of the ball.

    Returns:
        `x` itself.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or number is not as described, `x` shares memory with `grad` or `x0`, or a
            tensor requires grad while gradients are recorded.

    Notes:
        Not differentiable: autograd would not see the step. Like torch's in-place functions, it increments the version
        of `x`, so that a graph which still needs the old values raises an error.

    Reference:
        See :func:`pgd_step_l2`.

    Example:
        >>> x0 = torch.rand(8, 3, 32, 32)
        >>> x = x0.clone()
        >>> atop_fast.ops.pgd_step_l2_(x, torch.randn_like(x), x0, alpha=0.1, eps=0.5) is x
        True
    """
    return STEP_(x, grad, x0, alpha, eps)
