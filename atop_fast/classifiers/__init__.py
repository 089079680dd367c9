"""Classifiers: modules from images (B, C, H, W) in [0, 1] to logits (B, classes), normalization inside."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from .._core.checks import check_choice
from ..attacks.folding import fold_batch_norm
from .cnn import SmallCNN
from .normalized import Normalized
from .resized import Resized
from .resnet import ImageResNet, ResNet
from .resnet9 import ResNet9
from .vit import VisionTransformer
from .wide_resnet import WideResNet

CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "small_resnet": functools.partial(ResNet, width=24, blocks=(1, 1, 1), stride=2),
    "resnet9": ResNet9,
    "resnet18": ResNet,
    "resnet34": functools.partial(ResNet, blocks=(3, 4, 6, 3)),
    "resnet18_256": ImageResNet,
    "resnet34_256": functools.partial(ImageResNet, blocks=(3, 4, 6, 3)),
    "wrn_28_10": WideResNet,
    "wrn_34_10": functools.partial(WideResNet, depth=34),
    "wrn_70_16": functools.partial(WideResNet, depth=70, widen=16),
    "vit_tiny": VisionTransformer,
}


def build_classifier(name: str, **options: object) -> nn.Module:
    """Build a classifier by name; options are those of its class.

    | name | class | million parameters |
    | --- | --- | --- |
    | small_cnn | SmallCNN | 0.024 |
    | small_resnet | ResNet(width=24, blocks=(1, 1, 1), stride=2) | 0.17 |
    | resnet9 | ResNet9, for 32x32 pixels: 90 % of CIFAR-10 within an hour or two of a CPU | 1.6 |
    | resnet18, resnet34 | ResNet, for 32x32 pixels | 11, 21 |
    | resnet18_256, resnet34_256 | ImageResNet, for 256x256 pixels, as in AToP's ablations | 11, 21 |
    | wrn_28_10, wrn_34_10, wrn_70_16 | WideResNet of that depth and widening | 36, 46, 267 |
    | vit_tiny | VisionTransformer, for 224x224 pixels; patch_size=4, image_size=32 suit CIFAR-10 | 5.5 |
    """
    module = CLASSIFIERS[check_choice("build_classifier", "name", name, list(CLASSIFIERS))](**options)
    # For save_defense.
    module.architecture = (name, options)
    return module


__all__ = [
    "CLASSIFIERS",
    "ImageResNet",
    "Normalized",
    "ResNet",
    "ResNet9",
    "Resized",
    "SmallCNN",
    "VisionTransformer",
    "WideResNet",
    "build_classifier",
    "fold_batch_norm",
]
