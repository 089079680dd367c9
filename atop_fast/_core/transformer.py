"""The transformer block that the masked autoencoder and the vision transformer share, with timm's parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_choice

# Width, depth and heads: ViT-Ti and ViT-S (Touvron et al., ICML 2021), and ViT-B (Dosovitskiy et al., ICLR 2021).
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}


def check_size(function: str, size: str) -> tuple[int, int, int]:
    """Width, depth and heads of a named size; ValueError for an unknown name."""
    return SIZES[check_choice(function, "size", size, list(SIZES))]


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., NeurIPS 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, width) -> (B, N, width)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them; the hidden layer is four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, width) -> (B, N, width)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): the pre-norm block of ViT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, width) -> (B, N, width)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def layer_norm(width: int) -> nn.LayerNorm:
    """A layer norm with the eps of ViT."""
    return nn.LayerNorm(width, eps=1e-6)


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and no bias in every linear layer inside, as in ViT."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def sine_cosine_positions(side: int, width: int) -> Tensor:
    """Fixed position embeddings (1, side * side, width) of a square grid, row by row (He et al., CVPR 2022).

    Four quarters of the channels: sine and cosine of the column, then of the row, at wavelengths from 2 pi to nearly
    20,000 pi; `width` must be divisible by 4.
    """
    frequency = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat((angle.sin(), angle.cos()), dim=1)
    columns, rows = axis.expand(side, side, -1), axis[:, None].expand(side, side, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1)[None].float()
