"""A network as another project has it: it expects normalized images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MyNet(nn.Module):
    """Gray images (B, 1, H, W), normalized -> logits (B, 10)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, width, 5, stride=2, padding=2), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.BatchNorm2d(4 * width), nn.ReLU()),
        )
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.amax(self.features(x), dim=(2, 3)))
