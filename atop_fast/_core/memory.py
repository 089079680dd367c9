"""Recovery from out-of-memory errors: smaller chunks, and a warning."""

from __future__ import annotations

import warnings

import torch

# Messages of allocators that raise a plain RuntimeError.
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def halve_chunk(function: str, unit: str, size: int, error: Exception, least: int = 1) -> int:
    """Half of the chunk size `size`, as a multiple of `least`, with a warning, if `error` is an out-of-memory error.

    Any other error is raised again, as is an out-of-memory error at size `least`.
    """
    if size <= least or not _is_out_of_memory(error):
        raise error
    smaller = max(least, size // 2 // least * least)
    text = f"{function}: not enough memory for {size} {unit} at a time; going on with {smaller}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return smaller


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
