"""The definition of the projected steps of attacks, and the arithmetic that they share.

In the schemas of the ops, each of alpha, eps, momentum and k is a number and an optional tensor that replaces it, so
that a number needs no tensor; the public functions accept either in one argument.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.checks import check_integer, check_number, check_tensor, message
from ._checks import check_dtype, check_same_device, check_shape
from ._registry import LIBRARY, NAMESPACE, define

DTYPES = (torch.float32, torch.float64)
# Lower bound of norms, to avoid division by 0.
TINY = 1e-12
# A gradient with a norm below SMALL is scaled by a power of two, because its squares could underflow; the squares after
# scaling neither underflow nor overflow.
SMALL = 2.0**-40
MAGNIFIED = {torch.float32: 2.0**96, torch.float64: 2.0**550}


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


class Number(NamedTuple):
    """A number of a step: the op's argument for a tensor that replaces it, the lower bound, and whether it is whole."""

    tensor: str
    low: float = -math.inf
    whole: bool = False


NUMBERS = {
    "alpha": Number("alphas"),
    "eps": Number("epsilons", low=0),
    "momentum": Number("momenta"),
    "k": Number("ks", low=1, whole=True),
}


@dataclass
class Step:
    """A step op, called like the public function, with each number as a number or as a tensor; see `define_step`."""

    name: str
    specification: Callable[..., Tensor]
    tensors: tuple[str, ...]
    numbers: tuple[str, ...]
    per_sample: bool
    gradient: Callable[..., tuple[Tensor, Tensor]] | None
    op: Any = None

    @property
    def in_place(self) -> bool:
        """Whether the op writes to its first argument and returns nothing."""
        return self.name.endswith("_")

    @property
    def schema(self) -> str:
        """The schema of the op: tensors, numbers, and the optional tensors that replace them."""
        first, *others = self.tensors
        numbers = [f"{'int' if NUMBERS[name].whole else 'float'} {name}" for name in self.numbers]
        replacing = [f"Tensor? {NUMBERS[name].tensor}=None" for name in self.numbers]
        written, result = ("(a!)", "()") if self.in_place else ("", "Tensor")
        images = [f"Tensor{written} {first}", *(f"Tensor {name}" for name in others)]
        return f"{self.name}({', '.join([*images, *numbers, *replacing])}) -> {result}"

    def __call__(self, *arguments: Any) -> Tensor:
        tensors, given = arguments[: len(self.tensors)], arguments[len(self.tensors) :]
        # The op does not read a number that a tensor replaces.
        pairs = [(1, value) if isinstance(value, Tensor) else (value, None) for value in given]
        self._check(self.name, tensors, pairs)
        numbers, values = zip(*pairs, strict=True)
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if recorded and self.gradient is None:
            _refuse_gradients(self.name, dict(zip(self.tensors, tensors, strict=True)))
        compiling = torch.compiler.is_compiling()
        if self.in_place and not compiling:
            _refuse_shared_memory(self.name, dict(zip(self.tensors, tensors, strict=True)))
        if compiling or recorded:
            result = self.op(*tensors, *numbers, *values)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                result = self.op(*tensors, *numbers, *values)
        if not self.in_place:
            return result
        if not compiling:
            torch.autograd.graph.increment_version(tensors[0])
        return tensors[0]

    def parts(self, arguments: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], list[tuple[Any, Tensor | None]]]:
        """The tensors among the op's arguments, and each number with the tensor that replaces it."""
        # The dispatcher omits trailing arguments that have their default.
        first, last = len(self.tensors), len(self.tensors) + len(self.numbers)
        pairs = itertools.zip_longest(arguments[first:last], arguments[last:])
        return arguments[:first], list(pairs)

    def reference(self, *arguments: Any) -> Tensor | None:
        """The specification as an op, in the memory layout that torch.empty_like gives `x`."""
        tensors, pairs = self.parts(arguments)
        result = self.specification(*tensors, *(number if values is None else values for number, values in pairs))
        if not self.in_place:
            return in_layout_of(tensors[0], result)
        tensors[0].copy_(result)
        return None

    def check(self, function: str, *arguments: Any) -> None:
        """Raise unless the op's arguments are as the docstrings of the public functions describe."""
        self._check(function, *self.parts(arguments))

    def _check(self, function: str, tensors: tuple[Tensor, ...], pairs: Sequence[tuple[Any, Tensor | None]]) -> None:
        if not _are_alike(tensors, self.per_sample):
            _check_tensors(function, dict(zip(self.tensors, tensors, strict=True)), self.per_sample)
        # While torch.compile traces, numbers may be symbolic; they are checked at run time.
        are_known = not torch.compiler.is_compiling()
        for name, (number, values) in zip(self.numbers, pairs, strict=True):
            kind = NUMBERS[name]
            if values is not None:
                _check_values(function, name, values, tensors[0], torch.int64 if kind.whole else tensors[0].dtype)
            elif are_known:
                (check_integer if kind.whole else check_number)(function, name, number, low=kind.low)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save all arguments for `backward` if x or x0 needs a gradient."""
        tensors, pairs = self.parts(inputs)
        ctx.numbers = [number for number, _ in pairs]
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[len(tensors) - 1]:
            ctx.save_for_backward(*tensors, *(values for _, values in pairs))

    def backward(self, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients in x and x0; no other argument has one."""
        dx = dx0 = None
        if ctx.saved_tensors:
            tensors, values = ctx.saved_tensors[: len(self.tensors)], ctx.saved_tensors[len(self.tensors) :]
            pairs = zip(ctx.numbers, values, strict=True)
            numbers = [spread(number if value is None else value, tensors[0]) for number, value in pairs]
            dx, dx0 = self.gradient(dy, *tensors, *numbers)  # type: ignore[misc]
        return dx, *(None,) * (len(self.tensors) - 2), dx0, *(None,) * 2 * len(self.numbers)


def define_step(
    name: str,
    specification: Callable[..., Tensor],
    *,
    tensors: tuple[str, ...] = ("x", "grad", "x0"),
    numbers: tuple[str, ...] = ("alpha", "eps"),
    per_sample: bool = False,
    kernels: str | None = None,
    gradient: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Step:
    """Define the op of a step: schema, checks, reference and derivative.

    A name with a trailing underscore makes the op in place. `specification` takes `tensors`, all like x except for
    several draws of grad, and `numbers`, each of them a number or a tensor. `per_sample` tells that the op takes norms
    over each sample. `gradient` takes dy, the tensors and the numbers, in shapes that broadcast with x, and returns the
    gradients in x and x0; without it, the step refuses tensors that require gradients.
    """
    step = Step(name, specification, tensors, numbers, per_sample, gradient)
    step.op = define(step.schema, step.reference, check=step.check, kernels=kernels)
    if gradient is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", step.backward, setup_context=step.setup_context, lib=LIBRARY
        )
    return step


def _refuse_gradients(function: str, tensors: dict[str, Tensor]) -> None:
    """Raise for the first of `tensors` that requires a gradient: autograd would miss what the op does to it."""
    argument = next(name for name, value in tensors.items() if value.requires_grad)
    expected = "a tensor that does not require grad, or the call be under torch.no_grad()"
    raise ValueError(message(function, argument, expected, "one that does"))


def _refuse_shared_memory(function: str, tensors: dict[str, Tensor]) -> None:
    """Raise if another tensor shares memory with x."""
    first, end = _span(tensors["x"])
    for argument, value in tensors.items():
        other_first, other_end = _span(value)
        if argument != "x" and first < other_end and other_first < end:
            raise ValueError(message(function, argument, "a tensor that shares no memory with x", "one that does"))


def _are_alike(tensors: tuple[Any, ...], per_sample: bool) -> bool:
    """Whether the tensors are as documented, with a single gradient: a fast path before _check_tensors."""
    x = tensors[0]
    if not isinstance(x, Tensor):
        return False
    shape, dtype, device = x.shape, x.dtype, x.device
    if dtype not in DTYPES or (per_sample and not shape):
        return False
    for value in tensors[1:]:
        if not isinstance(value, Tensor) or value.dtype is not dtype or value.shape != shape or value.device != device:
            return False
    return True


def _check_tensors(function: str, tensors: dict[str, Any], per_sample: bool) -> None:
    """Raise unless the tensors are as documented, including several draws of the gradient."""
    x = check_dtype(function, "x", tensors["x"], *DTYPES)
    if per_sample and not x.shape:
        raise ValueError(message(function, "x", "of shape (B, ...)", "a scalar"))
    for argument, value in tensors.items():
        shape = check_tensor(function, argument, value).shape
        if argument == "grad" and len(shape) == len(x.shape) + 1:
            if not shape[0]:
                raise ValueError(message(function, "grad", "of at least one draw", "none"))
            shape = shape[1:]
        _check_like(function, argument, value, x, shape)


def _check_like(function: str, argument: str, value: Tensor, x: Tensor, shape: torch.Size) -> None:
    """Raise unless `value` matches `x`; `shape` is the shape of one draw in `value`."""
    if shape != x.shape:
        raise ValueError(message(function, argument, f"of the shape of x {tuple(x.shape)}", tuple(shape)))
    if value.dtype != x.dtype:
        raise TypeError(message(function, argument, f"of the dtype of x {x.dtype}", value.dtype))
    check_same_device(function, argument, value, "x", x)


def _check_values(function: str, argument: str, values: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Raise unless `values` is one number of the dtype, or one for each sample of `x`."""
    if values.dtype != dtype:
        expected = f"of the dtype of x {dtype}" if dtype == x.dtype else "an int64 tensor"
        raise TypeError(message(function, argument, expected, values.dtype))
    check_shape(function, argument, values, *((), x.shape[:1])[: 1 + (x.dim() > 0)])
    check_same_device(function, argument, values, "x", x)


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of `t` and of the byte after its last."""
    first = t.data_ptr()
    if t.is_contiguous() or not t.numel():
        return first, first + t.nbytes
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return first, first + (last + 1) * t.element_size()
