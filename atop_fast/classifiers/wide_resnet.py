"""Wide residual networks for small images."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_choice, check_integer, message


class PreactivationBlock(nn.Module):
    """conv(relu(bn(conv(relu(bn(x)))))) + shortcut, 3x3 convolutions (Zagoruyko and Komodakis, BMVC 2016).

    The shortcut is x if the shapes agree, otherwise a 1x1 convolution of relu(bn(x)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: nn.Module, deepmind: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        # DeepMind's networks were trained with TensorFlow's "SAME" padding, which at stride 2 is right and bottom only.
        self.pad = (0, 1, 0, 1) if deepmind and stride == 2 else (1, 1, 1, 1)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        h = self.activation(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(h)
        h = self.activation(self.bn2(self.conv1(F.pad(h, self.pad))))
        return self.conv2(h) + shortcut


class WideResNet(nn.Module):
    """Wide residual network for small images (Zagoruyko and Komodakis, BMVC 2016), as in RobustBench's checkpoints.

    Args:
        depth: number of layers, 6 n + 4 with n blocks in each of three stages.
        widen: the stages have 16, 32 and 64 times this many channels.
        channels: channels C of the images.
        classes: number of logits.
        activation: "relu" or "silu".
        deepmind: the variant of DeepMind's checkpoints (Gowal et al., 2020): input normalization by CIFAR-10's mean and
            standard deviation (requires channels=3), and other padding at stride 2. Otherwise the variant of TRADES
            (Zhang et al., ICML 2019), with its parameter names and without input normalization.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        depth: int = 28,
        widen: int = 10,
        channels: int = 3,
        classes: int = 10,
        activation: str = "relu",
        deepmind: bool = False,
    ) -> None:
        super().__init__()
        if check_integer("WideResNet", "depth", depth, low=10) % 6 != 4:
            raise ValueError(message("WideResNet", "depth", "6 n + 4 for an integer n", depth))
        check_integer("WideResNet", "widen", widen, low=1)
        check_integer("WideResNet", "channels", channels, low=1)
        check_integer("WideResNet", "classes", classes, low=1)
        check_choice("WideResNet", "activation", activation, ["relu", "silu"])
        if deepmind and channels != 3:
            raise ValueError(message("WideResNet", "channels", "3 with deepmind", channels))
        self.deepmind = deepmind
        mean, std = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)) if deepmind else ((0.0,), (1.0,))
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.activation: nn.Module = nn.SiLU() if activation == "silu" else nn.ReLU()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        inputs = 16
        for stage, outputs in enumerate((16 * widen, 32 * widen, 64 * widen)):
            blocks = nn.Sequential()
            for block in range((depth - 4) // 6):
                stride = 2 if stage and not block else 1
                blocks.append(PreactivationBlock(inputs, outputs, stride, self.activation, deepmind))
                inputs = outputs
            # The names in checkpoints have this additional level.
            self.add_module(f"block{stage + 1}", nn.Sequential(OrderedDict(layer=blocks)))
        self.bn1 = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, H, W) in [0, 1] -> logits (B, classes)."""
        if self.deepmind:
            x = (x - self.mean) / self.std
        h = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.activation(self.bn1(h)).mean(dim=(2, 3)))
