"""Shared by conv3x3 and frozen_conv: frozen copies of convolutions, the fused residual and ReLU, and checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._core.checks import check_float_tensor, message
from ._checks import check_dtype, check_shape

# Number of outputs whose prepared weights are adjacent in memory.
PANEL = 16


def finished(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """The unfused epilogue of a convolution: y + residual, then ReLU if `relu`."""
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def with_residual(
    convolve: Callable[[Tensor | None, bool], Tensor], residual: Tensor | None, relu: bool, shape: Sequence[int]
) -> Tensor:
    """convolve(residual, relu) for outputs of `shape`; a residual that cannot be fused is added by torch."""
    if residual is None or (residual.dtype, residual.shape) == (torch.float32, shape):
        return convolve(residual, relu)
    return finished(convolve(None, False), residual, relu)


def relu_bwd(dy: Tensor, y: Tensor) -> Tensor:
    """The gradient in x of y = relu(x): dy where y > 0, and 0 elsewhere."""
    return torch.ops.aten.threshold_backward(dy, y, 0)


class Frozen(nn.Module):
    """A copy of a convolution with constant weights: the base class of FrozenConv3x3 and FrozenConv.

    Args:
        convolution: A convolution that the subclass's `accepts` accepts.
        relu: Whether a ReLU follows.
        prepare: Maps the weights, and whether to transpose them, to the layout that the subclass's op reads.
    """

    # A description of what `accepts` accepts, for error messages.
    ACCEPTED: ClassVar[str]
    weight: Tensor
    bias: Tensor | None
    prepared: Tensor
    prepared_t: Tensor

    def __init__(self, convolution: nn.Conv2d, relu: bool, prepare: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(convolution, nn.Conv2d):
            raise TypeError(message(name, "convolution", "an nn.Conv2d", type(convolution).__name__))
        if not self.accepts(convolution):
            raise ValueError(message(name, "convolution", self.ACCEPTED, convolution))
        self.relu = relu
        weight, bias = convolution.weight.detach().clone(), convolution.bias
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone(), persistent=False)
        self.register_buffer("prepared", prepare(weight, False), persistent=False)
        self.register_buffer("prepared_t", prepare(weight, True), persistent=False)

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether `module` is a float32 convolution on the CPU, without groups and with zero padding."""
        return (
            type(module) is nn.Conv2d
            and module.groups == 1
            and module.padding_mode == "zeros"
            and module.weight.dtype == torch.float32
            and module.weight.is_cpu
        )


def check_bias(function: str, bias: Any, weight: Tensor) -> None:
    """Raise unless `bias` is None or has one number per output."""
    if bias is not None:
        check_shape(function, "bias", check_float_tensor(function, "bias", bias), weight.shape[:1])


def check_float32(function: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless all are float32; there are no kernels for other dtypes."""
    for argument, value in tensors.items():
        if value is not None:
            check_dtype(function, argument, value, torch.float32)
