"""Whether a classifier and the labels number the same classes differently."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import chance_level
from ._probe import FAIL, excess

# Smallest gain of accuracy that counts.
GAIN = 0.1


def find_order(predicted: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, float] | None:
    """The labels that a classifier's outputs stand for, if reading them so is significantly more accurate.

    Each half of the images is judged by the order that the other half suggests, because an order that was chosen on the
    same images would always look better.

    Args:
        predicted, labels: int64 (B,), indices of classes.
        classes: number of the classifier's outputs.

    Returns:
        The label of each output, int64 (classes,), and the accuracy under the orders of the halves; None if the
        numbering of the classes agrees, or the images do not decide it.
    """
    given = (predicted == labels).float()
    renamed = torch.zeros_like(given)
    # Every second image of each class.
    second = F.one_hot(labels, classes).cumsum(dim=0).gather(1, labels[:, None])[:, 0] % 2 == 0
    for half in (second, ~second):
        order = _order(predicted[~half], labels[~half], classes)
        renamed[half] = (order[predicted[half]] == labels[half]).float()
    accuracy, frequent = float(renamed.mean()), chance_level(labels)
    noise = (frequent * (1 - frequent) / len(labels)) ** 0.5
    gain = accuracy - float(given.mean())
    if gain < GAIN or excess(renamed, given) <= FAIL or accuracy <= frequent + FAIL * noise:
        return None
    return _order(predicted, labels, classes), accuracy


def _order(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The label of each output: the most frequent pairs first; the other outputs keep their own label if it is free."""
    # Without a table of all pairs: 21,841 classes would make one of 4 GB.
    pairs, counts = torch.unique(predicted * classes + labels, return_counts=True)
    order, taken = [-1] * classes, set()
    for pair in pairs[counts.argsort(descending=True, stable=True)].tolist():
        output, label = divmod(pair, classes)
        if order[output] < 0 and label not in taken:
            order[output] = label
            taken.add(label)
    free = dict.fromkeys(label for label in range(classes) if label not in taken)
    for output in [i for i, label in enumerate(order) if label < 0]:
        order[output] = output if output in free else next(iter(free))
        del free[order[output]]
    return torch.tensor(order, device=labels.device)
