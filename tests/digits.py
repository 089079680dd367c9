"""A small classifier of real digits for tests of attacks, trained once in a process."""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from atop_fast import build_classifier, mnist5k, train_classifier
from atop_fast.randomness import seeded


@functools.cache
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """The classifier, and 400 images (400, 1, 16, 16) with their labels that it was not trained on."""
    train, test = mnist5k().split(1000, 0)
    with seeded(0):
        model = build_classifier("small_cnn", channels=1)
    train_classifier(model, F.avg_pool2d(train.images, 2), train.labels, epochs=3, lr=1e-2, progress=False)
    return model, F.avg_pool2d(test.images[:400], 2), test.labels[:400]
