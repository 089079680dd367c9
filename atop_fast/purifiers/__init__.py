"""Purifiers restore corrupted images; discriminators judge them."""

from __future__ import annotations

from torch import nn

from .._checks import check_choice
from .deepfill import DeepFillV2
from .discriminator import SNPatchDiscriminator, discriminator_loss, generator_loss
from .layers import GatedConv
from .public import load_deepfill, load_sn_patch, save_public
from .unet import GatedUNet

PURIFIERS: dict[str, type[nn.Module]] = {"unet": GatedUNet, "deepfill_v2": DeepFillV2}
DISCRIMINATORS: dict[str, type[nn.Module]] = {"sn_patch": SNPatchDiscriminator}


def build_purifier(name: str, **options: object) -> nn.Module:
    """A purifier by name: "unet" (GatedUNet) or "deepfill_v2" (DeepFillV2); options are those of the class.

    Any module from (B, C + 2, H, W) to images in [-1, 1] serves as well.
    """
    return PURIFIERS[check_choice("build_purifier", "name", name, list(PURIFIERS))](**options)


__all__ = [
    "DISCRIMINATORS",
    "PURIFIERS",
    "DeepFillV2",
    "GatedConv",
    "GatedUNet",
    "SNPatchDiscriminator",
    "build_purifier",
    "discriminator_loss",
    "generator_loss",
    "load_deepfill",
    "load_sn_patch",
    "save_public",
]
