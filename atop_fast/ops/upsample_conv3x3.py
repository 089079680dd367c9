"""Nearest up-sampling by 2 and a 3x3 convolution as one transposed convolution, with 4/9 of the multiplications."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._convolutions import check_bias
from .conv3x3 import check_images, check_weight


def formula(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The function as a user would write it: the oracle of the tests and the baseline of the benchmarks."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Up-sample by repeating every pixel 2x2, then convolve with 3x3 weights and zero padding.

    .. math::
        y_{b,o,i,j} = \beta_o
            + \sum_{c,k,l} w_{o,c,k,l} \, x_{b,c,\lfloor (i+k-1)/2 \rfloor, \lfloor (j+l-1)/2 \rfloor}

    The up-sampled image is never formed: adjacent weights that meet the same pixel are added first, which gives a
    transposed convolution with stride 2 and 4x4 weights.

    Args:
        x: (B, C, H, W); channels_last is fastest.
        weight: (O, C, 3, 3).
        bias: (O,), or None.

    Returns:
        y, (B, O, 2 H, 2 W), equal to the two separate steps up to rounding, borders included.

    Raises:
        TypeError: If a tensor does not have a floating-point dtype.
        ValueError: If a shape is not as described.

    Notes:
        Differentiable in all three tensors, any number of times; follows autocast like a convolution.

    Example:
        >>> atop_fast.ops.upsample_conv3x3(torch.randn(8, 96, 64, 64), torch.randn(48, 96, 3, 3)).shape
        torch.Size([8, 48, 128, 128])
    """
    check_weight("upsample_conv3x3", weight)
    check_images("upsample_conv3x3", "x", x, weight.shape[1], 1)
    check_bias("upsample_conv3x3", bias, weight)
    # Under autocast, only the sums are rounded, not their terms.
    with torch.autocast(weight.device.type, enabled=False):
        # S w S' of docs/math.md#upsample_conv3x3: on flipped weights, S adds neighbors, with zero padding.
        wide = F.avg_pool2d(weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1).transpose(0, 1)
    return F.conv_transpose2d(x, wide, bias, stride=2, padding=1)
