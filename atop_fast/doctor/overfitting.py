"""Checks of a trained model on its own training images: the generalization gap, and membership inference.

Membership by loss is the attack of Yeom et al., Privacy risk in machine learning: analyzing the connection to
overfitting, CSF 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._probe import WARN, Finding, Probe

# Gap of accuracy and AUC above which a check warns, unless noise explains them.
GAP, AUC = 0.1, 0.6


def generalization_gap(probe: Probe) -> Finding:
    """Accuracy on training images is not far above that on held-out ones, without an attack and under PGD."""
    assert probe.training is not None
    curves = {
        "clean": (probe.training.clean, probe.clean),
        "attacked": (probe.training.attacked(probe.eps), probe.attacked(probe.eps)),
    }
    numbers, texts, large = {}, [], False
    for name, (train, held_out) in curves.items():
        gap, errors = float(train.mean() - held_out.mean()), difference_errors(train, held_out)
        numbers[name] = {
            "training": float(train.mean()),
            "held_out": float(held_out.mean()),
            "gap": gap,
            "standard_errors": errors,
        }
        large |= gap > GAP and errors > WARN
        prefix = "Accuracy" if name == "clean" else "under PGD"
        texts.append(
            f"{prefix} is {float(train.mean()):.2f} on training and {float(held_out.mean()):.2f} on other images"
        )
    text = ", ".join(texts)
    if large:
        advice = "the model is overfitted; train shorter, with averaged weights, augmentation or more images"
        return Finding("generalization_gap", "warn", f"{text}: {advice}.", numbers)
    return Finding("generalization_gap", "pass", f"{text}.", numbers)


def membership(probe: Probe) -> Finding:
    """The losses of training images do not tell them from others: AUC of the attack by a threshold on the loss."""
    assert probe.training is not None
    inside, outside = losses(probe.training), losses(probe)
    auc = auc_below(inside, outside)
    m, n = len(inside), len(outside)
    # The standard error of the Mann-Whitney statistic if both have the same distribution.
    errors = (auc - 0.5) / math.sqrt((m + n + 1) / (12 * m * n))
    numbers = {"auc": auc, "standard_errors": errors, "loss_training": float(inside.mean()),
               "loss_held_out": float(outside.mean())}  # fmt: skip
    text = f"The loss is lower on a training image than on another in {auc:.0%} of the pairs"
    if auc > AUC and errors > WARN:
        return Finding("membership", "warn", f"{text}: it reveals which images are training images.", numbers)
    return Finding("membership", "pass", f"{text}: it hardly reveals which images are training images.", numbers)


# In the order of execution; they need training images.
CHECKS: dict[str, Callable[[Probe], Finding]] = {f.__name__: f for f in (generalization_gap, membership)}


def losses(probe: Probe) -> Tensor:
    """The cross-entropy of each image, mean over fresh draws, float64 (B,)."""
    with torch.no_grad():
        drawn = [
            F.cross_entropy(probe.logits(probe.x, draw, "membership").double(), probe.y, reduction="none")
            for draw in range(probe.draws)
        ]
    return torch.stack(drawn).mean(dim=0)


def auc_below(a: Tensor, b: Tensor) -> float:
    """The share of pairs in which the value of `a` (m,) is below that of `b` (n,); equal ones count half."""
    return float(((a[:, None] < b).double() + 0.5 * (a[:, None] == b).double()).mean())


def difference_errors(a: Tensor, b: Tensor) -> float:
    """The difference of two means of shares, a (m,) and b (n,) of different images, in standard errors.

    With one more success and failure in each (Agresti and Caffo, American Statistician, 2000), so that shares of 0 and
    1 have a variance, too.
    """
    shares = [(float(v.double().sum()) + 1, len(v) + 2) for v in (a, b)]
    means = [total / count for total, count in shares]
    variance = sum(p * (1 - p) / count for p, (_, count) in zip(means, shares, strict=True))
    return (means[0] - means[1]) / math.sqrt(variance)
