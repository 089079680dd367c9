"""The steps of a queue's batch: eager, or, on a GPU, as CUDA graphs.

A graph repeats its kernels on the same memory, so that a replayed batch lives in buffers, and has one of few sizes:
rows that are done, or copies, pad it. Rows do not depend on each other, so that the results are those of eager steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._core.capture import CudaRecorder, Logs, Recorder, Replayed, chosen_graphs
from .gradient import GradientEstimator
from .network import WORTHWHILE, is_copy
from .passes import ROWS, Passes

if TYPE_CHECKING:
    from .queue import Program, State

_PACKAGE = __name__.partition(".")[0]
_SAID: set[str] = set()


class Steps:
    """Runs a program eagerly on the state of a batch, one iteration of all rows at a time."""

    state: State

    def __init__(self, program: Program, estimator: GradientEstimator) -> None:
        self.program, self.estimator = program, estimator

    def enter(self, state: State) -> None:
        """Take the state of another batch."""
        self.state = state

    def size(self, images: int) -> int:
        """The number of rows of a batch that holds this number of images."""
        return -(-images // ROWS) * ROWS

    def best(self, images: int) -> Tensor:
        """The candidates of the batch's first rows."""
        return self.state["best"][:images]

    def __call__(self) -> None:
        self.program.step(self.estimator, self.state)


class Replays(Steps):
    """Runs a program like Steps, but as CUDA graphs: one for each size of the batch, of which only the current is kept.

    If a capture fails, eager steps continue from there, with a warning.

    Args:
        slots: rows of the first batch.
    """

    def __init__(self, program: Program, estimator: GradientEstimator, recorder: Recorder, slots: int) -> None:
        super().__init__(program, estimator)
        self.slots = slots
        self.replayed = Replayed(self._advance, recorder)
        self.cost = Passes()
        self.state = {}

    def enter(self, state: State) -> None:
        if self.replayed.missing is not None:
            # Entries of eager steps may share memory, or differ in type from those of a new state.
            super().enter(state)
        elif self.state and len(self.state["done"]) == len(state["done"]):
            for name, value in state.items():
                self.state[name].copy_(value)
        else:
            # Each buffer needs its own memory, which entries of a new state may share.
            self.state = {name: value.clone() for name, value in state.items()}

    def size(self, images: int) -> int:
        """The least of slots, slots / 2, slots / 4 ... that suffices; few sizes, because each needs a new capture."""
        if self.replayed.missing is not None:
            return super().size(images)
        size, smaller = self.slots, super().size(self.slots // 2)
        while images <= smaller < size:
            size, smaller = smaller, super().size(smaller // 2)
        return size

    def best(self, images: int) -> Tensor:
        return super().best(images).clone()

    def __call__(self) -> None:
        if self.replayed.missing is not None:
            super().__call__()
            return
        passes, before = self.estimator.passes, replace(self.estimator.passes)
        self.replayed((), stage=len(self.state["done"]), key=None, obstacle=None)
        # Replays do not run the Python code that counts.
        passes.forward, passes.backward = before.forward + self.cost.forward, before.backward + self.cost.backward
        if self.replayed.missing is not None:
            _say_once(self.estimator, f"they were {self.replayed.missing}")

    def _advance(self) -> Logs:
        """One iteration, whose results end in the buffers."""
        before, state = replace(self.estimator.passes), dict(self.state)
        self.program.step(self.estimator, state)
        passes = self.estimator.passes
        self.cost = Passes(passes.forward - before.forward, passes.backward - before.backward)
        addresses = {buffer.untyped_storage().data_ptr() for buffer in self.state.values()}
        changed = {name: value for name, value in state.items() if value is not self.state[name]}
        for name, value in changed.items():
            if (value.shape, value.dtype) != (self.state[name].shape, self.state[name].dtype):
                # Copying into the buffer would change the type.
                self.state = state
                self.replayed.give_up(f"a step changes the shape or the type of {name!r}")
                return {}
            if value.untyped_storage().data_ptr() in addresses:
                changed[name] = value.clone()
        for name, value in changed.items():
            self.state[name].copy_(value)
        return {}


def steps_of(program: Program, estimator: GradientEstimator, slots: int, device: torch.device) -> Steps:
    """The steps of a program in batches of at most `slots` images on the device."""
    make = _recorder(device)
    if make is None or not _wanted(program, estimator, device):
        return Steps(program, estimator)
    if (obstacle := _obstacle(program, estimator)) is not None:
        _say_once(estimator, obstacle)
        return Steps(program, estimator)
    return Replays(program, estimator, make(), slots)


def _recorder(device: torch.device) -> Callable[[], Recorder] | None:
    return CudaRecorder if device.type == "cuda" else None


def _wanted(program: Program, estimator: GradientEstimator, device: torch.device) -> bool:
    """Whether captures are asked for, and worth their time. A callback looks at every step."""
    if not estimator.replays or chosen_graphs() != "1" or getattr(program, "trace", None) is not None:
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return getattr(program, "steps", 0) * estimator.eot_iter >= WORTHWHILE


def _obstacle(program: Program, estimator: GradientEstimator) -> str | None:
    """Why steps may not be replayed: Python code that is not known to do the same in every call."""
    kind = type(program)
    patched = any(callable(value) and callable(getattr(kind, name, None)) for name, value in vars(program).items())
    if patched or not kind.__module__.startswith(f"{_PACKAGE}."):
        return f"the attack {kind.__name__} is not this package's"
    if estimator.gradient == "bpda" and estimator.substitute is not None:
        return "the substitute may keep a state"
    if not is_copy(estimator.model):
        name = getattr(estimator.model, "__name__", type(estimator.model).__name__)
        return f"the model {name} may keep a state or draw random numbers, and is attacked as it is"
    return None


def _say_once(estimator: GradientEstimator, reason: str) -> None:
    text = f"{estimator.function}: steps are not replayed as CUDA graphs: {reason}"
    if text not in _SAID:
        _SAID.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
