"""Tensor ops, each with one specification and several implementations; `_registry` describes how they are chosen."""

from . import _registry, random_bits, square  # noqa: F401  ops without functions here: they must be defined before load
from .apgd_step_l2 import apgd_step_l2
from .apgd_step_linf import apgd_step_linf
from .assemble import assemble
from .attack_loss import AttackLoss, attack_loss
from .contextual_attention import contextual_attention
from .conv3x3 import FrozenConv3x3, conv3x3
from .convolve import convolve
from .corrupt import corrupt
from .frozen_conv import FrozenConv
from .gated import gated_elu, gated_relu
from .hyperplane_step import hyperplane_step
from .mask_blocks import mask_blocks
from .pgd_step_l1 import pgd_step_l1
from .pgd_step_l2 import pgd_step_l2, pgd_step_l2_
from .pgd_step_linf import pgd_step_linf, pgd_step_linf_
from .project_l1 import project_l1
from .random_normal import random_normal
from .random_resize_pad import random_resize_pad
from .resize import resize
from .upsample_conv3x3 import upsample_conv3x3

_registry.load()

__all__ = [
    "AttackLoss",
    "FrozenConv",
    "FrozenConv3x3",
    "apgd_step_l2",
    "apgd_step_linf",
    "assemble",
    "attack_loss",
    "contextual_attention",
    "conv3x3",
    "convolve",
    "corrupt",
    "gated_elu",
    "gated_relu",
    "hyperplane_step",
    "mask_blocks",
    "pgd_step_l1",
    "pgd_step_l2",
    "pgd_step_l2_",
    "pgd_step_linf",
    "pgd_step_linf_",
    "project_l1",
    "random_normal",
    "random_resize_pad",
    "resize",
    "upsample_conv3x3",
]
