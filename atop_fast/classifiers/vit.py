"""The vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._core.checks import check_integer, message
from .._core.transformer import Block, check_size, init_linear, layer_norm


class VisionTransformer(nn.Module):
    """Vision transformer with a class token and learned positions (Dosovitskiy et al., ICLR 2021).

    Parameter names and results equal those of timm's vit_tiny_patch16_224 and similar models; images x are mapped to
    2x - 1.

    Args:
        channels: channels C of the images.
        classes: number of logits.
        image_size: side of the square images in pixels.
        patch_size: side of the square patches; must divide `image_size`.
        size: "tiny", "small" or "base": 192, 384 or 768 channels and 3, 6 or 12 heads in 12 blocks; at the default
            sizes 5.5, 22 and 86 million parameters.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 10,
        image_size: int = 224,
        patch_size: int = 16,
        size: str = "tiny",
    ) -> None:
        super().__init__()
        self.channels = check_integer("VisionTransformer", "channels", channels, low=1)
        check_integer("VisionTransformer", "classes", classes, low=1)
        self.image_size = check_integer("VisionTransformer", "image_size", image_size, low=1)
        check_integer("VisionTransformer", "patch_size", patch_size, low=1)
        if image_size % patch_size:
            expected = f"a divisor of image_size {image_size}"
            raise ValueError(message("VisionTransformer", "patch_size", expected, patch_size))
        width, depth, heads = check_size("VisionTransformer", size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, width))
        # The names in checkpoints have this additional level.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch_size, stride=patch_size)})
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = layer_norm(width)
        self.head = nn.Linear(width, classes)
        init_linear(self)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, image_size, image_size) in [0, 1] -> logits (B, classes).

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 4 or x.shape[1:] != (self.channels, self.image_size, self.image_size):
            expected = f"of shape (B, {self.channels}, {self.image_size}, {self.image_size})"
            raise ValueError(message("VisionTransformer", "x", expected, tuple(x.shape)))
        patches = self.patch_embed["proj"](2 * x - 1).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.cls_token.to(patches.dtype).expand(len(x), -1, -1), patches), dim=1)
        tokens = self.blocks(tokens + self.pos_embed)
        return self.head(self.norm(tokens)[:, 0])
