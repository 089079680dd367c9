"""ResNet-9, which trains on small images in minutes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_integer, message


class PooledConv(nn.Module):
    """relu(bn(maxpool(conv(x)))), 3x3: batch norm processes only a quarter of the convolution's outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, inputs, H, W) -> (B, outputs, H // 2, W // 2)."""
        return F.relu(self.bn(F.max_pool2d(self.conv(x), 2)))


class ResidualPair(nn.Module):
    """x + relu(bn(conv(relu(bn(conv(x)))))), 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, width, H, W) -> (B, width, H, W)."""
        return x + F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet9(nn.Module):
    """Residual network of eight convolutions and a linear layer for small images.

    One convolution at full resolution, three that halve the resolution, with a residual pair after the first and the
    last of these, and global average pooling. The network is the ResNet-9 of DAWNBench (Page, How to train your ResNet,
    2018) at half its widths, with max-pooling before batch norm as in airbench (Jordan, 2024), and without airbench's
    whitening, which amplifies the high frequencies that a purifier leaves. All convolutions but the first preserve the
    size of their input and have at least 16 channels, so that FrozenConv3x3 replaces them in a network under attack.

    At the default widths, it has 1.6 million parameters and takes 0.19 GFLOP (two per multiplication) for an image of
    32x32 pixels; ResNet-18 takes 1.1.

    Args:
        channels: channels C of the images.
        classes: number of logits.
        widths: output channels of the three convolutions that halve the resolution; the convolution before them has
            half as many as the first.
    """

    def __init__(self, channels: int = 3, classes: int = 10, widths: Sequence[int] = (64, 128, 256)) -> None:
        super().__init__()
        check_integer("ResNet9", "channels", channels, low=1)
        check_integer("ResNet9", "classes", classes, low=1)
        if len(widths) != 3:
            raise ValueError(message("ResNet9", "widths", "three numbers", tuple(widths)))
        first, second, third = (check_integer("ResNet9", "widths", width, low=2) for width in widths)
        self.conv = nn.Conv2d(channels, first // 2, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(first // 2)
        self.layer1 = nn.Sequential(PooledConv(first // 2, first), ResidualPair(first))
        self.layer2 = PooledConv(first, second)
        self.layer3 = nn.Sequential(PooledConv(second, third), ResidualPair(third))
        self.linear = nn.Linear(third, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1], H and W >= 8 -> logits (B, classes)."""
        h = F.relu(self.bn(self.conv(2 * x - 1)))
        h = self.layer3(self.layer2(self.layer1(h)))
        return self.linear(h.mean(dim=(2, 3)))
