"""A network's convolution, by whatever is fastest: the one call that layers make."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .conv3x3 import conv3x3


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, dilation: int = 1) -> Tensor:
    """Convolve images with weights of an odd size, padded by zeros so that a stride of 1 keeps the images' size.

    Args:
        x: (B, C, H, W); channels_last is fastest.
        weight: (O, C, K, L), K and L odd.
        bias: (O,), or None.
        stride: Pixels between neighbouring outputs.
        dilation: Pixels between neighbouring weights.

    Returns:
        (B, O, ceil(H / stride), ceil(W / stride)).
    """
    if stride == 1 and weight.shape[2:] == (3, 3):
        return conv3x3(x, weight, bias, dilation)
    padding = [size // 2 * dilation for size in weight.shape[2:]]
    return F.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation)
