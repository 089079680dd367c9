"""The network under attack: frozen, batch norm folded into convolutions, in the layout that runs fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .._flags import holding
from ..defense import Defense
from ..folding import fold_batch_norm

Model = Callable[..., Tensor]
# Folding a network takes as long as some of its passes. How many images there are must not matter: rounding would
# depend on it.
WORTHWHILE = 8


@contextlib.contextmanager
def prepared(model: Model, dtype: torch.dtype | None = None, passes: int = WORTHWHILE) -> Iterator[Model]:
    """The model as attacks call it: frozen inside the block, and folded where that is exact and worth its time.

    Args:
        model: a Defense, or any callable from images to logits.
        dtype: the type in which an autocast will run it: weights are cast here once instead of in every pass.
        passes: how often each image will go through it, about.

    Yields:
        A module or callable that returns what `model` returns in evaluation mode, up to rounding. Parameters get no
        gradients. Mode, buffers and requires_grad flags of `model` are restored afterwards, also after an error.
    """
    with frozen(model):
        if passes < WORTHWHILE:
            network = model
        elif type(model) is Defense:
            purifier = None if model.purifier is None else fold_batch_norm(model.purifier, dtype)
            network = Defense(model.transform, purifier, fold_batch_norm(model.classifier, dtype)).eval()
        else:
            network = fold_batch_norm(model, dtype) if isinstance(model, nn.Module) else model
        yield network


@contextlib.contextmanager
def frozen(*models: object) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside the block; both restored afterwards, also after an error.

    Where several blocks share a network, nested or in threads, the last one restores it.
    """
    found = [model for model in models if isinstance(model, nn.Module)]
    modules = ((m, "training", False) for model in found for m in model.modules())
    parameters = ((p, "requires_grad", False) for model in found for p in model.parameters())
    with holding((*modules, *parameters)):
        yield
