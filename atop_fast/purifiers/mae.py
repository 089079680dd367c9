"""A masked autoencoder: a vision transformer that restores masked and noisy images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_integer, message
from .._core.transformer import Block, check_size, init_linear, layer_norm, sine_cosine_positions
from .layers import run_section

# Width, depth and heads of the decoder: narrower and shallower than the encoder; "base" is the decoder of He et al.
DECODERS = {"tiny": (96, 4, 3), "small": (192, 4, 6), "base": (512, 8, 16)}


class MaskedAutoencoder(nn.Module):
    """Purifier of transformer blocks on patches: a deep encoder, and a small decoder from tokens to pixels.

        output = 1.02 tanh(u),  u the patches that the decoder's last layer predicts

    The network follows the masked autoencoder of He et al. (CVPR 2022), which Wu et al. (DMAE, ICLR 2023) also train to
    denoise, with two changes. First, the encoder sees all patches: a fully masked patch is replaced by a learned mask
    token, and a partly masked patch enters with its remaining pixels and its mask. Dropping masked patches, as He et
    al. do, requires the same number in every sample, which some transforms do not guarantee (RT3, RandomResizePad);
    padding the batch instead would make rounding depend on the other samples. Hiding patches by an attention mask costs
    as much as showing them, rules out the fastest attention kernels, and is undefined for an image without a visible
    patch. Here, the result of a sample depends on that sample alone. Second, there is no class token.

    The output range is slightly wider than [-1, 1] for the reason given in GatedUNet.

    Args:
        channels: channels C of the images.
        image_size: side of the square images in pixels.
        patch_size: side of the square patches; must divide `image_size`.
        size: encoder and decoder by name, as width x depth (heads): "tiny" 192 x 12 (3) and 96 x 4 (3), "small"
            384 x 12 (6) and 192 x 4 (6), "base" 768 x 12 (12) and 512 x 8 (16); with 4x4 patches of 3 channels, they
            have 5.8, 23 and 111 million parameters.
        checkpointing: save only the input of every block for the backward pass and recompute the block: less memory, a
            third more time, the same result.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """

    positions: Tensor
    decoder_positions: Tensor

    def __init__(
        self,
        channels: int = 3,
        image_size: int = 32,
        patch_size: int = 4,
        size: str = "tiny",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        width, depth, heads = check_size("MaskedAutoencoder", size)
        decoder_width, decoder_depth, decoder_heads = DECODERS[size]
        self.channels = check_integer("MaskedAutoencoder", "channels", channels, low=1)
        self.image_size = check_integer("MaskedAutoencoder", "image_size", image_size, low=1)
        self.patch_size = check_integer("MaskedAutoencoder", "patch_size", patch_size, low=1)
        if image_size % patch_size:
            expected = f"a divisor of image_size {image_size}"
            raise ValueError(message("MaskedAutoencoder", "patch_size", expected, patch_size))
        self.checkpointing = checkpointing
        side = image_size // patch_size
        self.patch_embed = nn.Conv2d(channels + 2, width, patch_size, stride=patch_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sine_cosine_positions(side, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = layer_norm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.register_buffer("decoder_positions", sine_cosine_positions(side, decoder_width), persistent=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_width, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = layer_norm(decoder_width)
        self.to_pixels = nn.Linear(decoder_width, channels * patch_size**2)
        init_linear(self)
        # Training starts from gray images instead of noise from random weights.
        nn.init.zeros_(self.to_pixels.weight)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """Restore images.

        Args:
            x: (B, channels + 2, image_size, image_size) = [masked image in [-1, 1], ones, mask (1 = masked)].

        Returns:
            Images (B, channels, image_size, image_size) in (-1.02, 1.02).

        Raises:
            ValueError: the shape is different.
        """
        if x.dim() != 4 or x.shape[1:] != (self.channels + 2, self.image_size, self.image_size):
            expected = f"of shape (B, {self.channels + 2}, {self.image_size}, {self.image_size})"
            raise ValueError(message("MaskedAutoencoder", "x", expected, tuple(x.shape)))
        visible = F.max_pool2d(1 - x[:, -1:], self.patch_size).flatten(1)[:, :, None] > 0
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.where(visible, tokens, self.mask_token.to(tokens.dtype)) + self.positions
        tokens = self.norm(self._run(self.blocks, tokens))
        tokens = self.decoder_embed(tokens) + self.decoder_positions
        tokens = self.decoder_norm(self._run(self.decoder_blocks, tokens))
        side = self.image_size // self.patch_size
        pixels = self.to_pixels(tokens).view(-1, side, side, self.channels, self.patch_size, self.patch_size)
        # pixel_shuffle would do, but under torch.compile its backward pass fails for one-channel images.
        image = pixels.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return 1.02 * torch.tanh(image)

    def _run(self, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        """Apply the blocks in sequence; with checkpointing, only their inputs are saved for the backward pass."""
        for block in blocks:
            tokens = run_section(block, tokens, self.checkpointing)
        return tokens
