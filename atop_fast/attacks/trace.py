"""Traces: loss, accuracy and passes of an attack after each of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .passes import Passes


class TraceStep(NamedTuple):
    """The argument of a callback: one step of one run over the images of a call."""

    attack: str  # its class, or its name in an ensemble
    restart: int  # 0: the first run, over all images; later runs are over those that remained
    step: int  # the steps before this one; of Square, the queries
    images: int  # of this run; those that are done count with their last values
    loss: float | None  # mean loss that the attack maximizes; None if no image has a finite one
    accuracy: float  # mean share of draws that are correct
    forward: int  # rows through the model since the attack was called, forward ...
    backward: int  # ... and backward


Callback = Callable[[TraceStep], object]


class Trace:
    """Sums the observations of a queue's rows, and calls back for each step that all images have passed.

    Args:
        callback: called with a TraceStep; its return value is ignored.
        attack: name of the attack.
        passes: the counter of the call's estimators.
    """

    def __init__(self, callback: Callback, attack: str, passes: Passes) -> None:
        self.callback, self.attack, self.passes = callback, attack, passes
        self.before = replace(passes)
        self.restart = 0
        self.seen: tuple[Tensor, Tensor] | None = None

    def begin(self, images: int) -> None:
        """Begin a run over `images` images."""
        self.images = images
        # By how much a step's sums of loss, finite losses and accuracy differ from those of the step before.
        self.changes: dict[int, list[float]] = {}
        self.sums = [0.0, 0.0, 0.0]

    def take(self, t: Tensor, alive: Tensor, following: Tensor, done: Tensor, waiting: bool) -> None:
        """One iteration of the queue.

        Args:
            t, following: int64 (B,), each row's step before and after the iteration.
            alive: bool (B,), the rows that took it.
            done: bool (B,), those that take no further one.
            waiting: whether images wait for a place in the batch.
        """
        if self.seen is None:
            raise NotImplementedError(f"{self.attack} has no trace: its step() does not call observe()")
        loss, correct = (value.float()[alive].tolist() for value in self.seen)
        self.seen = None
        columns = (value[alive].tolist() for value in (t, following, done))
        rows = list(zip(*columns, loss, correct, strict=True))
        for step, after, over, own_loss, own_correct in rows:
            finite = math.isfinite(own_loss)
            values = (own_loss if finite else 0.0, float(finite), own_correct)
            self._add(step, values, 1)
            if not over:
                # From there on, the row's next values replace them.
                self._add(after, values, -1)
        if not waiting:
            self._call(min((after for _, after, over, _, _ in rows if not over), default=math.inf))

    def _add(self, step: int, values: tuple[float, ...], sign: int) -> None:
        sums = self.changes.setdefault(step, [0.0, 0.0, 0.0])
        for index, value in enumerate(values):
            sums[index] += sign * value

    def _call(self, limit: float) -> None:
        """Call back for the steps before `limit`."""
        for step in sorted(step for step in self.changes if step < limit):
            self.sums = [a + b for a, b in zip(self.sums, self.changes.pop(step), strict=True)]
            loss, finite, correct = self.sums
            mean = loss / round(finite) if round(finite) else None
            accuracy = min(1.0, max(0.0, correct / self.images))
            spent = (self.passes.forward - self.before.forward, self.passes.backward - self.before.backward)
            self.callback(TraceStep(self.attack, self.restart, step, self.images, mean, accuracy, *spent))
