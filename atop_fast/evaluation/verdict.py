"""Verdicts: how often a random defense is right, from fresh draws that no attack has seen, with intervals."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_choice, check_integer, check_number, message
from ..randomness import Tag, derive_seed, random_uniform

Interval = tuple[float, float]
INTERVALS = ("wilson", "bootstrap")
UNSOUND = (
    "Not verdicts: both rules pick the draws that went against the defense, so that for a random defense they fall "
    "with every further attack, regardless of the attacks. They are here for comparison with published numbers."
)


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
    def from_predictions(cls, predictions: Tensor, labels: Tensor, interval: str = "wilson", seed: int = 0) -> Verdict:
        """The verdict on predicted classes (images, draws) against the true classes (images,), integers.

        interval="bootstrap" takes the interval of the mean from bootstrap_interval, keyed by `seed`; the yes/no values
        have Wilson's in either case.
        """
        check_choice("Verdict", "interval", interval, INTERVALS)
        if predictions.dim() != 2 or predictions.shape[0] != labels.shape[0] or not predictions.numel():
            expected = f"of shape ({labels.shape[0]}, draws), not empty"
            raise ValueError(message("Verdict", "predictions", expected, tuple(predictions.shape)))
        predictions, labels = predictions.long(), labels.long()
        images, draws = predictions.shape
        correct = predictions == labels[:, None]
        classes = int(torch.maximum(predictions.max(), labels.max())) + 1
        votes = torch.zeros(images, classes, dtype=torch.int32, device=labels.device)
        votes.scatter_add_(1, predictions, torch.ones_like(predictions, dtype=torch.int32))
        own = votes.gather(1, labels[:, None])[:, 0]
        others = votes.scatter(1, labels[:, None], -1).amax(dim=1)
        accuracy = correct.double().mean(dim=1)
        measures = (accuracy, own > others, correct.all(dim=1))
        mean, majority, worst = (float(right.double().mean()) for right in measures)
        mean_ci, majority_ci, worst_ci = (wilson_interval(p, images) for p in (mean, majority, worst))
        if interval == "bootstrap":
            mean_ci = bootstrap_interval(accuracy, seed)
        return cls(mean, majority, worst, mean_ci, majority_ci, worst_ci, draws, images)

    def to_dict(self) -> dict[str, float | int | list[float]]:
        """JSON-ready: numbers, and intervals as [low, high]."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def wilson_interval(p: float, n: int, z: float = 1.959963984540054) -> Interval:
    """Wilson's score interval (1927) for a mean `p` of `n` independent values in [0, 1]; 95 % by default.

    Its assumptions hold exactly for yes/no values. For values between 0 and 1, such as an image's accuracy over draws,
    the variance is at most p (1 - p), so the interval is conservative; it never collapses at 0 or 1.
    """
    check_number("wilson_interval", "p", p, low=0, high=1)
    check_integer("wilson_interval", "n", n, low=1)
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if p == 0 else max(0.0, center - half), 1.0 if p == 1 else min(1.0, center + half))


def bootstrap_interval(values: Tensor, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> Interval:
    """Percentile bootstrap (Efron, 1979) of the mean of `values` (n,): quantiles of the means of resampled images.

    Narrower than Wilson's interval if accuracies over draws lie between 0 and 1. It collapses to a point if all values
    are equal, and has less than nominal coverage for few images (n below about 50, near 0 or 1 below about 200).

    Args:
        values: float (n,), such as each image's accuracy over its draws.
        seed: key of the resampling; equal seeds give equal intervals.
        resamples: number of resampled means.
        level: nominal coverage.
    """
    check_integer("bootstrap_interval", "resamples", resamples, low=1)
    check_number("bootstrap_interval", "level", level, low=0, high=1)
    if values.dim() != 1 or not len(values):
        raise ValueError(message("bootstrap_interval", "values", "of shape (n,), not empty", tuple(values.shape)))
    return bootstrap_intervals(values[:, None], seed, resamples, level)[0]


def paired_interval(differences: Tensor, z: float = 1.959963984540054) -> Interval:
    """An interval of the mean of differences in [-1, 1] between two systems on the same images; 95 % by default.

    Agresti and Min's for matched pairs (Statistics in Medicine, 2005), for differences of shares, too: the normal
    interval after two more pairs, of which half a pair speaks for either system and one for neither. It never collapses
    to a point.

    Args:
        differences: float (n,), such as each image's accuracy under one system minus that under the other.
    """
    if differences.dim() != 1 or not len(differences) or not (differences.abs() <= 1).all():
        raise ValueError(message("paired_interval", "differences", "of shape (n,), not empty, in [-1, 1]", differences))
    values, count = differences.double(), len(differences) + 2
    mean = float(values.sum()) / count
    variance = (float(values.square().sum()) + 1) / count - mean**2
    half, found = z * math.sqrt(variance / count), float(values.mean())
    return max(-1.0, min(mean - half, found)), min(1.0, max(mean + half, found))


def bootstrap_intervals(values: Tensor, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> list[Interval]:
    """bootstrap_interval of each column of `values` (n, m), whose rows are resampled together."""
    values, key = values.double().cpu(), derive_seed(seed, "bootstrap")
    count, means = len(values), []
    # Chunks of resamples limit the memory to about 2**22 random numbers.
    for part in torch.arange(resamples).split(max(1, 2**22 // count)):
        index = (random_uniform((count,), key, part, 0, Tag.ORDER).double() * count).long()
        # The number of times that each resample contains each row.
        times = values.new_zeros(len(part), count)
        times.scatter_add_(1, index, torch.ones_like(times))
        means.append(times @ values / count)
    tail = (1 - level) / 2
    bounds = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return [(low, high) for low, high in bounds.T.tolist()]


def emulated_verdicts(correct: Tensor, draws: int = 20, deterministic: bool = False) -> dict[str, Any]:
    """The verdicts of the literature's rules on a random defense; unsound, for comparison only.

        single_draw    an image is robust iff ONE draw of it and ONE draw of every attack's candidate are right
                       (AutoAttack, Croce & Hein, ICML 2020)
        fixed_draws    every candidate has the share of right ones among the same `draws` draws, and an image the least
                       of its candidates' shares (AutoAttack as repaired by Lee & Kim, ICCV 2023)

    A classifier that is right in 90 % of its draws, whatever the image, gets 0.9 ** (1 + attacks) from the first.

    Args:
        correct: bool (candidates, images, K); the clean images are the first candidate.
        draws: draws of the second rule; at most K.
        deterministic: the draws are all alike, for which both rules are sound.
    """
    images, draws = correct.shape[1], min(draws, correct.shape[2])
    single = float(correct[:, :, 0].all(dim=0).double().mean())
    fixed = float(correct[:, :, :draws].double().mean(dim=2).amin(dim=0).mean())
    values = {"single_draw": (single, 1), "fixed_draws": (fixed, draws)}
    rules = {
        name: {
            "accuracy": p,
            "accuracy_ci": list(wilson_interval(p, images)),
            "draws": k,
            "sound": deterministic,
        }
        for name, (p, k) in values.items()
    }
    return {"warning": UNSOUND, **rules}
