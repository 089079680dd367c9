"""Purifiers, which restore corrupted images, and discriminators, which score restorations."""

from __future__ import annotations

from torch import nn

from .._core.checks import check_choice
from .deepfill import DeepFillV2
from .discriminator import SNPatchDiscriminator, discriminator_loss, generator_loss
from .layers import GatedConv
from .mae import MaskedAutoencoder
from .public import load_deepfill, load_sn_patch, save_public
from .unet import GatedUNet

# Users may register their own modules here, so that load_model and load_defense find them by name.
PURIFIERS: dict[str, type[nn.Module]] = {
    "deepfill_v2": DeepFillV2,
    "mae": MaskedAutoencoder,
    "unet": GatedUNet,
}
DISCRIMINATORS: dict[str, type[nn.Module]] = {"sn_patch": SNPatchDiscriminator}


def build_purifier(name: str, **options: object) -> nn.Module:
    """Build a purifier by name; options are those of its class.

    - "deepfill_v2": DeepFillV2, two stages of gated convolutions with attention, AToP's purifier for 256x256 pixels.
    - "mae": MaskedAutoencoder, a vision transformer on patches.
    - "unet": GatedUNet, gated convolutions at the resolution of the images.

    Defense and training also accept any other module from (B, C + 2, H, W) to images in [-1, 1].
    """
    module = PURIFIERS[check_choice("build_purifier", "name", name, list(PURIFIERS))](**options)
    # For save_defense.
    module.architecture = (name, options)
    return module


__all__ = [
    "DISCRIMINATORS",
    "PURIFIERS",
    "DeepFillV2",
    "GatedConv",
    "GatedUNet",
    "MaskedAutoencoder",
    "SNPatchDiscriminator",
    "build_purifier",
    "discriminator_loss",
    "generator_loss",
    "load_deepfill",
    "load_sn_patch",
    "save_public",
]
