"""The verdict: how often a random defence is right, from fresh draws that no attack has seen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_integer, check_number, message

Interval = tuple[float, float]


@dataclass(frozen=True)
class Verdict:
    """Accuracy of a random classifier over `images` images and `draws` fresh draws of each.

    Attributes:
        mean: expected accuracy of one draw, averaged over images and draws.
        majority: share of images whose true class gets strictly more votes than any other class.
        worst: share of images classified correctly in every draw (worst of K).
        mean_ci, majority_ci, worst_ci: 95 % intervals over the choice of images (see wilson_interval).

    For a deterministic model the three coincide.
    """

    mean: float
    majority: float
    worst: float
    mean_ci: Interval
    majority_ci: Interval
    worst_ci: Interval
    draws: int
    images: int

    @classmethod
    def from_predictions(cls, predictions: Tensor, labels: Tensor) -> Verdict:
        """The verdict on predicted classes (images, draws) against the true classes (images,), both int64."""
        if predictions.dim() != 2 or predictions.shape[0] != labels.shape[0] or not predictions.numel():
            expected = f"of shape ({labels.shape[0]}, draws), not empty"
            raise ValueError(message("Verdict", "predictions", expected, tuple(predictions.shape)))
        images, draws = predictions.shape
        correct = predictions == labels[:, None]
        classes = int(torch.maximum(predictions.max(), labels.max())) + 1
        votes = F.one_hot(predictions, classes).sum(dim=1)
        own = votes.gather(1, labels[:, None])[:, 0]
        others = votes.scatter(1, labels[:, None], -1).amax(dim=1)
        measures = (correct, own > others, correct.all(dim=1))
        mean, majority, worst = (float(right.double().mean()) for right in measures)
        mean_ci, majority_ci, worst_ci = (wilson_interval(p, images) for p in (mean, majority, worst))
        return cls(mean, majority, worst, mean_ci, majority_ci, worst_ci, draws, images)

    def to_dict(self) -> dict[str, float | int | list[float]]:
        """JSON-ready: numbers, and intervals as [low, high]."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def wilson_interval(p: float, n: int, z: float = 1.959963984540054) -> Interval:
    """Wilson's score interval (1927) for a mean `p` of `n` independent values in [0, 1]; 95 % by default.

    Exact in its assumptions for yes/no values. For values between 0 and 1, such as an image's accuracy over draws, the
    variance is at most p (1 - p), so that the interval is conservative; it never collapses at 0 or 1.
    """
    check_number("wilson_interval", "p", p, low=0, high=1)
    check_integer("wilson_interval", "n", n, low=1)
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if p == 0 else max(0.0, center - half), 1.0 if p == 1 else min(1.0, center + half))
