"""A task that a small network learns in a second: which of four places of an image is bright."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atop_fast.randomness import seeded


class Places(nn.Module):
    """A convolution and a linear layer: sees where things are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.linear = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.avg_pool2d(F.relu(self.conv(2 * x - 1)), 4).flatten(1))


def places(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 16, 16), noise with a blob at one of four places, and the place."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = 0.3 * torch.rand(count, 1, 16, 16, generator=generator)
    shift = torch.randint(-1, 2, (count, 2), generator=generator)
    row, column = 5 + 6 * (labels // 2) + shift[:, 0], 5 + 6 * (labels % 2) + shift[:, 1]
    at = torch.arange(16)
    near = ((at - row[:, None]) ** 2)[:, :, None] + ((at - column[:, None]) ** 2)[:, None, :]
    return (images + 0.6 * torch.exp(-near / 4)[:, None]).clamp(0, 1), labels


@functools.cache
def trained_classifier() -> nn.Module:
    """A classifier of places that is right on nearly all of them."""
    with seeded(0):
        model = Places()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(60):
            images, labels = places(64, step)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()
