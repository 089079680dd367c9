"""Detects synchronization with a GPU, which a CUDA graph cannot capture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
# Part of the warning that torch's synchronization debug mode gives.
_SYNC_WARNING = "called a synchronizing CUDA operation"
# torch says this the first time that the mode is set, which is no news for a caller who did not set it.
_NOTICE = "Synchronization debug mode is a prototype feature"


def watched(work: Callable[[], T]) -> tuple[T, str | None]:
    """The result of work on a GPU, and the first line that synchronizes with it, or None.

    Such lines must be known before a capture: a capture fails there, and leaves torch's random generators and GPU
    memory in the capturing state.
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
        if not any(text in str(warning.message) for text in (_SYNC_WARNING, _NOTICE)):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return result, first_wait(caught)


def first_wait(caught: Sequence[warnings.WarningMessage]) -> str | None:
    """The line named by the first synchronization warning among these; None if there is none."""
    lines = (f"{Path(w.filename).name}:{w.lineno}" for w in caught if _SYNC_WARNING in str(w.message))
    return next((f"{line} waits for the GPU" for line in lines), None)
