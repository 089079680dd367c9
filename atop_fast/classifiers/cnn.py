"""A small convolutional classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_integer


class SmallCNN(nn.Module):
    """Three strided convolutions and global average pooling: a classifier for small images.

    Args:
        channels: channels C of the images.
        classes: number of logits.
        width: channels of the first layer; doubled in each of the next two.
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        check_integer("SmallCNN", "channels", channels, low=1)
        check_integer("SmallCNN", "classes", classes, low=1)
        check_integer("SmallCNN", "width", width, low=1)
        self.conv1 = nn.Conv2d(channels, width, 5, stride=2, padding=2)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] -> logits (B, classes)."""
        h = F.relu(self.conv1(2 * x - 1))
        h = F.relu(self.conv2(h))
        h = F.relu(self.conv3(h))
        return self.linear(h.mean(dim=(2, 3)))
