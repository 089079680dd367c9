"""A convolution of any size and stride with constant weights, and a fused residual and ReLU, on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import message
from ._checks import check_shape
from ._convolutions import (
    PANEL,
    Frozen,
    check_bias,
    check_float32,
    finished,
    relu_bwd,
    with_residual,
)
from ._registry import LIBRARY, MISSING, NAMESPACE, define, forbid_double_backward


def formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, residual: Tensor | None, relu: bool
) -> Tensor:
    """The op as a user would write it, in the dtype of `x`; the baseline of the benchmarks."""
    return finished(F.conv2d(x, weight, bias, stride, padding), residual, relu)


def prepare(weight: Tensor, stride: int, padding: int, transposed: bool) -> Tensor:
    """The weights (O, C, K, L), flattened in the order in which the kernel reads them; `transposed` for the gradient.

    For every row, column and channel, the weights of PANEL outputs are adjacent, zero-padded beyond the outputs. With
    stride s, the gradient in the images has s * s phases, stored one after the other, because pixels with different
    remainders meet different weights. If that takes fewer products, all phases are instead outputs of one convolution,
    with zeros where a pixel does not meet a weight.
    """
    if not transposed:
        return _flat(weight)
    weight = weight.transpose(0, 1)
    outputs, inputs, *sizes = weight.shape
    rows, columns = ([_taps(size, stride, padding, i) for i in range(stride)] for size in sizes)
    (top, height), (left, width) = (_extent(taps) for taps in (rows, columns))
    if -(-stride * stride * outputs // PANEL) * height * width >= -(-outputs // PANEL) * sizes[0] * sizes[1]:
        parts = [(list(row.values())[::-1], list(column.values())[::-1]) for row in rows for column in columns]
        return torch.cat([_flat(weight[:, :, row][:, :, :, column]) for row, column in parts])
    joint = weight.new_zeros(stride, stride, outputs, inputs, height, width)
    for a, row in enumerate(rows):
        for b, column in enumerate(columns):
            for i, k in row.items():
                for j, n in column.items():
                    joint[a, b, :, :, i - top, j - left] = weight[:, :, k, n]
    return _flat(joint.flatten(0, 2))


def _taps(size: int, stride: int, padding: int, remainder: int) -> dict[int, int]:
    """The weights, out of `size` along an axis, that pixels with this remainder meet, by the offset of the output."""
    reach = remainder + padding
    return {(reach - k) // stride: k for k in range(reach % stride, size, stride)}


def _extent(taps: list[dict[int, int]]) -> tuple[int, int]:
    """The offset of the first output that any remainder meets, and the number of outputs up to the last."""
    offsets = [offset for tap in taps for offset in tap]
    return min(offsets), max(offsets) - min(offsets) + 1


def _flat(weight: Tensor) -> Tensor:
    panels = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -len(weight) % PANEL)).unflatten(0, (-1, PANEL))
    return panels.permute(0, 3, 4, 2, 1).flatten()


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prepared: Tensor,
    prepared_t: Tensor,
    stride: int,
    padding: int,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """The specification. `prepared` and `prepared_t` are the weights as `prepare` orders them for kernels."""
    return formula(x, weight, bias, stride, padding, residual, relu).contiguous(memory_format=torch.channels_last)


def reference_bwd(
    dy: Tensor,
    weight: Tensor,
    prepared_t: Tensor,
    height: int,
    width: int,
    stride: int,
    padding: int,
    channels_last: bool,
    y: Tensor | None,
) -> Tensor:
    """The gradient in x (B, C, height, width) of dy, masked by y > 0 if y is given."""
    dy = dy if y is None else relu_bwd(dy, y)
    x = dy.new_empty(len(dy), weight.shape[1], height, width)
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False]
    )
    return dx.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def check_arguments(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prepared: Tensor,
    prepared_t: Tensor,
    stride: int,
    padding: int,
    residual: Tensor | None,
    relu: bool,
) -> None:
    """Raise unless the op accepts the arguments."""
    check_float32(function, x=x, weight=weight, bias=bias, residual=residual)
    check_bias(function, bias, weight)
    if residual is not None:
        check_shape(function, "residual", residual, output_shape(x, weight, stride, padding))


def output_shape(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, ...]:
    """The shape of the convolution of `x`."""
    sizes = (
        (given + 2 * padding - taps) // stride + 1 for given, taps in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    return x.shape[0], weight.shape[0], *sizes


def check_bwd(
    function: str,
    dy: Tensor,
    weight: Tensor,
    prepared_t: Tensor,
    height: int,
    width: int,
    stride: int,
    padding: int,
    channels_last: bool,
    y: Tensor | None,
) -> None:
    """Raise unless the backward op accepts the arguments."""
    check_float32(function, dy=dy, weight=weight, y=y)
    if y is not None:
        check_shape(function, "y", y, dy.shape)


OP = define(
    "frozen_conv(Tensor x, Tensor weight, Tensor? bias, Tensor prepared, Tensor prepared_t, int stride, int padding,"
    " Tensor? residual, bool relu) -> Tensor",
    reference,
    check=check_arguments,
    kernels=None,
)
OP_BWD = define(
    "frozen_conv_bwd(Tensor dy, Tensor weight, Tensor prepared_t, int height, int width, int stride, int padding,"
    " bool channels_last, Tensor? y) -> Tensor",
    reference_bwd,
    check=check_bwd,
    kernels=None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, prepared_t, ctx.stride, ctx.padding, _, relu = inputs
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(message("frozen_conv", "weight", "without gradients, and bias too", "requires_grad=True"))
    ctx.size, ctx.channels_last = x.shape[2:], not x.is_contiguous()
    ctx.save_for_backward(weight, prepared_t, output if relu else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    weight, prepared_t, y = ctx.saved_tensors
    of_x, of_residual = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
    if y is not None and of_residual:
        dy, y = relu_bwd(dy, y), None
    dx = None
    if of_x:
        dx = OP_BWD(dy, weight, prepared_t, *ctx.size, ctx.stride, ctx.padding, ctx.channels_last, y)
    return dx, None, None, None, None, None, None, dy if of_residual else None, None


torch.library.register_autograd(f"{NAMESPACE}::frozen_conv", _backward, setup_context=_setup_context, lib=LIBRARY)
forbid_double_backward("frozen_conv_bwd")


# Larger weights do not stay in the CPU's caches, and torch's convolution reads them less often.
MOST_WEIGHTS = 1 << 18
# With more input channels and stride 1, torch's convolution is faster.
FEW_CHANNELS = 16


def wins(x: Tensor, weight: Tensor) -> bool:
    """Whether the op can be used; `FrozenConv.accepts` tells whether it is faster than torch's convolution."""
    return "cpp" not in MISSING and x.is_cpu and x.dtype == weight.dtype == torch.float32


class FrozenConv(Frozen):
    """A copy of a convolution with constant weights and a fused residual and ReLU, for networks under attack.

    Computes relu(convolution(x) + residual) in one pass over the outputs. Forward and input gradient use the op
    `frozen_conv` if it can be used, and torch's convolution otherwise. The weights have no gradient and are not in the
    state dict, because they cannot be changed.

    Args:
        convolution: A convolution that `accepts` accepts.
        relu: Whether a ReLU follows the sum.

    Raises:
        TypeError: If `convolution` is not an nn.Conv2d.
        ValueError: If `accepts` does not accept it.

    Shape:
        (B, C, H, W) and, if there is a residual, (B, O, H', W') to (B, O, H', W'), as `convolution`.

    Example:
        >>> FrozenConv(nn.Conv2d(3, 16, 3, stride=2), relu=True)(torch.rand(8, 3, 32, 32)).shape
        torch.Size([8, 16, 15, 15])
    """

    ACCEPTED = "a float32 convolution on the CPU with a stride or few channels, few weights, and no groups"

    def __init__(self, convolution: nn.Conv2d, relu: bool = False) -> None:
        super().__init__(convolution, relu, lambda w, t: prepare(w, *_stride_and_padding(convolution), t))
        self.stride, self.padding = _stride_and_padding(convolution)

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether this class can replace `module` and is faster.

        Measured against oneDNN: the forward passes are about equally fast, and the fused residual and ReLU are free;
        the gradient in images with few channels takes a third to a half of the time.
        """
        return (
            Frozen.accepts(module)
            and (module.stride[0] > 1 or module.in_channels < FEW_CHANNELS)
            and module.stride[0] == module.stride[1]
            and not isinstance(module.padding, str)
            and module.padding[0] == module.padding[1]
            and module.dilation == (1, 1)
            and module.weight.numel() <= MOST_WEIGHTS
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve images (B, C, H, W), add the residual and apply the ReLU, if any."""
        if not wins(x, self.weight):
            return formula(x, self.weight, self.bias, self.stride, self.padding, residual, self.relu)
        weights = (self.weight, self.bias, self.prepared, self.prepared_t, self.stride, self.padding)
        shape = output_shape(x, self.weight, self.stride, self.padding)
        return with_residual(lambda *fused: OP(x, *weights, *fused), residual, self.relu, shape)

    def extra_repr(self) -> str:
        """Channels, kernel size and options."""
        outputs, channels, *sizes = self.weight.shape
        return f"{channels}, {outputs}, {tuple(sizes)}, stride={self.stride}, padding={self.padding}, relu={self.relu}"


def _stride_and_padding(convolution: nn.Conv2d) -> tuple[int, int]:
    return convolution.stride[0], int(convolution.padding[0])
