"""Classifiers: modules from images (B, C, H, W) in [0, 1] to logits (B, classes), normalisation inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_choice, check_integer, message


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

    Source: He et al., CVPR 2016, in the CIFAR form that RobustBench's ResNet-18 checkpoints have, whose parameter names
    these are. The images enter as they are; the first batch norm normalises them.

    Args:
        channels: channels C of the images.
        classes: number of logits.
        width: channels of the first stage; each later stage halves the resolution and doubles them.
        blocks: number of blocks of every stage.
        stride: of the stem.
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
        h = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            h = self.get_submodule(stage)(h)
        return self.linear(h.mean(dim=(2, 3)))


CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "small_resnet": functools.partial(ResNet, width=24, blocks=(1, 1, 1), stride=2),
    "resnet18": ResNet,
}


def build_classifier(name: str, **options: object) -> nn.Module:
    """A classifier by name.

    "small_cnn" is SmallCNN; "small_resnet" is ResNet(width=24, blocks=(1, 1, 1), stride=2), 174,000 parameters;
    "resnet18" is ResNet(), 11 million. Options are those of the class.
    """
    return CLASSIFIERS[check_choice("build_classifier", "name", name, list(CLASSIFIERS))](**options)
