"""One projected sign-gradient step in the L-infinity ball, the inner step of FGSM and PGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._registry import LIBRARY, NAMESPACE, define
from ._steps import check_step, either, in_layout_of, project_linf, run, run_in_place, split, spread, sum_of_draws


def formula(x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor) -> Tensor:
    """The op as a user would write it; the baseline of the benchmarks."""
    return project_linf(x + spread(alpha, x) * sum_of_draws(grad, x).sign(), x0, spread(eps, x))


def reference(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    alpha: float,
    eps: float,
    alphas: Tensor | None = None,
    epsilons: Tensor | None = None,
) -> Tensor:
    """The specification: `formula`, in the memory layout that torch.empty_like gives `x`."""
    check_arguments("pgd_step_linf", x, grad, x0, alpha, eps, alphas, epsilons)
    return in_layout_of(x, formula(x, grad, x0, either(alpha, alphas), either(eps, epsilons)))


def reference_(
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    alpha: float,
    eps: float,
    alphas: Tensor | None = None,
    epsilons: Tensor | None = None,
) -> None:
    """The specification of the step in place."""
    check_arguments("pgd_step_linf_", x, grad, x0, alpha, eps, alphas, epsilons)
    x.copy_(formula(x, grad, x0, either(alpha, alphas), either(eps, epsilons)))


_ARGUMENTS = "Tensor grad, Tensor x0, float alpha, float eps, Tensor? alphas=None, Tensor? epsilons=None"
OP = define(f"pgd_step_linf(Tensor x, {_ARGUMENTS}) -> Tensor", reference, kernels="pgd_step_linf")
OP_ = define(f"pgd_step_linf_(Tensor(a!) x, {_ARGUMENTS}) -> ()", reference_, kernels="pgd_step_linf")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grad, x0, ctx.alpha, ctx.eps, alphas, epsilons = inputs
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        ctx.save_for_backward(x, grad, x0, alphas, epsilons)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.saved_tensors:
        return (None,) * 7
    x, grad, x0, alphas, epsilons = ctx.saved_tensors
    alpha, eps = spread(either(ctx.alpha, alphas), x), spread(either(ctx.eps, epsilons), x)
    low, high = x0 - eps, x0 + eps
    moved = x + alpha * sum_of_draws(grad, x).sign()
    projected = moved.clamp(low, high)
    dy = dy * ((projected >= 0) & (projected <= 1))
    dx = dy * ((moved >= low) & (moved <= high)) if ctx.needs_input_grad[0] else None
    dx0 = dy * ((moved < low) | (moved > high)) if ctx.needs_input_grad[2] else None
    return dx, None, dx0, None, None, None, None


torch.library.register_autograd(f"{NAMESPACE}::pgd_step_linf", _backward, setup_context=_setup_context, lib=LIBRARY)


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
    (number, alphas), (radius, epsilons) = split(alpha), split(eps)
    check_arguments("pgd_step_linf", x, grad, x0, number, radius, alphas, epsilons)
    return run(OP, x, grad, x0, (number, radius, alphas, epsilons))


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
    (number, alphas), (radius, epsilons) = split(alpha), split(eps)
    check_arguments("pgd_step_linf_", x, grad, x0, number, radius, alphas, epsilons)
    return run_in_place("pgd_step_linf_", OP_, x, grad, x0, (number, radius, alphas, epsilons))


def check_arguments(
    function: str,
    x: Tensor,
    grad: Tensor,
    x0: Tensor,
    alpha: float,
    eps: float,
    alphas: Tensor | None,
    epsilons: Tensor | None,
) -> None:
    """Raise unless the arguments are as the docstrings describe."""
    check_step(function, x, grad, {"x0": x0}, {"alpha": (alpha, alphas), "eps": (eps, epsilons)})
