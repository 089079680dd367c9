"""Shared arguments and arithmetic of the projected steps of attacks.

In the schemas of the ops, each of alpha, eps and momentum is a number and an optional tensor that replaces it, so that
a number needs no tensor; the public functions accept either in one argument.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_number, check_tensor, message

DTYPES = (torch.float32, torch.float64)
# Lower bound of norms, to avoid division by 0.
TINY = 1e-12
# A gradient with a norm below SMALL is scaled by a power of two, because its squares could underflow; the squares after
# scaling neither underflow nor overflow.
SMALL = 2.0**-40
MAGNIFIED = {torch.float32: 2.0**96, torch.float64: 2.0**550}


def split(value: float | Tensor) -> tuple[float, Tensor | None]:
    """Split a number or tensor into the two arguments of an op."""
    return (0.0, value) if isinstance(value, Tensor) else (value, None)


def either(number: float | Tensor, values: Tensor | None) -> float | Tensor:
    """The inverse of `split`."""
    return number if values is None else values


def spread(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one number per sample in a shape that broadcasts with `x`."""
    return value.view(-1, *(1,) * (x.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value


def sum_of_draws(grad: Tensor, x: Tensor) -> Tensor:
    """The gradients of all draws added up in order, or the gradient itself."""
    if grad.dim() == x.dim():
        return grad
    total = grad[0]
    for draw in grad[1:]:
        total = total + draw
    return total


def project_linf(v: Tensor, x0: Tensor, eps: float | Tensor) -> Tensor:
    """The nearest point of the L-infinity ball around `x0`, in [0, 1]."""
    return v.clamp(x0 - eps, x0 + eps).clamp(0, 1)


def with_momentum(x: Tensor, x_prev: Tensor, z: Tensor, momentum: float | Tensor) -> Tensor:
    """x + m (z - x) + (1 - m) (x - x_prev), with 1 - m rounded to the dtype of `x`."""
    m = spread(momentum, x) if isinstance(momentum, Tensor) else x.new_full((), momentum)
    return x + m * (z - x) + (1 - m) * (x - x_prev)


def norm(t: Tensor) -> Tensor:
    """The L2 norm of every sample, in a shape that broadcasts with `t`."""
    return t[:, None].flatten(1).norm(dim=1).view(-1, *(1,) * (t.dim() - 1))


def with_norm(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, scaled by a power of two if its squares could underflow; its norm; the lower bound of divisors."""
    length, unit = norm(g), MAGNIFIED[g.dtype]
    is_small = length < SMALL
    g = torch.where(is_small, g * unit, g)
    return g, torch.where(is_small, norm(g), length), torch.full_like(length, TINY).masked_fill(is_small, 1 / unit)


def in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """`result` in the memory layout that torch.empty_like gives `x`."""
    out = torch.empty_like(x)
    return result if result.stride() == out.stride() else out.copy_(result)


def check_step(
    function: str,
    x: Tensor,
    grad: Tensor,
    others: dict[str, Tensor],
    numbers: dict[str, tuple[float, Tensor | None]],
    samples: bool = False,
) -> None:
    """Raise unless the arguments are as documented; `samples` tells that the op takes norms over each sample."""
    if not _are_alike(x, grad, others, samples):
        _check_tensors(function, x, grad, others, samples)
    # While torch.compile traces, numbers may be symbolic; they are checked at run time.
    are_known = not torch.compiler.is_compiling()
    for argument, (number, values) in numbers.items():
        if values is not None:
            _check_per_sample(function, argument, values, x)
        elif are_known:
            check_number(function, argument, number, low=0 if argument == "eps" else -math.inf)


def run(op: Any, x: Tensor, grad: Tensor, x0: Tensor, numbers: tuple[Any, ...]) -> Tensor:
    """Call the differentiable `op` on checked arguments, bypassing autograd if no gradient is needed."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (x.requires_grad or x0.requires_grad)):
        return op(x, grad, x0, *numbers)
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, grad, x0, *numbers)


def run_in_place(function: str, op: Any, x: Tensor, grad: Tensor, x0: Tensor, numbers: tuple[Any, ...]) -> Tensor:
    """Call the in-place `op` on checked arguments and return `x`."""
    refuse_gradients(function, x=x, grad=grad, x0=x0)
    if torch.compiler.is_compiling():
        op(x, grad, x0, *numbers)
        return x
    first, end = _span(x)
    for argument, value in (("grad", grad), ("x0", x0)):
        other_first, other_end = _span(value)
        if first < other_end and other_first < end:
            raise ValueError(message(function, argument, "a tensor that shares no memory with x", "one that does"))
    op(x, grad, x0, *numbers)
    torch.autograd.graph.increment_version(x)
    return x


def refuse_gradients(function: str, **tensors: Tensor) -> None:
    """Raise if autograd is recording and would miss what the op does to `tensors`."""
    if torch.is_grad_enabled():
        for argument, value in tensors.items():
            if value.requires_grad:
                expected = "a tensor that does not require grad, or the call be under torch.no_grad()"
                raise ValueError(message(function, argument, expected, "one that does"))


def _are_alike(x: Any, grad: Any, others: dict[str, Any], samples: bool) -> bool:
    """Whether the tensors are as documented, with a single gradient: a fast path before _check_tensors."""
    if not isinstance(x, Tensor):
        return False
    shape, dtype, device = x.shape, x.dtype, x.device
    if dtype not in DTYPES or (samples and not shape):
        return False
    for value in (grad, *others.values()):
        if not isinstance(value, Tensor) or value.dtype is not dtype or value.shape != shape or value.device != device:
            return False
    return True


def _check_tensors(function: str, x: Any, grad: Any, others: dict[str, Any], samples: bool) -> None:
    """Raise unless the tensors are as documented, including several draws of the gradient."""
    if check_tensor(function, "x", x).dtype not in DTYPES:
        raise TypeError(message(function, "x", "a float32 or float64 tensor", x.dtype))
    if samples and not x.shape:
        raise ValueError(message(function, "x", "of shape (B, ...)", "a scalar"))
    draw_shape = check_tensor(function, "grad", grad).shape
    if len(draw_shape) == len(x.shape) + 1:
        if not draw_shape[0]:
            raise ValueError(message(function, "grad", "of at least one draw", "none"))
        draw_shape = draw_shape[1:]
    _check_like(function, "grad", grad, x, draw_shape)
    for argument, value in others.items():
        _check_like(function, argument, value, x, check_tensor(function, argument, value).shape)


def _check_like(function: str, argument: str, value: Tensor, x: Tensor, shape: torch.Size) -> None:
    """Raise unless `value` matches `x`; `shape` is the shape of one draw in `value`."""
    if shape != x.shape:
        raise ValueError(message(function, argument, f"of the shape of x {tuple(x.shape)}", tuple(shape)))
    if value.dtype != x.dtype:
        raise TypeError(message(function, argument, f"of the dtype of x {x.dtype}", value.dtype))
    if value.device != x.device:
        raise ValueError(message(function, argument, f"on the device of x {x.device}", value.device))


def _check_per_sample(function: str, argument: str, values: Tensor, x: Tensor) -> None:
    if values.dtype != x.dtype:
        raise TypeError(message(function, argument, f"of the dtype of x {x.dtype}", values.dtype))
    if values.dim() and (not x.dim() or values.shape != x.shape[:1]):
        expected = f"of shape () or {tuple(x.shape[:1])}" if x.dim() else "of shape ()"
        raise ValueError(message(function, argument, expected, tuple(values.shape)))
    if values.device != x.device:
        raise ValueError(message(function, argument, f"on the device of x {x.device}", values.device))


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of `t` and of the byte after its last."""
    first = t.data_ptr()
    if t.is_contiguous() or not t.numel():
        return first, first + t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return first, first + (last + 1) * t.element_size()
