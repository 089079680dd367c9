"""DeepFillV2 in plain PyTorch, the baseline of the benchmarks and the oracle of the tests.

This is the public formulation: NCHW, one kernel per operation, and contextual attention in a loop over samples. It
shares no code with the package. Parameter names are those of public checkpoints; any dtype works.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CNUM = 48


class Gated(nn.Module):
    """elu(f) * sigmoid(g), or relu(f) * sigmoid(g), f and g the halves of a convolution's output."""

    def __init__(
        self, inputs: int, outputs: int, size: int = 3, stride: int = 1, dilation: int = 1, relu: bool = False
    ):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 2 * outputs, size, stride, dilation * (size - 1) // 2, dilation)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        f, g = self.conv(x).chunk(2, dim=1)
        return (F.relu(f) if self.relu else F.elu(f)) * torch.sigmoid(g)


class Upsampled(nn.Module):
    """Every pixel repeated in 2x2, then a gated convolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = Gated(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Down(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int):
        super().__init__()
        self.conv1_downsample = Gated(inputs, middle, stride=2)
        self.conv2 = Gated(middle, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1_downsample(x))


class Up(nn.Module):
    def __init__(self, inputs: int, middle: int, outputs: int):
        super().__init__()
        self.conv1_upsample = Upsampled(inputs, middle)
        self.conv2 = Gated(middle, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1_upsample(x))


class Rgb(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fuse_weight", torch.eye(3)[None, None])

    def forward(self, b: Tensor, mask: Tensor) -> Tensor:
        return torch.cat([self.one(b[i : i + 1], mask[i : i + 1]) for i in range(len(b))])

    def one(self, b: Tensor, mask: Tensor) -> Tensor:
        """One sample: b (1, C, h, w), mask (1, 1, 4h, 4w)."""
        channels, h, w = b.shape[1], b.shape[2] // 2, b.shape[3] // 2
        values = F.unfold(b, 4, stride=2, padding=1)[0].T.reshape(h * w, channels, 4, 4)
        small = b[:, :, ::2, ::2]
        keys = F.unfold(small, 3, padding=1)[0].T
        keys = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-4)
        holes = F.unfold(mask[:, :, ::8, ::8], 3, padding=1)[0]
        valid = (holes == 0).all(dim=0).to(b.dtype).view(1, h * w, 1, 1)
        scores = F.conv2d(small, keys.view(h * w, channels, 3, 3), padding=1)
        # Background and foreground positions row by row, then column by column, then as they were.
        scores = F.conv2d(scores.view(1, 1, h * w, h * w), self.fuse_weight, padding=1)
        scores = scores.view(h, w, h, w).permute(1, 0, 3, 2).reshape(1, 1, h * w, h * w)
        scores = F.conv2d(scores, self.fuse_weight, padding=1)
        scores = scores.view(w, h, w, h).permute(1, 0, 3, 2).reshape(1, h * w, h, w)
        weights = torch.softmax(10 * scores * valid, dim=1) * valid
        return F.conv_transpose2d(weights, values, stride=2, padding=1) / 4


class Coarse(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv1 = Gated(5, c // 2, 5)
        self.down_block1 = Down(c // 2, c, c)
        self.down_block2 = Down(c, 2 * c, 2 * c)
        for i, dilation in enumerate((1, 2, 4, 8, 16, 1, 1)):
            self.add_module(f"conv_bn{i + 1}", Gated(2 * c, 2 * c, dilation=dilation))
        self.up_block1 = Up(2 * c, c, c)
        self.up_block2 = Up(c, c // 2, c // 4)
        self.conv_to_rgb = Rgb(c // 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Fine(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv_conv1 = Gated(3, c // 2, 5)
        self.conv_down_block1 = Down(c // 2, c // 2, c)
        self.conv_down_block2 = Down(c, c, 2 * c)
        for i in range(5):
            self.add_module(f"conv_conv_bn{i + 1}", Gated(2 * c, 2 * c, dilation=2**i))
        self.ca_conv1 = Gated(3, c // 2, 5)
        self.ca_down_block1 = Down(c // 2, c // 2, c)
        self.ca_down_block2 = Down(c, 2 * c, 2 * c)
        self.ca_conv_bn1 = Gated(2 * c, 2 * c, relu=True)
        self.contextual_attention = Attention()
        self.ca_conv_bn4 = Gated(2 * c, 2 * c)
        self.ca_conv_bn5 = Gated(2 * c, 2 * c)
        self.conv_bn6 = Gated(4 * c, 2 * c)
        self.conv_bn7 = Gated(2 * c, 2 * c)
        self.up_block1 = Up(2 * c, c, c)
        self.up_block2 = Up(c, c // 2, c // 4)
        self.conv_to_rgb = Rgb(c // 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.conv_down_block2(self.conv_down_block1(self.conv_conv1(x)))
        for i in range(5):
            y = self.get_submodule(f"conv_conv_bn{i + 1}")(y)
        z = self.ca_conv_bn1(self.ca_down_block2(self.ca_down_block1(self.ca_conv1(x))))
        z = self.ca_conv_bn5(self.ca_conv_bn4(self.contextual_attention(z, mask)))
        h = self.conv_bn7(self.conv_bn6(torch.cat([y, z], dim=1)))
        return self.conv_to_rgb(self.up_block2(self.up_block1(h)))


class PlainDeepFill(nn.Module):
    """(B, 5, H, W) = [masked image, ones, mask] to the coarse and the refined image, (B, 3, H, W) in [-1, 1] each."""

    def __init__(self, cnum: int = CNUM):
        super().__init__()
        self.stage1 = Coarse(cnum)
        self.stage2 = Fine(cnum)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = x[:, 4:].detach()
        coarse = self.stage1(x)
        return coarse, self.stage2(coarse * mask + x[:, :3] * (1 - mask), mask)
