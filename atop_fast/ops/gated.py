"""The activation of a gated convolution: elu(f) * sigmoid(g) or relu(f) * sigmoid(g), with the convolution's bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.checks import check_tensor, message
from ._checks import FLOATS, check_dtype, check_dy, check_same_device, check_shape
from ._images import memory_format, widen
from ._registry import LIBRARY, NAMESPACE, define, forbid_double_backward

# The op's argument `activation` is an index into this tuple.
ACTIVATIONS = ("elu", "relu")
ELU, RELU = range(2)


def formula(h: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """The op as a user would write it, in the dtype of `h`; the baseline of the benchmarks."""
    h = h if bias is None else h + bias.to(h.dtype)[:, None, None]
    f, g = h.chunk(2, dim=1)
    return (F.elu(f) if activation == ELU else F.relu(f)) * torch.sigmoid(g)


def reference(h: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """The specification: 16-bit inputs are computed in float32 and rounded once, at the end."""
    y = formula(widen(h), bias, activation)
    return y.to(h.dtype).contiguous(memory_format=memory_format(h))


def reference_bwd(dy: Tensor, h: Tensor, bias: Tensor | None, activation: int, with_db: bool) -> tuple[Tensor, Tensor]:
    """dh, and db, the sum of unrounded dh over batch and pixels; db is empty unless `with_db`.

    df = dy sigmoid(g) a'(f) and dg = dy a(f) sigmoid(g) (1 - sigmoid(g)), stacked as in `h`, for the activation a.
    """
    wide, dy = widen(h), widen(dy)
    f, g = (wide if bias is None else wide + bias.to(wide.dtype)[:, None, None]).chunk(2, dim=1)
    passed = dy * torch.sigmoid(g)
    df = passed * f.clamp(max=0).exp() if activation == ELU else torch.where(f <= 0, 0, passed)
    # For large g, 1 - sigmoid(g) would lose all digits.
    dg = dy * (F.elu(f) if activation == ELU else F.relu(f)) * torch.sigmoid(g) * torch.sigmoid(-g)
    dh = torch.cat([df, dg], dim=1)
    db = dh.sum(dim=(0, 2, 3)).to(bias.dtype) if bias is not None and with_db else h.new_empty(0)
    return dh.to(h.dtype).contiguous(memory_format=memory_format(h)), db


def check_arguments(function: str, h: Tensor, bias: Tensor | None, activation: int) -> None:
    """Raise unless the op accepts the arguments."""
    check_dtype(function, "h", h, *FLOATS)
    if h.dim() != 4 or h.shape[1] % 2:
        raise ValueError(message(function, "h", "of shape (B, 2C, H, W)", tuple(h.shape)))
    if activation not in (ELU, RELU):
        raise ValueError(message(function, "activation", "0 or 1", activation))
    if bias is None:
        return
    if check_tensor(function, "bias", bias).dtype not in (h.dtype, torch.float32):
        raise TypeError(message(function, "bias", f"of the dtype of h {h.dtype} or float32", bias.dtype))
    check_shape(function, "bias", bias, h.shape[1:2])
    check_same_device(function, "bias", bias, "h", h)


def check_bwd(function: str, dy: Tensor, h: Tensor, bias: Tensor | None, activation: int, with_db: bool) -> None:
    """Raise unless the backward op accepts the arguments."""
    check_arguments(function, h, bias, activation)
    check_dy(function, dy, output_shape(h), h)
    if with_db and bias is None:
        raise ValueError(message(function, "with_db", "False without a bias", with_db))


def output_shape(h: Tensor) -> tuple[int, ...]:
    """The shape of the result for `h`."""
    return (h.shape[0], h.shape[1] // 2, *h.shape[2:])


OP = define(
    "gated(Tensor h, Tensor? bias, int activation) -> Tensor", reference, check=check_arguments, kernels="gated"
)
OP_BWD = define(
    "gated_bwd(Tensor dy, Tensor h, Tensor? bias, int activation, bool with_db) -> (Tensor, Tensor)",
    reference_bwd,
    check=check_bwd,
    kernels="gated",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
    with_db = ctx.needs_input_grad[1]
    dh, db = OP_BWD(dy, *ctx.saved_tensors, ctx.activation, with_db)
    return dh, db if with_db else None, None


torch.library.register_autograd(f"{NAMESPACE}::gated", _backward, setup_context=_setup_context, lib=LIBRARY)
forbid_double_backward("gated_bwd")


def gated_elu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Activate the output of a gated convolution: the second half of the channels gates the first half.

    .. math::
        y = \mathrm{elu}(f) \cdot \mathrm{sigmoid}(g), \quad
        f = h_{:, :C} + \beta_{:C}, \quad g = h_{:, C:} + \beta_{C:}

    Args:
        h: The convolution's output, shape (B, 2C, H, W), float32, float64, bfloat16 or float16.
        bias: The convolution's bias, if `h` was computed without it, shape (2C,), dtype of `h` or float32.

    Returns:
        y, shape (B, C, H, W), dtype of `h`; channels_last if `h` is channels_last, contiguous otherwise.

    Raises:
        TypeError: If `h` or `bias` is not a tensor of one of these dtypes.
        ValueError: If `h` or `bias` has the wrong shape, `h` has an odd number of channels, or their devices differ.

    Notes:
        Differentiable once; a second derivative raises RuntimeError. Only `h` and `bias` are saved for the backward
        pass, which recomputes the rest. 16-bit inputs are computed in float32, also under autocast, which casts
        nothing here. The gradient of `bias`, a sum over batch and pixels, is computed together with the gradient of
        `h`, and only if needed. Deterministic, with the same bits for any number of threads.

    Reference:
        Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019, equation 3.

    Example:
        >>> h = torch.randn(8, 96, 32, 32)
        >>> atop_fast.ops.gated_elu(h).shape
        torch.Size([8, 48, 32, 32])
    """
    check_arguments("gated_elu", h, bias, ELU)
    return OP(h, bias, ELU)


def gated_relu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """relu(f) * sigmoid(g): `gated_elu` with ReLU as the activation, whose slope at 0 is 0."""
    check_arguments("gated_relu", h, bias, RELU)
    return OP(h, bias, RELU)
