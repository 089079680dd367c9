"""JPEG's quantization of colors and frequencies, with a surrogate for the gradient of its rounding."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.checks import check_integer, message
from ..randomness import Tag, random_bits
from .base import ImageTransform

# Quantization tables of ITU-T T.81, annex K, by rows: luma and chroma at quality 50.
_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMA = (17, 18, 24, 47, 18, 21, 26, 66, 24, 26, 56, 99, 47, 66, 99, 99)
# Rows: Y, Cb, Cr of red, green, blue (JFIF).
_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


class JPEG(ImageTransform):
    """The images after a round trip through JPEG's lossy steps, without chroma subsampling.

    Args:
        quality: 1 to 100, as in libjpeg; with two numbers (low, high), every sample and draw gets its own, uniformly
            distributed integer.

    Calls are documented in RandomTransform.forward. Images have one channel or three. The forward pass rounds
    coefficients like a codec; the backward pass uses 1 as the derivative of rounding (straight-through). With smooth
    rounding, small slopes would hide perturbations that cross a rounding step from an attack.

    Source: Guo et al., Countering adversarial images using input transformations, ICLR 2018; for the surrogate, Athalye
    et al., Obfuscated gradients give a false sense of security, ICML 2018. Codecs also round pixels to integers, and by
    default subsample chroma, neither of which is done here.
    """

    def __init__(self, quality: int | tuple[int, int] = 75) -> None:
        super().__init__()
        ends = quality if isinstance(quality, (tuple, list)) else (quality, quality)
        if len(ends) != 2:
            raise ValueError(message("JPEG", "quality", "a number or two, (low, high)", quality))
        low, high = ends
        check_integer("JPEG", "quality", low, low=1, high=100)
        check_integer("JPEG", "quality", high, low=low, high=100)
        self.quality: int | tuple[int, int] = low if low == high else (low, high)

    def images(self, x: Tensor, seed: Tensor, sample_ids: Tensor, draw: Tensor) -> Tensor:
        """See ImageTransform.images."""
        if x.shape[1] not in (1, 3):
            raise ValueError(message("JPEG", "x", "images of one channel or three", tuple(x.shape)))
        low, high = self.quality if isinstance(self.quality, tuple) else (self.quality, self.quality)
        words = random_bits(1, seed, sample_ids, draw, Tag.RATIO)[:, 0]
        return compress(x, low + (words * (high - low + 1) >> 32))


def compress(x: Tensor, quality: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] after JPEG with a quality for each image, int64 (B,)."""
    height, width = x.shape[2:]
    pixels = F.pad(255 * x, (0, -width % 8, 0, -height % 8), mode="replicate")
    pixels = _mixed(pixels, _YCC) if x.shape[1] == 3 else pixels
    level = pixels.new_tensor([128.0, 0.0, 0.0])[: x.shape[1], None, None]
    blocks = (pixels - level).unflatten(3, (-1, 8)).unflatten(2, (-1, 8))  # (B, C, H / 8, 8, W / 8, 8)
    cosine = _cosine(x)
    table = _tables(quality, x)
    coefficients = _along(_along(blocks, cosine, 3), cosine, 5) / table
    rounded = coefficients + (coefficients.round() - coefficients).detach()
    blocks = _along(_along(rounded * table, cosine.T, 3), cosine.T, 5)
    pixels = blocks.flatten(4, 5).flatten(2, 3)[:, :, :height, :width] + level
    pixels = _mixed(pixels, _RGB) if x.shape[1] == 3 else pixels
    return (pixels / 255).clamp(0, 1)


def _tables(quality: Tensor, like: Tensor) -> Tensor:
    """libjpeg's tables for each quality, (B, C, 1, 8, 1, 8)."""
    scale = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    chroma = torch.full((8, 8), 99)
    chroma[:4, :4] = torch.tensor(_CHROMA).view(4, 4)
    base = torch.stack((torch.tensor(_LUMA).view(8, 8), chroma, chroma)).to(like.device)[: like.shape[1]]
    table = ((base * scale[:, None, None, None] + 50) // 100).clamp(1, 255)
    return table.to(like.dtype)[:, :, None, :, None, :]


def _cosine(like: Tensor) -> Tensor:
    """The orthonormal DCT-II (8, 8): rows are frequencies."""
    rows = [[math.cos((2 * j + 1) * i * math.pi / 16) * (0.5 if i else 0.125**0.5) for j in range(8)] for i in range(8)]
    return torch.tensor(rows, dtype=like.dtype, device=like.device)


def _along(t: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """matrix @ t along an axis of 8, by sums whose rounding, unlike that of @, does not depend on the batch."""
    shape = [8 if axis == dim else 1 for axis in range(t.dim())]
    total = t.narrow(dim, 0, 1) * matrix[:, 0].view(shape)
    for j in range(1, 8):
        total = total + t.narrow(dim, j, 1) * matrix[:, j].view(shape)
    return total


def _mixed(x: Tensor, rows: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Linear combinations of three channels."""
    return torch.stack([x[:, 0] * r + x[:, 1] * g + x[:, 2] * b for r, g, b in rows], dim=1)
