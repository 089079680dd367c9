"""Logits of images under given draws of a model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..randomness import derive_seed
from .gradient import GradientEstimator
from .network import Model


def draw_logits(
    model: Model,
    images: Tensor,
    seed: int,
    sample_ids: Tensor,
    draws: range,
    max_batch: int = 1024,
    function: str = "draw_logits",
) -> Tensor:
    """Logits (B, draws, classes), float32 or float64, of images (B, C, H, W) under the given draws; no gradients.

    The draws of a Defense are keyed by (seed, sample id, draw). Those of another callable, and what the networks of a
    Defense draw, are repeated calls, for which the generators of torch, Python and numpy are seeded by (seed, first
    sample id, first draw) and afterwards restored. Errors name `function`.
    """
    estimator = GradientEstimator(model, eot_iter=len(draws), max_batch=max_batch, seed=seed)
    estimator.function = function
    if len(images):
        # Otherwise all parts of a set of images would have the same noise.
        estimator.calls_seed = derive_seed(seed, int(sample_ids[0]), draws.start)
    return estimator._logits(images, sample_ids, torch.full_like(sample_ids, draws.start))
