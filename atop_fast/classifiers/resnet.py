"""Residual networks: for small images, as in RobustBench's checkpoints, and for images of 256x256 pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_integer, message


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), 3x3 convolutions (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network for small images: 3x3 stem, stages of BasicBlocks, global average pooling.

    Source: He et al., CVPR 2016, in the CIFAR variant of RobustBench's ResNet-18 checkpoints, with their parameter
    names. There is no input normalization; the first batch norm takes its place.

    Args:
        channels: channels C of the images.
        classes: number of logits.
        width: channels of the first stage; each later stage halves the resolution and doubles the channels.
        blocks: number of blocks in every stage.
        stride: stride of the stem.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        width: int = 64,
        blocks: Sequence[int] = (2, 2, 2, 2),
        stride: int = 1,
    ) -> None:
        super().__init__()
        check_integer("ResNet", "channels", channels, low=1)
        check_integer("ResNet", "classes", classes, low=1)
        check_integer("ResNet", "width", width, low=1)
        if not blocks:
            raise ValueError(message("ResNet", "blocks", "one number or more", blocks))
        check_integer("ResNet", "stride", stride, low=1)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages: list[str] = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            layers = []
            for block in range(check_integer("ResNet", "blocks", count, low=1)):
                layers.append(BasicBlock(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] -> logits (B, classes)."""
        h = self.stem(x)
        for stage in self.stages:
            h = self.get_submodule(stage)(h)
        return self.linear(h.mean(dim=(2, 3)))

    def stem(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] -> features (B, width, H / stride, W / stride)."""
        return F.relu(self.bn1(self.conv1(x)))


class ImageResNet(ResNet):
    """The residual network of AToP's ablations, for images of 256x256 pixels, with its parameter names.

    A 3x3 stem with stride 2 and 3x3 max-pooling with stride 2 precede the stages; images x are mapped to 2x - 1. The
    original's 8x8 average pooling equals the global average pooling of this class at 256x256; other sizes work, too.

    Args:
        channels, classes, width, blocks: as in ResNet.
    """

    def __init__(
        self, channels: int = 3, classes: int = 10, width: int = 64, blocks: Sequence[int] = (2, 2, 2, 2)
    ) -> None:
        super().__init__(channels, classes, width, blocks, stride=2)

    def stem(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] -> features (B, width, H / 4, W / 4)."""
        return F.max_pool2d(super().stem(2 * x - 1), 3, stride=2, padding=1)
