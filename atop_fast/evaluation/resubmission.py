"""Resubmission: the share of images that survive if the attacker may submit an image several times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_choice, message
from .verdict import INTERVALS, bootstrap_intervals, wilson_interval


def survival(correct: Tensor) -> Tensor:
    """Unbiased estimate, for each image, of the probability that M fresh draws are all correct, for M = 1 .. K.

        C(c, M) / C(K, M) = prod_{i < M} (c - i) / (K - i),    with c correct draws among K

    This is the share of sets of M draws that are all correct (the U-statistic of Hoeffding, 1948). No unbiased estimate
    from fewer than M draws exists.

    Args:
        correct: bool (images, K): whether each draw is correct.

    Returns:
        float64 (images, K): column M - 1 belongs to M tries.
    """
    if correct.dtype != torch.bool or correct.dim() != 2 or not correct.numel():
        given = f"{correct.dtype} of shape {tuple(correct.shape)}"
        raise ValueError(message("survival", "correct", "bool of shape (images, K), not empty", given))
    draws = correct.shape[1]
    drawn = torch.arange(draws, device=correct.device, dtype=torch.float64)
    right = correct.sum(dim=1, keepdim=True).double()
    return ((right - drawn).clamp_min(0) / (draws - drawn)).cumprod(dim=1)


def resubmission_curve(correct: Tensor, interval: str = "wilson", seed: int = 0) -> list[dict[str, Any]]:
    """Accuracy against an attacker who submits every image M times and needs one success, for M = 1 .. K.

    Args:
        correct: bool (images, K): whether each draw of a verdict is correct.
        interval: "wilson" or "bootstrap", as for the mean of a Verdict: both are over the choice of images; Wilson's is
            conservative for values between 0 and 1. M = K always has Wilson's interval.
        seed: key of the bootstrap.

    Returns:
        For every M {"tries": M, "accuracy": float, "accuracy_ci": [low, high]}, JSON-ready. The first is the verdict's
        `mean` and the last its `worst`. Each is unbiased; all use the same draws.
    """
    check_choice("resubmission_curve", "interval", interval, INTERVALS)
    values = survival(correct)
    images, draws = values.shape
    means = values.mean(dim=0).tolist()
    intervals = [wilson_interval(min(1.0, mean), images) for mean in means]
    if interval == "bootstrap":
        # M = K is a yes/no value, like a verdict's `worst`.
        last = intervals[-1:] if draws > 1 else []
        intervals = [*bootstrap_intervals(values[:, : draws - len(last)], seed), *last]
    return [
        {"tries": tries, "accuracy": mean, "accuracy_ci": list(ci)}
        for tries, (mean, ci) in enumerate(zip(means, intervals, strict=True), start=1)
    ]
