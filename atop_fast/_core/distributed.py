"""The processes of one run: those that torchrun started, or of a process group of the caller's, or this one alone."""

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

# A peer that dies closes its connections, which ends the wait at once. The limit is for a machine that vanishes without
# a word, and must be longer than the shares of the work may differ: one of an evaluation may take hours longer.
TIMEOUT = 86400.0
# Seconds after which a process says that it waits for others to join.
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
        """Every process's value, in the order of ranks; waits for all."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(values, value)
        return values

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one exchange."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        with _lost():
            dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.detach().copy_(total.view_as(t))


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """Raise a ConnectionError, which says what to do, if the others cannot be reached inside."""
    try:
        yield
    except RuntimeError as error:
        # gloo's and NCCL's errors have no class of their own in every version of torch.
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(
            "another process of this run has ended, or has not answered in time; what was saved is whole, and the same "
            f"command goes on from it ({reason})"
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
    """Whether torchrun, or the like, started this process as one of several."""
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdecimal():
        raise ValueError(message("process_group", "WORLD_SIZE", "a number of processes, or unset", repr(size)))
    return int(size) > 1 and os.environ.keys() >= LAUNCHED


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    """Say for whom this process waits, if the block takes long: the variables may be left over from a run."""

    def say() -> None:
        size, rank, place, port = (os.environ[key] for key in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"))
        print(
            f"atop-fast: process {rank} of {size} (RANK and WORLD_SIZE in the environment) waits for the others at "
            f"{place}:{port}; if there are none, unset WORLD_SIZE",
            file=sys.stderr,
            flush=True,
        )

    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def process_group() -> Iterator[Group]:
    """The Group of the caller's process group, or, under torchrun without one, of a new one (gloo; NCCL for GPUs)."""
    joins = dist.is_available() and not dist.is_initialized() and launched()
    if joins:
        with _announced():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_timeout())
    try:
        yield Group()
    except BaseException:
        # Closed connections end the others' wait. Otherwise the group stays for the next call.
        if joins:
            dist.destroy_process_group()
        raise
