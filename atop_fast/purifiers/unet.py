"""A gated U-Net that works at the images' own resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_integer, message
from .layers import GatedConv, run_section


class ResidualGatedBlock(nn.Module):
    """x + conv(gated convolution(x)), 3x3; zero at first, so that a deeper network starts as the one without it.

    Args:
        width: channels of input and output.
        dilation: of the gated convolution.
    """

    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.gated = GatedConv(width, width, dilation=dilation)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, width, H, W) -> (B, width, H, W)."""
        return x + self.conv(self.gated(x))


class GatedUNet(nn.Module):
    """Purifier of gated convolutions: two levels down, a dilated middle, two levels up with skip connections.

        output = 1.02 tanh(2 * masked image + 8 u),  u the last convolution's output

    The network learns a correction to the masked image, and its range is slightly wider than that of images: an L1
    loss then has its optimum at finite u. With a range that ends at -1, training on mostly black images can push every
    pixel into saturation there, from where it does not return. Networks of a million parameters and more have been seen
    to end there all the same within their first updates: give their trainings clip=1.0.

    Args:
        channels: channels C of the images.
        width: channels at full resolution; doubled at each of the two levels below.
        blocks: residual blocks x + conv(gated convolution(x)) at each of five places: after both convolutions on the
            way down, in the middle (dilations 1, 2, 4 in turn), and after both on the way up. The network has about
            (900 + 621 blocks) width^2 parameters: 0.13 million by default, 2.2 with width=32, blocks=2,
            and 4.9 with width=48, blocks=2.
        checkpointing: keep only the input of every block for the backward pass and compute it again there: less
            memory, more time, the same result.
    """

    def __init__(self, channels: int = 3, width: int = 12, blocks: int = 0, checkpointing: bool = False) -> None:
        super().__init__()
        check_integer("GatedUNet", "channels", channels, low=1)
        check_integer("GatedUNet", "width", width, low=1)
        check_integer("GatedUNet", "blocks", blocks, low=0)
        self.checkpointing = checkpointing
        w = width
        self.channels = channels
        self.down0 = GatedConv(channels + 2, w)
        self.down1 = GatedConv(w, 2 * w, stride=2)
        self.down2 = GatedConv(2 * w, 4 * w, stride=2)
        self.middle = nn.Sequential(GatedConv(4 * w, 4 * w, dilation=2), GatedConv(4 * w, 4 * w))
        self.up1 = GatedConv(6 * w, w)
        self.up0 = GatedConv(2 * w, w)
        self.to_image = nn.Conv2d(w, channels, 3, padding=1)
        nn.init.zeros_(self.to_image.weight)
        nn.init.zeros_(self.to_image.bias)  # type: ignore[arg-type]

        def residual(width: int, dilations: tuple[int, ...] = (1,)) -> nn.ModuleList:
            return nn.ModuleList(ResidualGatedBlock(width, dilations[i % len(dilations)]) for i in range(blocks))

        self.down0_blocks, self.down1_blocks = residual(w), residual(2 * w)
        self.middle_blocks = residual(4 * w, (1, 2, 4))
        self.up1_blocks, self.up0_blocks = residual(w), residual(w)

    def forward(self, x: Tensor) -> Tensor:
        """Restore images.

        Args:
            x: (B, channels + 2, H, W) = [masked image in [-1, 1], ones, mask]; H and W divisible by 4.

        Returns:
            Images (B, channels, H, W) in (-1.02, 1.02).

        Raises:
            ValueError: another number of channels, or a height or width not divisible by 4.
        """
        if x.dim() != 4 or x.shape[1] != self.channels + 2 or x.shape[2] % 4 or x.shape[3] % 4:
            expected = f"of shape (B, {self.channels + 2}, H, W) with H and W divisible by 4"
            raise ValueError(message("GatedUNet", "x", expected, tuple(x.shape)))
        d0 = self._run(self.down0_blocks, self.down0(x))
        d1 = self._run(self.down1_blocks, self.down1(d0))
        m = self.middle(self._run(self.middle_blocks, self.down2(d1)))
        u1 = self._run(self.up1_blocks, self.up1(torch.cat((F.interpolate(m, scale_factor=2.0), d1), dim=1)))
        u0 = self._run(self.up0_blocks, self.up0(torch.cat((F.interpolate(u1, scale_factor=2.0), d0), dim=1)))
        return 1.02 * torch.tanh(2 * x[:, : self.channels] + 8 * self.to_image(u0))

    def _run(self, blocks: nn.ModuleList, h: Tensor) -> Tensor:
        """The blocks in turn, each with its input alone kept for the backward pass if so asked."""
        for block in blocks:
            h = run_section(block, h, self.checkpointing)
        return h
