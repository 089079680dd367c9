"""Purifiers restore corrupted images; discriminators judge them."""

from __future__ import annotations

from torch import nn

from .._checks import check_choice
from .discriminator import SNPatchDiscriminator, discriminator_loss, generator_loss
from .layers import GatedConv
from .unet import GatedUNet

PURIFIERS: dict[str, type[nn.Module]] = {"unet": GatedUNet}
DISCRIMINATORS: dict[str, type[nn.Module]] = {"sn_patch": SNPatchDiscriminator}


def build_purifier(name: str, **options: object) -> nn.Module:
    """A purifier by name: "unet" (GatedUNet). Any module from (B, C + 2, H, W) to images in [-1, 1] serves as well."""
    return PURIFIERS[check_choice("build_purifier", "name", name, list(PURIFIERS))](**options)


__all__ = [
    "DISCRIMINATORS",
    "PURIFIERS",
    "GatedConv",
    "GatedUNet",
    "SNPatchDiscriminator",
    "build_purifier",
    "discriminator_loss",
    "generator_loss",
]
