"""Logits of a Defense by its parts, for gradients that are not those of the whole: recomputed, and BPDA's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..defense import Defense
from ..ops import resize

Key = tuple[int | Tensor, Tensor, Tensor]


def checkpointed(defense: Defense, x: Tensor, key: Key, keeps_generators: bool) -> Tensor:
    """Logits whose backward pass computes the purifier and the classifier again, instead of keeping both graphs.

    `keeps_generators`: the recomputation draws from the global generators what the first pass drew.
    """
    # The recomputation must find its inputs unchanged.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": keeps_generators}
    purified = checkpoint(lambda t: defense.purify(t.clone(), *key), x, **options)
    logits: Tensor = checkpoint(lambda t: defense.classify(t.clone(), *key), purified, **options)
    return logits


def straight_through(
    defense: Defense, x: Tensor, given: Tensor, key: Key, substitute: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Logits whose gradient with respect to x goes through `substitute` instead of transform and purifier.

    `given` are the values of x, into which a network may write.
    """
    purified = defense.purify(given, *key).detach()
    stand_in = x if substitute is None else substitute(x)
    # A transform may have resized the images; then the "identity" is the resize alone.
    if stand_in.shape != purified.shape:
        stand_in = resize(stand_in, (purified.shape[2], purified.shape[3]))
    return defense.classify(purified + (stand_in - stand_in.detach()), *key)
