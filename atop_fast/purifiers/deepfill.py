"""DeepFillV2, the inpainting network that AToP fine-tunes, with the parameter names of the public checkpoints."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .._core.checks import check_integer, message
from ..ops import contextual_attention, upsample_conv3x3
from .layers import ACTIVATIONS, GatedConv, run_section

DILATIONS = (1, 2, 4, 8, 16)


class UpsampledGatedConv(nn.Module):
    """Nearest 2x up-sampling, then a 3x3 gated convolution: (B, C, H, W) to (B, out_channels, 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = GatedConv(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Up-sample, convolve and activate images."""
        conv = self.conv.conv
        return ACTIVATIONS[self.conv.activation](upsample_conv3x3(x, conv.weight), conv.bias)


class ContextualAttention(nn.Module):
    """Fill masked positions with patches from elsewhere in the same features (see ops.contextual_attention)."""

    def __init__(self) -> None:
        super().__init__()
        # Public checkpoints have this buffer; the op fuses along the diagonal without it.
        self.register_buffer("fuse_weight", torch.eye(3)[None, None])

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Features (B, C, H / 4, W / 4) with their masks (B, 1, H, W)."""
        return contextual_attention(features, mask)


def _down(in_channels: int, middle: int, out_channels: int) -> nn.Sequential:
    """Two gated convolutions; the first halves the resolution."""
    first = GatedConv(in_channels, middle, stride=2)
    return nn.Sequential(OrderedDict(conv1_downsample=first, conv2=GatedConv(middle, out_channels)))


def _up(in_channels: int, middle: int, out_channels: int) -> nn.Sequential:
    """Two gated convolutions; the first doubles the resolution."""
    first = UpsampledGatedConv(in_channels, middle)
    return nn.Sequential(OrderedDict(conv1_upsample=first, conv2=GatedConv(middle, out_channels)))


class _Stage(nn.Module):
    """Base of both stages: a decoder from features at a quarter of the resolution to images, and checkpointing."""

    checkpointing = False

    def _add_decoder(self, c: int) -> None:
        self.up_block1 = _up(2 * c, c, c)
        self.up_block2 = _up(c, c // 2, c // 4)
        self.conv_to_rgb = nn.Sequential(OrderedDict(conv=nn.Conv2d(c // 4, 3, 3, padding=1)))

    def _run(self, x: Tensor, *names: str) -> Tensor:
        """Apply the named layers in sequence; with checkpointing, only `x` is saved for the backward pass."""

        def run(h: Tensor) -> Tensor:
            for name in names:
                h = self.get_submodule(name)(h)
            return h

        return run_section(run, x, self.checkpointing)

    def _decode(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        h = self._run(h, "up_block1", "up_block2", "conv_to_rgb")
        # Under autocast, the output keeps the dtype of the input images.
        return torch.tanh(h.to(dtype))


class CoarseStage(_Stage):
    """(B, 5, H, W) = [masked image, ones, mask] to a coarse image (B, 3, H, W) in [-1, 1]."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1 = GatedConv(5, c // 2, 5)
        self.down_block1 = _down(c // 2, c, c)
        self.down_block2 = _down(c, 2 * c, 2 * c)
        for i, dilation in enumerate((*DILATIONS, 1, 1), 1):
            self.add_module(f"conv_bn{i}", GatedConv(2 * c, 2 * c, dilation=dilation))
        self._add_decoder(c)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        h = self._run(x, "conv1", "down_block1", "down_block2")
        h = self._run(h, *(f"conv_bn{i}" for i in range(1, 8)))
        return self._decode(h, x.dtype)


class FineStage(_Stage):
    """The composed image (B, 3, H, W) and the mask (B, 1, H, W) to the refined image, in [-1, 1].

    A convolutional branch and a branch with contextual attention see the same image; the decoder sees both.
    """

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv_conv1 = GatedConv(3, c // 2, 5)
        self.conv_down_block1 = _down(c // 2, c // 2, c)
        self.conv_down_block2 = _down(c, c, 2 * c)
        for i, dilation in enumerate(DILATIONS, 1):
            self.add_module(f"conv_conv_bn{i}", GatedConv(2 * c, 2 * c, dilation=dilation))
        self.ca_conv1 = GatedConv(3, c // 2, 5)
        self.ca_down_block1 = _down(c // 2, c // 2, c)
        self.ca_down_block2 = _down(c, 2 * c, 2 * c)
        self.ca_conv_bn1 = GatedConv(2 * c, 2 * c, activation="relu")
        self.contextual_attention = ContextualAttention()
        self.ca_conv_bn4 = GatedConv(2 * c, 2 * c)
        self.ca_conv_bn5 = GatedConv(2 * c, 2 * c)
        self.conv_bn6 = GatedConv(4 * c, 2 * c)
        self.conv_bn7 = GatedConv(2 * c, 2 * c)
        self._add_decoder(c)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """See the class."""
        a = self._run(x, "conv_conv1", "conv_down_block1", "conv_down_block2")
        a = self._run(a, *(f"conv_conv_bn{i}" for i in range(1, 6)))
        b = self._run(x, "ca_conv1", "ca_down_block1", "ca_down_block2.conv1_downsample")
        # No 16-bit types here, even under autocast: attention amplifies rounding errors of the features that it
        # compares, and the gradient in the input was occasionally wrong.
        with torch.autocast(b.device.type, enabled=False):
            b = b.to(self.ca_conv_bn1.conv.weight.dtype)
            b = self.contextual_attention(self._run(b, "ca_down_block2.conv2", "ca_conv_bn1"), mask)
        b = self._run(b, "ca_conv_bn4", "ca_conv_bn5")
        h = self._run(torch.cat((a, b), dim=1), "conv_bn6", "conv_bn7")
        return self._decode(h, x.dtype)


class DeepFillV2(nn.Module):
    """Two-stage inpainting network of gated convolutions with contextual attention: the purifier of AToP.

        coarse  = stage1(masked image, ones, mask)
        refined = stage2(coarse * mask + masked image * (1 - mask), mask)

    Source: Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019, in the form that AToP (ICLR 2024)
    fine-tunes, with its 85 parameter names: public checkpoints load unchanged (load_deepfill). Every sample has its own
    mask, and the whole batch is computed at once; the public code applies the mask of the first sample to all.

    Args:
        cnum: channels c at full resolution, divisible by 4; 48 in public checkpoints.
        checkpointing: save only the inputs of a few sections of the network for the backward pass and recompute the
            rest: less memory, more time, equal gradients. `net.checkpointing = True` enables it later.

    Raises:
        TypeError: cnum is not an integer.
        ValueError: cnum is below 4 or not divisible by 4.
    """

    def __init__(self, cnum: int = 48, checkpointing: bool = False) -> None:
        super().__init__()
        if check_integer("DeepFillV2", "cnum", cnum, low=4) % 4:
            raise ValueError(message("DeepFillV2", "cnum", "divisible by 4", cnum))
        self.stage1 = CoarseStage(cnum)
        self.stage2 = FineStage(cnum)
        self.checkpointing = checkpointing

    @property
    def checkpointing(self) -> bool:
        """Whether the backward pass recomputes features instead of saving them."""
        return self.stage1.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.stage1.checkpointing = self.stage2.checkpointing = bool(value)

    def forward(self, x: Tensor) -> Tensor:
        """Restore images: the refined image of `stages`."""
        return self.stages(x)[1]

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Restore images in two stages.

        Args:
            x: (B, 5, H, W) = [masked image in [-1, 1], ones, mask], the mask 1 where the image is masked and 0
                elsewhere; H and W divisible by 8.

        Returns:
            The coarse and the refined image, (B, 3, H, W) in [-1, 1] each, in the dtype of x; channels_last if x is.

        Raises:
            ValueError: the number of channels is not 5, or height or width are not divisible by 8.

        Notes:
            The mask receives a gradient only as an input of the first convolution; in the composition of the images and
            the choice of patches for the attention it is a constant.
        """
        if x.dim() != 4 or x.shape[1] != 5 or x.shape[2] % 8 or x.shape[3] % 8 or 0 in x.shape[2:]:
            expected = "of shape (B, 5, H, W) with H and W divisible by 8"
            raise ValueError(message("DeepFillV2", "x", expected, tuple(x.shape)))
        image, mask = x[:, :3], x[:, 4:].detach()
        coarse = self.stage1(x)
        return coarse, self.stage2(coarse * mask + image * (1 - mask), mask)
