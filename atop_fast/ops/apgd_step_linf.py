"""One step of APGD in the L-infinity ball: a projected sign-gradient step with momentum."""

from __future__ import annotations

from torch import Tensor

from ._steps import define_step, project_linf, spread, sum_of_draws, with_momentum


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
    eps = spread(eps, x)
    z = project_linf(x + spread(alpha, x) * sum_of_draws(grad, x).sign(), x0, eps)
    return project_linf(with_momentum(x, x_prev, z, momentum), x0, eps)


STEP = define_step(
    "apgd_step_linf",
    formula,
    tensors=("x", "x_prev", "grad", "x0"),
    numbers=("alpha", "eps", "momentum"),
    kernels="apgd_step_linf",
)


def apgd_step_linf(
    x: Tensor,
    x_prev: Tensor,
    grad: Tensor,
    x0: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    momentum: float | Tensor,
) -> Tensor:
    r"""Take one step of APGD in the L-infinity ball.

    .. math:: z = P(x + \alpha\,\mathrm{sign}(g)), \quad x' = P(x + m (z - x) + (1 - m) (x - x_\mathrm{prev}))

    with P(v) = clamp(clamp(v, x0 - eps, x0 + eps), 0, 1).

    Args:
        x: The current images in [0, 1], any shape, float32 or float64.
        x_prev: The images of the previous step, `x` itself in the first; shape, dtype and device of `x`.
        grad: The loss gradient at `x`; shape, dtype and device of `x`. Or the gradients of several draws,
            (draws, *x.shape), which the step adds up in order.
        x0: The clean images in [0, 1], the center of the ball; shape, dtype and device of `x`.
        alpha: The step size in units of [0, 1], finite. A number, or a tensor of shape () or (B,), one number per
            sample, of dtype and device of `x`.
        eps: The radius of the ball in units of [0, 1], finite and >= 0; a number or a tensor like `alpha`.
        momentum: m, finite, the weight of the new step (0.75 in the paper, 1 in the first step); like `alpha`.

    Returns:
        x', shape and dtype of `x`, in the memory layout of torch.empty_like(x).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or number is not as described, or a tensor requires grad while gradients are
            recorded. The values of tensors `alpha`, `eps` and `momentum` are not checked.

    Notes:
        sign(NaN) is 0, as in torch.sign; NaN in the other images gives NaN. Every backend returns the same bits.
        Not differentiable: nothing attacks through an attack's step, and the op saves nothing for a backward pass.
        torch.compile makes one graph for all tensors, and one for each set of numbers.

    Reference:
        Croce and Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
        Attacks, ICML 2020, algorithm 1, lines 7 and 8.

    Example:
        >>> x0 = torch.rand(8, 3, 32, 32)
        >>> x = atop_fast.ops.apgd_step_linf(x0, x0, torch.randn_like(x0), x0, 16 / 255, 8 / 255, momentum=1.0)
        >>> bool((x - x0).abs().max() <= 8 / 255 + 1e-6)
        True
    """
    return STEP(x, x_prev, grad, x0, alpha, eps, momentum)
