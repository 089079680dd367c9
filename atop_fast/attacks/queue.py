"""A batch of fixed shape under attack: images that are done leave it, queued ones enter."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .gradient import GradientEstimator
from .passes import ROWS
from .replay import steps_of
from .trace import Trace

State = dict[str, Tensor]
# Images in the batch at a time. A larger batch only saves calls of tiny networks, because passes have sizes of their
# own.
SLOTS = {"cpu": 256}
SLOTS_ON_GPU = 512
# Steps between two checks for images that are done; each check synchronizes with the GPU.
STEPS = {"cpu": 1}
STEPS_ON_GPU = 8


class Batch(NamedTuple):
    """Images (B, C, H, W), labels (B,) and sample ids (B,) of an attack, and the images to start from, if given."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    start: Tensor | None = None

    def take(self, index: Tensor) -> Batch:
        """The rows at `index`."""
        start = None if self.start is None else self.start[index]
        return Batch(self.images[index], self.labels[index], self.ids[index], start)


class Program(Protocol):
    """The queue's interface to an attack: rows that can be set up and advanced independently of each other."""

    def begin(self, estimator: GradientEstimator, batch: Batch) -> State:
        """The state of new rows: tensors (B, ...), among them "done", bool (B,), and "best", images (B, C, H, W)."""

    def step(self, estimator: GradientEstimator, state: State) -> None:
        """One iteration of every row that is not done; must not synchronize, nor change rows that are done."""

    def length(self) -> int | None:
        """The number of steps after which every row is done, or None if it depends on the row."""


class Schedule:
    """The plan of a row, evaluation by evaluation: a subclass is a dataclass of tensors (length,)."""

    @property
    def length(self) -> int:
        return len(next(iter(vars(self).values())))

    def at(self, t: Tensor) -> State:
        """The entries of rows at t (B,)."""
        return {name: values[t] for name, values in vars(self).items()}


def run_queue(program: Program, estimator: GradientEstimator, batch: Batch, given: State | None = None) -> Tensor:
    """Run the program over all images; returns "best" of each when it is done, (N, C, H, W).

    `given` holds further tensors (N, ...), from which each row's state takes its entry. An attack's
    trace, if there is one, is notified of every iteration.

    The batch always has a multiple of 8 rows. When the queue is empty it shrinks. On a GPU, steps are replayed as CUDA
    graphs if the estimator allows it (replay.py).
    """
    queue, length = _Queue(program, estimator, batch, given or {}), program.length()
    if length is not None and (queue.trace is None or queue.count <= queue.slots):
        return queue.run_together(length)
    return queue.run_apart()


class _Queue:
    """A run of a program: the batch in hand, and the images that wait."""

    def __init__(self, program: Program, estimator: GradientEstimator, batch: Batch, given: State) -> None:
        self.program, self.estimator, self.batch, self.given = program, estimator, batch, given
        self.count, self.device = len(batch.images), batch.images.device
        self.slots = min(SLOTS.get(self.device.type, SLOTS_ON_GPU), -(-self.count // ROWS) * ROWS)
        self.steps = steps_of(program, estimator, self.slots, self.device)
        # The first image that has not entered the batch.
        self.waiting = self.slots
        self.trace: Trace | None = getattr(program, "trace", None)
        if self.trace is not None:
            self.trace.begin(self.count)

    def run_together(self, length: int) -> Tensor:
        """All rows of a batch are done at the same time: nothing synchronizes, so that a CUDA graph may hold it all."""
        parts = []
        for first in range(0, self.count, self.slots):
            self.steps.enter(self._begin(self._rows_from(first)))
            for _ in range(length):
                self._step()
            parts.append(self.steps.best(self.count - first))
        return torch.cat(parts)

    def run_apart(self) -> Tensor:
        """Rows are done at different times, and give their slots to images that wait."""
        self.steps.enter(self._begin(self._rows_from(0)))
        results = self.batch.images.clone()
        # The image in each slot; a slot without an image holds a copy that is done.
        owner = [slot if slot < self.count else -1 for slot in range(self.slots)]
        self.steps.state["done"][self.count :] = True
        while any(number >= 0 for number in owner):
            for _ in range(STEPS.get(self.device.type, STEPS_ON_GPU)):
                self._step()
            done = [slot for slot in self.steps.state["done"].nonzero()[:, 0].tolist() if owner[slot] >= 0]
            if not done:
                continue
            numbers = torch.tensor([owner[slot] for slot in done], device=self.device)
            results[numbers] = self.steps.state["best"][torch.tensor(done, device=self.device)]
            for slot in done:
                owner[slot] = -1
            entering = list(range(self.waiting, min(self.waiting + len(done), self.count)))
            self.waiting += len(entering)
            if entering:
                for slot, number in zip(done, entering, strict=False):
                    owner[slot] = number
                index = torch.tensor(done[: len(entering)], device=self.device)
                for key, value in self._begin(torch.tensor(entering, device=self.device)).items():
                    self.steps.state[key][index] = value
            elif (size := self.steps.size(len(owner) - owner.count(-1))) < len(owner):
                state, owner = _shrunk(self.steps.state, owner, size)
                self.steps.enter(state)
        return results

    def _rows_from(self, first: int) -> Tensor:
        count = self.steps.size(min(self.slots, self.count - first))
        return torch.arange(first, first + count, device=self.device).clamp_(max=self.count - 1)

    def _begin(self, index: Tensor) -> State:
        state = self.program.begin(self.estimator, self.batch.take(index))
        return state | {key: value[index] for key, value in self.given.items()}

    def _step(self) -> None:
        if self.trace is None:
            self.steps()
            return
        t, alive = self.steps.state["t"].clone(), ~self.steps.state["done"]
        # In a batch that never shrinks, copies pad the last rows.
        alive[self.count :] = False
        self.steps()
        self.trace.take(t, alive, self.steps.state["t"], self.steps.state["done"], self.waiting < self.count)


def _shrunk(state: State, owner: list[int], size: int) -> tuple[State, list[int]]:
    """The rows that still hold an image, padded to `size` rows, and their owners."""
    busy = [slot for slot, number in enumerate(owner) if number >= 0]
    idle = [slot for slot, number in enumerate(owner) if number < 0]
    kept = busy + idle[: size - len(busy)]
    index = torch.tensor(kept, device=state["done"].device, dtype=torch.int64)
    return {key: value[index] for key, value in state.items()}, [owner[slot] for slot in kept]
