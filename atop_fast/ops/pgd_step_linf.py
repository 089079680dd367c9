"""One projected sign-gradient step in the L-infinity ball, the inner step of FGSM and PGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_number, check_tensor, message
from ._registry import LIBRARY, NAMESPACE, define

DTYPES = (torch.float32, torch.float64)


def formula(x: Tensor, grad: Tensor, x0: Tensor, alpha: float, eps: float) -> Tensor:
    """The op as a user would write it; the baseline of the benchmarks."""
    return (x + alpha * grad.sign()).clamp(x0 - eps, x0 + eps).clamp(0, 1)


def reference(x: Tensor, grad: Tensor, x0: Tensor, alpha: float, eps: float) -> Tensor:
    """The specification: `formula`, in the memory layout that torch.empty_like gives `x`."""
    check_arguments("pgd_step_linf", x, grad, x0, alpha, eps)
    projected = (x + alpha * grad.sign()).clamp(x0 - eps, x0 + eps)
    return torch.clamp(projected, 0, 1, out=torch.empty_like(x))


def reference_(x: Tensor, grad: Tensor, x0: Tensor, alpha: float, eps: float) -> None:
    """The specification of the step in place."""
    check_arguments("pgd_step_linf_", x, grad, x0, alpha, eps)
    x.copy_(formula(x, grad, x0, alpha, eps))


_ARGUMENTS = "Tensor grad, Tensor x0, float alpha, float eps"
OP = define(f"pgd_step_linf(Tensor x, {_ARGUMENTS}) -> Tensor", reference, kernels="pgd_step_linf")
OP_ = define(f"pgd_step_linf_(Tensor(a!) x, {_ARGUMENTS}) -> ()", reference_, kernels="pgd_step_linf")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grad, x0, ctx.alpha, ctx.eps = inputs
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
        ctx.save_for_backward(x, grad, x0)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
    if not ctx.saved_tensors:
        return None, None, None, None, None
    x, grad, x0 = ctx.saved_tensors
    low, high = x0 - ctx.eps, x0 + ctx.eps
    moved = x + ctx.alpha * grad.sign()
    projected = moved.clamp(low, high)
    dy = dy * ((projected >= 0) & (projected <= 1))
    dx = dy * ((moved >= low) & (moved <= high)) if ctx.needs_input_grad[0] else None
    dx0 = dy * ((moved < low) | (moved > high)) if ctx.needs_input_grad[2] else None
    return dx, None, dx0, None, None


torch.library.register_autograd(f"{NAMESPACE}::pgd_step_linf", _backward, setup_context=_setup_context, lib=LIBRARY)


def pgd_step_linf(x: Tensor, grad: Tensor, x0: Tensor, alpha: float, eps: float) -> Tensor:
    r"""Step along the sign of the gradient, then project onto the ball around `x0` and the image range.

    .. math:: x' = \mathrm{clamp}(\mathrm{clamp}(x + \alpha\,\mathrm{sign}(g), x_0 - \epsilon, x_0 + \epsilon), 0, 1)

    Args:
        x: The current images in [0, 1], any shape, float32 or float64.
        grad: The loss gradient at `x`; shape, dtype and device of `x`.
        x0: The clean images in [0, 1], the centre of the ball; shape, dtype and device of `x`.
        alpha: The step size in units of [0, 1], finite; negative to descend.
        eps: The radius of the ball in units of [0, 1], finite and >= 0.

    Returns:
        x', shape and dtype of `x`, in the memory layout of torch.empty_like(x).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or number is not as described.

    Notes:
        sign(NaN) is 0, as in torch.sign; NaN in `x` or `x0` gives NaN. Every backend returns the same bits.
        Differentiable in `x` (inside of both clamps) and `x0` (on the edge of the ball); `grad` gets no gradient.
        torch.compile makes one graph for each pair of numbers.

    Reference:
        Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018, equation 2.

    Example:
        >>> x0 = torch.rand(8, 3, 32, 32)
        >>> x = atop_fast.ops.pgd_step_linf(x0, torch.randn_like(x0), x0, alpha=2 / 255, eps=8 / 255)
        >>> bool((x - x0).abs().max() <= 8 / 255)
        True
    """
    check_arguments("pgd_step_linf", x, grad, x0, alpha, eps)
    return OP(x, grad, x0, alpha, eps)


def pgd_step_linf_(x: Tensor, grad: Tensor, x0: Tensor, alpha: float, eps: float) -> Tensor:
    r"""Take the step of :func:`pgd_step_linf` in place.

    .. math:: x \leftarrow x' \text{ as there}

    Args:
        x: The images to move; see :func:`pgd_step_linf`. Shares no memory with `grad` and `x0`.
        grad: The loss gradient at `x`.
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
        Not differentiable: autograd would not see the step. As with torch's own in-place functions, the version of `x`
        counts up, so that a graph which still needs the old values notices.

    Reference:
        As :func:`pgd_step_linf`.

    Example:
        >>> x0 = torch.rand(8, 3, 32, 32)
        >>> x = x0.clone()
        >>> atop_fast.ops.pgd_step_linf_(x, torch.randn_like(x), x0, alpha=2 / 255, eps=8 / 255) is x
        True
    """
    function = "pgd_step_linf_"
    check_arguments(function, x, grad, x0, alpha, eps)
    if torch.is_grad_enabled():
        for argument, value in (("x", x), ("grad", grad), ("x0", x0)):
            if value.requires_grad:
                expected = "a tensor that does not require grad, or the call be under torch.no_grad()"
                raise ValueError(message(function, argument, expected, "one that does"))
    if torch.compiler.is_compiling():
        OP_(x, grad, x0, alpha, eps)
        return x
    for argument, value in (("grad", grad), ("x0", x0)):
        if _may_overlap(x, value):
            raise ValueError(message(function, argument, "a tensor that shares no memory with x", "one that does"))
    OP_(x, grad, x0, alpha, eps)
    torch.autograd.graph.increment_version(x)
    return x


def check_arguments(function: str, x: Tensor, grad: Tensor, x0: Tensor, alpha: float, eps: float) -> None:
    """Raise unless the arguments are as the docstrings describe."""
    if check_tensor(function, "x", x).dtype not in DTYPES:
        raise TypeError(message(function, "x", "a float32 or float64 tensor", x.dtype))
    for argument, value in (("grad", grad), ("x0", x0)):
        if check_tensor(function, argument, value).shape != x.shape:
            raise ValueError(message(function, argument, f"of the shape of x {tuple(x.shape)}", tuple(value.shape)))
        if value.dtype != x.dtype:
            raise TypeError(message(function, argument, f"of the dtype of x {x.dtype}", value.dtype))
        if value.device != x.device:
            raise ValueError(message(function, argument, f"on the device of x {x.device}", value.device))
    # While torch.compile traces, numbers may be symbols; what runs checks them.
    if not torch.compiler.is_compiling():
        check_number(function, "alpha", alpha)
        check_number(function, "eps", eps, low=0)


def _may_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the bytes between the first and the last element of `a` and `b` meet."""
    if a.numel() == 0:
        return False
    (a_first, a_end), (b_first, b_end) = _extent(a), _extent(b)
    return a_first < b_end and b_first < a_end


def _extent(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
