"""Passes of rows through a model: their count, their size, and the rows of a batch and its draws that one has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

# Networks run on a multiple of this many rows: convolutions and matrix products of a CPU then round each row in the
# same way whatever the others are, so that results do not depend on how images are batched. A GPU's may not.
ROWS = 8
# Bytes that the pass with gradients may save for the backward pass, unless the caller limits its rows; on a GPU a share
# of its memory, if that is more.
MEMORY = 1 << 30
GPU_SHARE = 8
# Rows of a pass of a model whose memory cannot be measured.
UNMEASURED_ROWS = 64
# More rows than this make a pass no faster.
MOST_ROWS = 1024


@dataclass
class Passes:
    """Rows that went through the model, forward and backward."""

    forward: int = 0
    backward: int = 0


_COUNTER: ContextVar[Passes | None] = ContextVar("passes", default=None)


@contextlib.contextmanager
def counted_passes() -> Iterator[Passes]:
    """Count the rows that attacks and draw_logits send through a model inside the block."""
    passes = Passes()
    token = _COUNTER.set(passes)
    try:
        yield passes
    finally:
        _COUNTER.reset(token)


def counter() -> Passes | None:
    """The count of the block, if there is one."""
    return _COUNTER.get()


class Pass:
    """Rows first .. first + count - 1 of a batch that is repeated draw by draw, and padding to fill the pass."""

    def __init__(self, first: int, count: int, batch: int, multiple: int, device: torch.device) -> None:
        self.first, self.count, self.batch = first, count, batch
        self.size = -(-count // multiple) * multiple
        rows = torch.arange(first, first + self.size, device=device).clamp_(max=first + count - 1)
        self.draws = rows // batch
        # The whole batch as it is needs no copy.
        self.samples = None if (self.size, first % batch) == (batch, 0) else rows % batch

    def take(self, t: Tensor) -> Tensor:
        """The rows' values of t (B, ...)."""
        return t if self.samples is None else t[self.samples]

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """The parts of the pass that belong to one draw: which rows of the pass, and which samples."""
        row = 0
        while row < self.count:
            sample = (self.first + row) % self.batch
            size = min(self.count - row, self.batch - sample)
            yield slice(row, row + size), slice(sample, sample + size)
            row += size


def room(device: torch.device) -> int:
    """Bytes that a pass may save.

    It is a share of the total memory of a GPU, so that its passes do not change from run to run, but at most half of
    the free memory, as the network and other processes need some, too.
    """
    if device.type != "cuda":
        return MEMORY
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(MEMORY, min(total // GPU_SHARE, free // 2))
