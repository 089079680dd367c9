"""Where work waits for a GPU: what no CUDA graph can hold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
# What torch says of an operation that waits, in its debug mode for them.
_SAYING = "called a synchronizing CUDA operation"


def watched(work: Callable[[], T]) -> tuple[T, str | None]:
    """The result of work on a GPU, and the first place where the work waited for it, or None if it never did.

    A recording that meets such a place fails, and leaves torch's random generators and memory on the GPU in the state
    of a recording: it must be known before.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if _SAYING not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result, first_wait(caught)


def first_wait(caught: Sequence[warnings.WarningMessage]) -> str | None:
    """The place that the first of these warnings that tells of a wait names; None if none does."""
    places = (f"{Path(w.filename).name}:{w.lineno}" for w in caught if _SAYING in str(w.message))
    return next((f"{place} waits for the GPU" for place in places), None)
