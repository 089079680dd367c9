"""The activation of a gated convolution: elu(f) * sigmoid(g)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_tensor, message
from ._registry import LIBRARY, NAMESPACE, define, forbid_double_backward

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def formula(h: Tensor) -> Tensor:
    """The op as a user would write it, in the dtype of `h`; the baseline of the benchmarks."""
    f, g = h.chunk(2, dim=1)
    return F.elu(f) * torch.sigmoid(g)


def reference(h: Tensor) -> Tensor:
    """The specification: 16-bit inputs are computed in float32 and rounded once, at the end."""
    check_h("gated_elu", h)
    return formula(_widen(h)).to(h.dtype).contiguous(memory_format=memory_format(h))


def reference_bwd(dy: Tensor, h: Tensor) -> Tensor:
    """df = dy sigmoid(g) elu'(f) and dg = dy elu(f) sigmoid(g) (1 - sigmoid(g)), stacked as in `h`."""
    check_h("gated_elu_bwd", h)
    check_dy("gated_elu_bwd", dy, h)
    f, g = _widen(h).chunk(2, dim=1)
    dy, gate = _widen(dy), torch.sigmoid(g)
    df = dy * gate * f.clamp(max=0).exp()
    # 1 - sigmoid(g) would lose all digits for large g.
    dg = dy * F.elu(f) * gate * torch.sigmoid(-g)
    return torch.cat([df, dg], dim=1).to(h.dtype).contiguous(memory_format=memory_format(h))


OP = define("gated_elu(Tensor h) -> Tensor", reference, kernels="gated_elu")
OP_BWD = define("gated_elu_bwd(Tensor dy, Tensor h) -> Tensor", reference_bwd, kernels="gated_elu")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    return OP_BWD(dy, *ctx.saved_tensors)


torch.library.register_autograd(f"{NAMESPACE}::gated_elu", _backward, setup_context=_setup_context, lib=LIBRARY)
forbid_double_backward("gated_elu_bwd")


def gated_elu(h: Tensor) -> Tensor:
    r"""Activate the output of a gated convolution: its first half of channels gated by its second.

    .. math:: y = \mathrm{elu}(f) \cdot \mathrm{sigmoid}(g), \quad f = h_{:, :C}, \quad g = h_{:, C:}

    Args:
        h: The convolution's output, shape (B, 2C, H, W), float32, float64, bfloat16 or float16.

    Returns:
        y, shape (B, C, H, W), dtype of `h`; channels_last if `h` is channels_last, contiguous otherwise.

    Raises:
        TypeError: If `h` is not a tensor of one of these dtypes.
        ValueError: If `h` has another shape, or an odd number of channels.

    Notes:
        Differentiable once; a second derivative raises RuntimeError. Only `h` is kept for the backward pass, which
        recomputes the rest. 16-bit inputs are computed in float32. Deterministic.

    Reference:
        Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019, equation 3.

    Example:
        >>> h = torch.randn(8, 96, 32, 32)
        >>> atop_fast.ops.gated_elu(h).shape
        torch.Size([8, 48, 32, 32])
    """
    check_h("gated_elu", h)
    return OP(h)


def check_h(function: str, h: Tensor) -> None:
    """Raise unless `h` is what the op takes."""
    if check_tensor(function, "h", h).dtype not in DTYPES:
        raise TypeError(message(function, "h", "a float32, float64, bfloat16 or float16 tensor", h.dtype))
    if h.dim() != 4 or h.shape[1] % 2:
        raise ValueError(message(function, "h", "of shape (B, 2C, H, W)", tuple(h.shape)))


def check_dy(function: str, dy: Tensor, h: Tensor) -> None:
    """Raise unless `dy` matches the output for `h`."""
    shape = (h.shape[0], h.shape[1] // 2, h.shape[2], h.shape[3])
    if dy.shape != shape:
        raise ValueError(message(function, "dy", f"of the shape of y {shape}", tuple(dy.shape)))
    if dy.dtype != h.dtype:
        raise TypeError(message(function, "dy", f"of the dtype of y {h.dtype}", dy.dtype))
    if dy.device != h.device:
        raise ValueError(message(function, "dy", f"on the device of y {h.device}", dy.device))


def _widen(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def memory_format(h: Tensor) -> torch.memory_format:
    """The memory format of the result for `h`."""
    if not h.is_contiguous() and h.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
