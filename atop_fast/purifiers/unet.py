"""A gated U-Net that works at the resolution of the images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_integer, message
from .layers import GatedConv, run_section


class ResidualGatedBlock(nn.Module):
    """x + conv(gated convolution(x)), 3x3; initially the identity, so that depth does not change the initial network.

    Args:
        width: channels of input and output.
        dilation: dilation of the gated convolution.
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
    """Purifier of gated convolutions: two levels down, a dilated bottleneck, two levels up with skip connections.

        output = 1.02 tanh(2 * masked image + gain u),  u the last convolution's output, gain = 96 / width

    The network learns a correction to the masked image. Its output range is slightly wider than [-1, 1], so that the
    optimum of an L1 loss lies at finite u: with a range that ended at -1, training on mostly black images could
    saturate every pixel there for good.

    Adam changes every weight by about the learning rate in an update, so u changes in proportion to the number of
    channels that it sums over: the gain makes the first updates of wide networks as large as those of narrow ones. The
    other convolutions have He initialization, which preserves the scale of features from layer to layer.

    Args:
        channels: channels C of the images.
        width: channels at full resolution; doubled at each of the two levels below.
        blocks: number of residual blocks x + conv(gated convolution(x)) at each of five positions: after both
            convolutions on the way down, in the bottleneck (dilations 1, 2, 4 in turn), and after both on the way up.
            The network has about (900 + 621 blocks) width^2 parameters: 0.13 million by default, 2.2 with width=32,
            blocks=2, and 4.9 with width=48, blocks=2.
        checkpointing: save only the input of every block for the backward pass and recompute the block: less memory,
            more time, the same result.
        shuffle: factor s of pixel unshuffling (Shi et al., CVPR 2016). For s > 1, the network works at 1/s of the
            images' height and width with s^2 times as many channels, and the output is shuffled back: 1/s^2 of the time
            at the same width.
    """

    gain: Tensor

    def __init__(
        self, channels: int = 3, width: int = 12, blocks: int = 0, checkpointing: bool = False, shuffle: int = 1
    ) -> None:
        super().__init__()
        check_integer("GatedUNet", "channels", channels, low=1)
        check_integer("GatedUNet", "width", width, low=1)
        check_integer("GatedUNet", "blocks", blocks, low=0)
        check_integer("GatedUNet", "shuffle", shuffle, low=1)
        self.checkpointing = checkpointing
        w = width
        self.channels, self.shuffle = channels, shuffle
        self.down0 = GatedConv((channels + 2) * shuffle**2, w)
        self.down1 = GatedConv(w, 2 * w, stride=2)
        self.down2 = GatedConv(2 * w, 4 * w, stride=2)
        self.middle = nn.Sequential(GatedConv(4 * w, 4 * w, dilation=2), GatedConv(4 * w, 4 * w))
        self.up1 = GatedConv(6 * w, w)
        self.up0 = GatedConv(2 * w, w)
        self.to_image = nn.Conv2d(w, channels * shuffle**2, 3, padding=1)
        nn.init.zeros_(self.to_image.weight)
        nn.init.zeros_(self.to_image.bias)  # type: ignore[arg-type]

        def residual(width: int, dilations: tuple[int, ...] = (1,)) -> nn.ModuleList:
            return nn.ModuleList(ResidualGatedBlock(width, dilations[i % len(dilations)]) for i in range(blocks))

        # A buffer, so that files store it: files of version 0 have none and were trained with a gain of 8 at any width.
        self.register_buffer("gain", torch.tensor(96.0 / w))
        self.down0_blocks, self.down1_blocks = residual(w), residual(2 * w)
        self.middle_blocks = residual(4 * w, (1, 2, 4))
        self.up1_blocks, self.up0_blocks = residual(w), residual(w)
        for module in self.modules():
            if isinstance(module, GatedConv):
                nn.init.kaiming_uniform_(module.conv.weight, nonlinearity="relu")

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        state.setdefault(f"{prefix}gain", torch.tensor(8.0))
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Restore images.

        Args:
            x: (B, channels + 2, H, W) = [masked image in [-1, 1], ones, mask]; H and W divisible by 4 shuffle.

        Returns:
            Images (B, channels, H, W) in (-1.02, 1.02).

        Raises:
            ValueError: the number of channels is wrong, or height or width are not divisible.
        """
        unit = 4 * self.shuffle
        if x.dim() != 4 or x.shape[1] != self.channels + 2 or x.shape[2] % unit or x.shape[3] % unit:
            expected = f"of shape (B, {self.channels + 2}, H, W) with H and W divisible by {unit}"
            raise ValueError(message("GatedUNet", "x", expected, tuple(x.shape)))
        shuffled = x if self.shuffle == 1 else F.pixel_unshuffle(x, self.shuffle)
        d0 = self._run(self.down0_blocks, self.down0(shuffled))
        d1 = self._run(self.down1_blocks, self.down1(d0))
        m = self.middle(self._run(self.middle_blocks, self.down2(d1)))
        u1 = self._run(self.up1_blocks, self.up1(torch.cat((F.interpolate(m, scale_factor=2.0), d1), dim=1)))
        u0 = self._run(self.up0_blocks, self.up0(torch.cat((F.interpolate(u1, scale_factor=2.0), d0), dim=1)))
        u = self.to_image(u0)
        u = u if self.shuffle == 1 else F.pixel_shuffle(u, self.shuffle)
        return 1.02 * torch.tanh(2 * x[:, : self.channels] + self.gain * u)

    def _run(self, blocks: nn.ModuleList, h: Tensor) -> Tensor:
        """Apply the blocks in sequence; with checkpointing, only their inputs are saved for the backward pass."""
        for block in blocks:
            h = run_section(block, h, self.checkpointing)
        return h
