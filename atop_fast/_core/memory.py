"""Where memory is short, work goes on in smaller pieces, and says so."""

from __future__ import annotations

import warnings

import torch

# What those say that have no exception of their own for it.
_SAYINGS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def halved(function: str, what: str, size: int, error: Exception, least: int = 1) -> int:
    """Half of `size`, a multiple of `least`, with a warning, if `error` says that memory was short.

    Any other error is raised again, and so is one where no more than `least` was asked for.
    """
    if size <= least or not _is_shortage(error):
        raise error
    smaller = max(least, size // 2 // least * least)
    text = f"{function}: not enough memory for {size} {what} at a time; going on with {smaller}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return smaller


def _is_shortage(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)
