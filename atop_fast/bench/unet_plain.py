"""The gated U-Net in plain PyTorch, the baseline of the benchmarks; names of parameters are those of GatedUNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deepfill_plain import Gated


class Residual(nn.Module):
    """x + convolution of a gated convolution."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.gated = Gated(width, width, dilation=dilation)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.gated(x))


class PlainUNet(nn.Module):
    """(B, channels + 2, H, W) = [masked image, ones, mask] to a tuple of one stage, images (B, channels, H, W)."""

    def __init__(self, channels: int, w: int, blocks: int = 0):
        super().__init__()
        self.channels = channels
        self.down0 = Gated(channels + 2, w)
        self.down1 = Gated(w, 2 * w, stride=2)
        self.down2 = Gated(2 * w, 4 * w, stride=2)
        self.middle = nn.Sequential(Gated(4 * w, 4 * w, dilation=2), Gated(4 * w, 4 * w))
        self.up1 = Gated(6 * w, w)
        self.up0 = Gated(2 * w, w)
        self.to_image = nn.Conv2d(w, channels, 3, padding=1)
        self.register_buffer("gain", torch.tensor(96.0 / w))

        def residual(width: int, dilations: tuple[int, ...] = (1,)) -> nn.Sequential:
            return nn.Sequential(*(Residual(width, dilations[i % len(dilations)]) for i in range(blocks)))

        self.down0_blocks, self.down1_blocks = residual(w), residual(2 * w)
        self.middle_blocks = residual(4 * w, (1, 2, 4))
        self.up1_blocks, self.up0_blocks = residual(w), residual(w)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        d0 = self.down0_blocks(self.down0(x))
        d1 = self.down1_blocks(self.down1(d0))
        m = self.middle(self.middle_blocks(self.down2(d1)))
        u1 = self.up1_blocks(self.up1(torch.cat((F.interpolate(m, scale_factor=2.0), d1), dim=1)))
        u0 = self.up0_blocks(self.up0(torch.cat((F.interpolate(u1, scale_factor=2.0), d0), dim=1)))
        return (1.02 * torch.tanh(2 * x[:, : self.channels] + self.gain * self.to_image(u0)),)
