"""One step of APGD in the L2 ball: a projected normalized-gradient step with momentum."""

from __future__ import annotations

import torch
from torch import Tensor

from ._steps import TINY, define_step, norm, spread, sum_of_draws, with_momentum, with_norm


def formula(
    x: Tensor,
    x_prev: Tensor,
    grad: Tensor,
    x0: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    momentum: float | Tensor,
) -> Tensor:
    """The op as a user would write it; the baseline of the benchmarks."""
    g = torch.nan_to_num(sum_of_draws(grad, x))
    return _moved(x, x_prev, g / (norm(g) + TINY), x0, alpha, eps, momentum)


def specification(
    x: Tensor,
    x_prev: Tensor,
    grad: Tensor,
    x0: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    momentum: float | Tensor,
) -> Tensor:
    """`formula` except for small gradients."""
    g, length, least = with_norm(torch.nan_to_num(sum_of_draws(grad, x)))
    return _moved(x, x_prev, g / (length + least), x0, alpha, eps, momentum)


def _moved(
    x: Tensor,
    x_prev: Tensor,
    direction: Tensor,
    x0: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    momentum: float | Tensor,
) -> Tensor:
    eps = spread(eps, x)
    z = _project(x + spread(alpha, x) * direction, x0, eps)
    return _project(with_momentum(x, x_prev, z, momentum), x0, eps)


def _project(v: Tensor, x0: Tensor, eps: float | Tensor) -> Tensor:
    delta = v - x0
    length = norm(delta)
    return (x0 + delta / (length + TINY) * length.clamp_max(eps)).clamp(0, 1)


STEP = define_step(
    "apgd_step_l2",
    specification,
    tensors=("x", "x_prev", "grad", "x0"),
    numbers=("alpha", "eps", "momentum"),
    per_sample=True,
    kernels="apgd_step_l2",
)


def apgd_step_l2(
    x: Tensor,
    x_prev: Tensor,
    grad: Tensor,
    x0: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    momentum: float | Tensor,
) -> Tensor:
    r"""Take one step of APGD in the L2 ball.

    .. math:: z = P(x + \alpha\,g / |g|_2), \quad x' = P(x + m (z - x) + (1 - m) (x - x_\mathrm{prev}))

    with P(v) = clamp(x0 + d / |d| min(eps, |d|), 0, 1), d = v - x0.

    Args:
        x: The current images in [0, 1], (B, ...), float32 or float64.
        x_prev: The images of the previous step, `x` itself in the first; shape, dtype and device of `x`.
        grad: The loss gradient at `x`; shape, dtype and device of `x`. Or the gradients of several draws,
            (draws, *x.shape), which the step adds up in order.
        x0: The clean images in [0, 1], the center of the ball; shape, dtype and device of `x`.
        alpha: The length of the step in units of [0, 1], finite. A number, or a tensor of shape () or (B,), one number
            per sample, of dtype and device of `x`.
        eps: The radius of the ball in units of [0, 1], finite and >= 0; a number or a tensor like `alpha`.
        momentum: m, finite, the weight of the new step (0.75 in the paper, 1 in the first step); like `alpha`.

    Returns:
        x', shape and dtype of `x`, in the memory layout of torch.empty_like(x).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or number is not as described, or a tensor requires grad while gradients are
            recorded. The values of tensors `alpha`, `eps` and `momentum` are not checked.

    Notes:
        NaN in the gradient counts as 0 and infinity as the largest number (torch.nan_to_num). As in AutoAttack, 1e-12
        is added to norms that divide, except to a gradient norm below 2^-40: such a gradient, unless it is 0, moves the
        images by `alpha`, whereas AutoAttack's step vanishes. NaN in a sample of the other images makes that sample
        NaN. Not differentiable: nothing attacks through an attack's step, and the op saves nothing for a backward pass.
        torch.compile makes one graph for all tensors, and one for each set of numbers.

    Reference:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks, ICML 2020, algorithm 1, lines 7 and 8, with the projection of AutoAttack.

    Example:
        >>> x0 = torch.rand(8, 3, 32, 32)
        >>> x = atop_fast.ops.apgd_step_l2(x0, x0, torch.randn_like(x0), x0, alpha=1.0, eps=0.5, momentum=1.0)
        >>> bool((x - x0).flatten(1).norm(dim=1).max() <= 0.5 + 1e-6)
        True
    """
    return STEP(x, x_prev, grad, x0, alpha, eps, momentum)
