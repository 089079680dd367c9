"""Memory: what a backward pass needs, and recovery from out-of-memory errors by smaller chunks, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

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


def bytes_saved(call: Callable[[], object], model: object) -> int:
    """Bytes of the tensors that autograd saves for the backward pass in a call, except parameters, each storage once.

    Raises:
        RuntimeError: the call uses torch.func, which does not support the hooks of saved tensors.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    shared = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        # Detached: a node that holds its own output keeps itself, and the whole graph, alive forever.
        t = t.detach()
        if (address := t.untyped_storage().data_ptr()) not in shared:
            saved[address] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(t.untyped_storage().nbytes() for t in saved.values())


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
