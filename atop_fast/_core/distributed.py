"""The processes of one run: those of torchrun or of the caller's process group, or this process alone."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import message

# A peer that dies closes its connections, which ends the wait at once. The timeout covers a machine that disappears
# silently. It must exceed the imbalance between ranks: one rank of an evaluation may take hours longer than another.
TIMEOUT = 86400.0
# Seconds until a process reports that it is waiting for the others to join.
PATIENCE = 20.0
# Variables that torchrun sets for each process.
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


class Group:
    """The processes of torch.distributed, or this one alone."""

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if active else 0
        self.size: int = dist.get_world_size() if active else 1

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank; a barrier."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost_peer_errors():
            dist.all_gather_object(values, value)
        return values

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one all-reduce."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        with _lost_peer_errors():
            dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.detach().copy_(total.view_as(t))


@contextlib.contextmanager
def _lost_peer_errors() -> Iterator[None]:
    """Turn the failure of a collective in the block into a ConnectionError that says how to continue."""
    try:
        yield
    except RuntimeError as error:
        # Not every version of torch has exception classes for the errors of gloo and NCCL.
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(
            "another process of this run has ended or timed out; the saved state is intact, and the same command "
            f"resumes from it ({reason})"
        ) from error


def _timeout() -> datetime.timedelta:
    """How long to wait for the other processes."""
    text = os.environ.get("ATOP_FAST_TIMEOUT", str(TIMEOUT))
    try:
        seconds = float(text)
        if not 0 < seconds < math.inf:
            raise ValueError
    except ValueError as error:
        raise ValueError(message("process_group", "ATOP_FAST_TIMEOUT", "seconds > 0", repr(text))) from error
    return datetime.timedelta(seconds=seconds)


def launched() -> bool:
    """Whether torchrun or a similar launcher started this process as one of several."""
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdecimal():
        raise ValueError(message("process_group", "WORLD_SIZE", "a number of processes, or unset", repr(size)))
    return int(size) > 1 and os.environ.keys() >= LAUNCHED


@contextlib.contextmanager
def _report_wait() -> Iterator[None]:
    """Report whom this process waits for if the block takes long: its variables may be left over from another run."""

    def report() -> None:
        size, rank, host, port = (os.environ[key] for key in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"))
        print(
            f"atop-fast: process {rank} of {size} (RANK and WORLD_SIZE in the environment) waits for the others at "
            f"{host}:{port}; if there are none, unset WORLD_SIZE",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(PATIENCE, report)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def process_group() -> Iterator[Group]:
    """A Group on the caller's process group; under torchrun without one, on a new group (gloo, and NCCL for GPUs)."""
    joins = dist.is_available() and not dist.is_initialized() and launched()
    if joins:
        with _report_wait():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_timeout())
    try:
        yield Group()
    except BaseException:
        # Closing the connections ends the wait of the other ranks. Without an error, the next call reuses the group.
        if joins:
            dist.destroy_process_group()
        raise
