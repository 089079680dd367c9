"""SN-PatchGAN discriminator (Yu et al., ICCV 2019) and the hinge losses of a GAN."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_integer

# Steps of power iteration in the constructor.
FIRST_STEPS = 15


class SpectralConv2d(nn.Conv2d):
    """A convolution with W / sigma(W), sigma the largest singular value of W as a matrix (outputs x everything else).

    Every call estimates sigma by one step of power iteration from the stored u, and in training mode stores the new u
    (Miyato et al., Spectral Normalization for GANs, ICLR 2018, algorithm 1). The iteration runs at least in float32,
    even under autocast, and u and v are constants for autograd, so that the gradient of sigma is u v'.

    Attributes:
        weight_u: u, the estimated left singular vector, (out_channels, 1).
    """

    weight_u: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        u = F.normalize(torch.randn(out_channels, 1), dim=0)
        for _ in range(FIRST_STEPS):
            u, _ = _power_step(self.weight.detach().flatten(1), u)
        self.register_buffer("weight_u", u)

    def normalized_weight(self) -> Tensor:
        """The weights divided by their estimated spectral norm; in training mode, updates the estimate."""
        with torch.autocast(self.weight.device.type, enabled=False):
            weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
            matrix = weight.flatten(1)
            with torch.no_grad():
                u, v = _power_step(matrix, self.weight_u.to(matrix.dtype))
                if self.training:
                    self.weight_u.copy_(u)
            sigma = (u * (matrix @ v)).sum()
            return (weight / sigma).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images."""
        return self._conv_forward(x, self.normalized_weight(), self.bias)


def _power_step(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One step of power iteration: the next estimates of the left and right singular vectors, as columns."""
    v = F.normalize(matrix.mT @ u, dim=0)
    return F.normalize(matrix @ v, dim=0), v


class SNPatchDiscriminator(nn.Module):
    """Spectrally normalized 5x5 convolutions with stride 2, each followed by LeakyReLU(0.2).

    Source: Yu et al., Free-Form Image Inpainting with Gated Convolution, ICCV 2019. With the default arguments, it has
    the parameter names and shapes of the public checkpoints (load_sn_patch).

    Args:
        channels: channels C of the images.
        width: channels w of the first layer; the following layers have 2w, 4w, 4w, ...
        depth: number of layers; each halves height and width.
    """

    def __init__(self, channels: int = 3, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        check_integer("SNPatchDiscriminator", "channels", channels, low=1)
        check_integer("SNPatchDiscriminator", "width", width, low=1)
        check_integer("SNPatchDiscriminator", "depth", depth, low=1)
        sizes = [channels + 1, *(width * min(2**i, 4) for i in range(depth))]
        for i, (inputs, outputs) in enumerate(pairwise(sizes), 1):
            layers = {"conv_sn": SpectralConv2d(inputs, outputs, 5, 2, 2), "activation": nn.LeakyReLU(0.2)}
            self.add_module(f"conv{i}", nn.Sequential(OrderedDict(layers)))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Scores (B, n) of local patches: images (B, C, H, W) in [-1, 1] with their masks (B, 1, H, W)."""
        h = torch.cat((images, mask), dim=1)
        for layer in self.children():
            h = layer(h)
        return h.flatten(1)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator: 0.5 mean(relu(1 - real)) + 0.5 mean(relu(1 + fake))."""
    return 0.5 * F.relu(1 - real).mean() + 0.5 * F.relu(1 + fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Hinge loss of the generator: -mean(fake)."""
    return -fake.mean()
