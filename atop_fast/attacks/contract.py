"""Checks of what an attack needs: gradients, and, if it takes a Defense apart, that the Defense is a chain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._core.plain import is_plain
from ..defense import Defense


def is_a_chain(defense: Any) -> bool:
    """Whether a call of the Defense is its purify and then its classifier."""
    return type(defense).forward is Defense.forward and is_plain(defense)


def accumulated(logits: Tensor, leaf: Tensor, upstream: Tensor, model: nn.Module) -> Tensor | None:
    """The gradient by a backward pass that accumulates; those of the parameters stay as they were."""
    before = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.grad = None
        torch.autograd.backward(logits, upstream)
    finally:
        for p, gradient in before:
            p.grad = gradient
    return leaf.grad
