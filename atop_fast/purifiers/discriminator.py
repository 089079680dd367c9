"""SN-PatchGAN discriminator (Yu et al., ICCV 2019) and the hinge losses of the adversarial game."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .._checks import check_integer


class SNPatchDiscriminator(nn.Module):
    """Spectrally normalised 5x5 convolutions of stride 2, each followed by LeakyReLU(0.2).

    Args:
        channels: channels C of the images.
        width: channels w of the first layer; the following have 2w, 4w, 4w, ...
        depth: number of layers; each halves height and width.
    """

    def __init__(self, channels: int = 3, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        check_integer("SNPatchDiscriminator", "channels", channels, low=1)
        check_integer("SNPatchDiscriminator", "width", width, low=1)
        check_integer("SNPatchDiscriminator", "depth", depth, low=1)
        sizes = [channels + 1, *(width * min(2**i, 4) for i in range(depth))]
        convolutions = (nn.Conv2d(a, b, 5, stride=2, padding=2) for a, b in pairwise(sizes))
        self.layers = nn.ModuleList(spectral_norm(c) for c in convolutions)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Scores (B, n) of local patches: images (B, C, H, W) in [-1, 1] with their masks (B, 1, H, W)."""
        h = torch.cat((images, mask), dim=1)
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
        return h.flatten(1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator: 0.5 mean(relu(1 - real)) + 0.5 mean(relu(1 + fake))."""
    return 0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Hinge loss of the generator: -mean(fake)."""
    return -fake.mean()
