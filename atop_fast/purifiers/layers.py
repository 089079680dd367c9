"""Layers shared by the purifiers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._core.checks import check_choice, check_integer, message
from ..ops import convolve, gated_elu, gated_relu
from ..ops.conv3x3 import FrozenConv3x3

ACTIVATIONS = {"elu": gated_elu, "relu": gated_relu}


class GatedConv(nn.Module):
    """a(f) * sigmoid(g), with f and g the halves of one convolution's output (Yu et al., ICCV 2019, equation 3).

    The padding, dilation * (kernel_size - 1) / 2, preserves the size of images at stride 1.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels C of the output; the convolution has 2 C.
        kernel_size: An odd number.
        stride: Stride of the convolution.
        dilation: Dilation of the convolution.
        activation: The function a, "elu" or "relu".

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is below 1, `kernel_size` is even, or `activation` is unknown.

    Shape:
        (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        numbers = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size}
        for argument, value in {**numbers, "stride": stride, "dilation": dilation}.items():
            check_integer("GatedConv", argument, value, low=1)
        if kernel_size % 2 == 0:
            raise ValueError(message("GatedConv", "kernel_size", "odd", kernel_size))
        self.activation = check_choice("GatedConv", "activation", activation, list(ACTIVATIONS))
        padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, 2 * out_channels, kernel_size, stride, padding, dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and activate images."""
        conv = self.conv
        if isinstance(conv, FrozenConv3x3):
            # In a network prepared for an attack (attacks.prepared); it adds the bias itself.
            return ACTIVATIONS[self.activation](conv(x))
        h = convolve(x, conv.weight, None, conv.stride[0], conv.dilation[0])
        return ACTIVATIONS[self.activation](h, conv.bias)

    def extra_repr(self) -> str:
        """The activation, which the repr of the convolution does not show."""
        return f"activation={self.activation!r}"


def run_section(section: Callable[[Tensor], Tensor], x: Tensor, checkpointing: bool) -> Tensor:
    """section(x); with `checkpointing`, only x is saved for the backward pass. The section must be deterministic."""
    if checkpointing and torch.is_grad_enabled():
        result: Tensor = checkpoint(section, x, use_reentrant=False, preserve_rng_state=False)
        return result
    return section(x)
