"""One projected sign-gradient step in the L-infinity ball, the inner step of FGSM and PGD."""

from __future__ import annotations

from torch import Tensor

from ._steps import define_step, project_linf, spread, sum_of_draws


def formula(x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor) -> Tensor:
    """The op as a user would write it; the baseline of the benchmarks."""
    return project_linf(x + spread(alpha, x) * sum_of_draws(grad, x).sign(), x0, spread(eps, x))


def _gradient(
    dy: Tensor, x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor
) -> tuple[Tensor, Tensor]:
    low, high = x0 - eps, x0 + eps
    moved = x + alpha * sum_of_draws(grad, x).sign()
    projected = moved.clamp(low, high)
    dy = dy * ((projected >= 0) & (projected <= 1))
    return dy * ((moved >= low) & (moved <= high)), dy * ((moved < low) | (moved > high))


STEP = define_step("pgd_step_linf", formula, kernels="pgd_step_linf", gradient=_gradient)
STEP_ = define_step("pgd_step_linf_", formula, kernels="pgd_step_linf")


def pgd_step_linf(x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor) -> Tensor:
    r"""Step along the sign of the gradient, then project onto the ball around `x0` and the image range.

    .. math:: x' = \mathrm{clamp}(\mathrm{clamp}(x + \alpha\,\mathrm{sign}(g), x_0 - \epsilon, x_0 + \epsilon), 0, 1)

    Args:
        x: The current images in [0, 1], any shape, float32 or float64.
        grad: The loss gradient at `x`; shape, dtype and device of `x`. Or the gradients of several draws,
            (draws, *x.shape), which the step adds up in order.
        x0: The clean images in [0, 1], the center of the ball; shape, dtype and device of `x`.
        alpha: The step size in units of [0, 1], finite; negative to descend. A number, or a tensor of shape () or (B,),
            one number per sample, of dtype and device of `x`.
        eps: The radius of the ball in units of [0, 1], finite and >= 0; a number or a tensor like `alpha`.

    Returns:
        x', shape and dtype of `x`, in the memory layout of torch.empty_like(x).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or number is not as described. Values of tensors are not checked.

    Notes:
        sign(NaN) is 0, as in torch.sign; NaN in `x` or `x0` gives NaN. Every backend returns the same bits.
        Differentiable in `x` (inside both clamps) and `x0` (on the boundary of the ball); `grad`, `alpha` and `eps`
        receive no gradient. torch.compile makes one graph for each pair of numbers, and one for all tensors.

    Reference:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, equation 2.
        Sum over draws: Athalye et al., Obfuscated Gradients Give a False Sense of Security, ICML 2018 (EOT).

    Example:
        >>> x0 = torch.rand(8, 3, 32, 32)
        >>> x = atop_fast.ops.pgd_step_linf(x0, torch.randn_like(x0), x0, alpha=2 / 255, eps=8 / 255)
        >>> bool((x - x0).abs().max() <= 8 / 255)
        True
    """
    return STEP(x, grad, x0, alpha, eps)


def pgd_step_linf_(x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor) -> Tensor:
    r"""Take the step of :func:`pgd_step_linf` in place.

    .. math:: x \leftarrow x'

    Args:
        x: The images to move; see :func:`pgd_step_linf`. Must not share memory with `grad` or `x0`.
        grad: The loss gradient at `x`, or those of several draws.
        x0: The clean images.
        alpha: The step size.
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
        See :func:`pgd_step_linf`.

    Example:
        >>> x0 = torch.rand(8, 3, 32, 32)
        >>> x = x0.clone()
        >>> atop_fast.ops.pgd_step_linf_(x, torch.randn_like(x), x0, alpha=2 / 255, eps=8 / 255) is x
        True
    """
    return STEP_(x, grad, x0, alpha, eps)
