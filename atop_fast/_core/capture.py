"""Work as a CUDA graph: captured once for every signature of its inputs, then replayed without Python.

A graph repeats its kernels on the same memory and with the same numbers. Therefore the work, such as an update of a
training or a step of an attack, reads its inputs from static buffers, into which every batch is copied, and changing
numbers, such as the learning rate, from tensors. Work that cannot be captured runs eagerly on the same buffers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .checks import check_choice
from .waits import watched

Logs = dict[str, Tensor]
# Eager warm-up runs before a capture: they choose algorithms, compile kernels and create the optimizers' state.
WARM_UP = 3


def chosen_graphs() -> str:
    """The value of ATOP_FAST_GRAPHS: "1" captures attack steps and training updates, "updates" the latter, "0" neither.

    Raises:
        ValueError: the variable has another value.
    """
    return check_choice(
        "atop_fast", "ATOP_FAST_GRAPHS", os.environ.get("ATOP_FAST_GRAPHS") or "1", ("1", "updates", "0")
    )


class Recorder(Protocol):
    """Captures work on a device."""

    def run(self, work: Callable[[], Logs]) -> Logs:
        """Run the work eagerly, on the stream on which it will be captured."""

    def rehearse(self, work: Callable[[], Logs]) -> tuple[Logs, str | None]:
        """Run the work like `run`; returns its results and, if one is found, the reason why a capture would fail."""

    def record(self, work: Callable[[], Logs]) -> tuple[Logs, Callable[[], None]]:
        """Capture the work without running it; returns its result tensors and the function that runs it and fills them.

        Raises RuntimeError if the work cannot be captured.
        """


class CudaRecorder:
    """Captures CUDA graphs, each with its own memory pool."""

    def __init__(self) -> None:
        # Autograd accumulates a gradient on the stream of the weight's first use, so warm-up uses the capture stream.
        self.stream = torch.cuda.Stream()

    def run(self, work: Callable[[], Logs]) -> Logs:
        """See Recorder."""
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            logs = work()
        outside.wait_stream(self.stream)
        for value in logs.values():
            value.record_stream(outside)
        return logs

    def rehearse(self, work: Callable[[], Logs]) -> tuple[Logs, str | None]:
        """See Recorder."""
        return watched(lambda: self.run(work))

    def record(self, work: Callable[[], Logs]) -> tuple[Logs, Callable[[], None]]:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.stream restores the current stream if the capture fails; torch.cuda.graph does not. "thread_local",
        # because the pin-memory thread of a DataLoader must not invalidate the capture.
        recording = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self.stream), recording:
            logs = work()
        return logs, graph.replay


class _Graph:
    """The static buffers and the graph for one signature of the inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.buffers = [torch.empty_like(t) for t in inputs]
        self.runs = 0
        self.logs: Logs = {}
        self.replay: Callable[[], None] | None = None


class Replayed:
    """Runs work on tensors: eagerly for a warm-up, then captured and replayed.

    One graph is kept for every signature of the inputs (shapes, dtypes, strides) and every `key`. All graphs are
    dropped when `stage` changes, because stages do not return.

    Args:
        work: maps tensors to named scalars; must also read everything else that changes from tensors.
        recorder: None runs everything eagerly.

    Attributes:
        path: a description of how the work runs and why, once that is known.
    """

    def __init__(self, work: Callable[..., Logs], recorder: Recorder | None) -> None:
        self.work, self.recorder = work, recorder
        self.missing = "no GPU" if recorder is None else None
        self.path = ""
        self.graphs: dict[Hashable, _Graph] = {}
        self.stage: Hashable = None

    def __call__(self, inputs: Sequence[Tensor], stage: Hashable, key: Hashable, obstacle: str | None) -> Logs:
        """Run the work on the inputs; the results belong to the caller.

        Args:
            inputs: tensors, which are copied into the buffers.
            stage: see above.
            key: see above.
            obstacle: why the work may not be captured; None if it may.
        """
        if stage != self.stage:
            self.graphs.clear()
            self.stage = stage
        signature = tuple((t.shape, t.dtype, t.stride()) for t in inputs)
        if (signature, key) not in self.graphs:
            self.graphs[signature, key] = _Graph(inputs)
        graph = self.graphs[signature, key]
        for buffer, value in zip(graph.buffers, inputs, strict=True):
            buffer.copy_(value, non_blocking=True)

        def work() -> Logs:
            return self.work(*graph.buffers)

        if self.recorder is not None and obstacle is None and graph.replay is None and graph.runs >= WARM_UP:
            self._record(graph, work)
        obstacle = obstacle or self.missing
        if obstacle is not None:
            self.path = f"eager ({obstacle})"
        if self.recorder is None or obstacle is not None:
            return work()
        if graph.replay is None:
            graph.runs += 1
            return self.recorder.run(work) if graph.runs < WARM_UP else self._rehearse(work)
        graph.replay()
        return {name: value.clone() for name, value in graph.logs.items()}

    def _rehearse(self, work: Callable[[], Logs]) -> Logs:
        """The last warm-up run before a capture, which is not tried if it would fail."""
        assert self.recorder is not None
        logs, cause = self.recorder.rehearse(work)
        if cause is not None:
            self.give_up(cause)
        return logs

    def _record(self, graph: _Graph, work: Callable[[], Logs]) -> None:
        assert self.recorder is not None
        try:
            graph.logs, graph.replay = self.recorder.record(work)
            self.path = "CUDA graph"
        except RuntimeError as error:
            self.give_up(str(error).partition("\n")[0])

    def give_up(self, cause: str) -> None:
        """Run everything eagerly from now on."""
        self.recorder, self.missing = None, "not captured: " + cause
        self.path = f"eager ({self.missing})"
        # Earlier captures may hold gradients in their own memory pools, which eager runs do not share.
        self.graphs.clear()

    def forget(self) -> None:
        """Drop all graphs, for example after a change of the memory that the work reads."""
        self.graphs.clear()
