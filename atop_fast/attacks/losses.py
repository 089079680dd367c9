"""Losses of attacks beyond attack_loss: one of several for each row, targets and their losses, sizes of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import AttackLoss, attack_loss


def chosen(z: Tensor, labels: Tensor, targets: Tensor | None, losses: Sequence[str], which: Tensor) -> AttackLoss:
    """The loss that `which` selects for each row."""
    results = [attack_loss(z, labels, loss, None if loss in ("ce", "pm-label") else targets) for loss in losses]
    values, gradient, correct = results[0]
    for index, other in enumerate(results[1:], 1):
        is_other = which == index
        values = torch.where(is_other, other.losses, values)
        gradient = torch.where(is_other[:, None], other.gradient, gradient)
    return AttackLoss(values, gradient, correct)


def targeted(result: AttackLoss) -> AttackLoss:
    """The losses of a targeted attack, whose labels are the targets."""
    return AttackLoss(-result.losses, -result.gradient, ~result.correct)


def likeliest_others(logits: Tensor, labels: Tensor) -> Tensor:
    """The classes besides the labels (B,), by falling logits (B, classes): (B, classes - 1)."""
    # The most likely class of a misclassified image is not its label, and is the best target.
    own_first = logits.scatter(1, labels[:, None], torch.inf)
    return own_first.argsort(dim=1, descending=True, stable=True)[:, 1:]


def row_sizes(gradient: Tensor) -> Tensor:
    """The largest magnitude of each row (B, classes), to the next power of two, by which scaling is exact; (B,)."""
    largest = gradient.abs().amax(dim=1).nan_to_num(1.0).clamp(2.0**-100, 2.0**100)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
