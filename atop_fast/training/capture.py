"""An update as a CUDA graph: recorded once for every form of its input, and then replayed without Python.

A graph repeats its kernels on the same memory and with the same numbers. So the update reads its input from buffers,
into which every batch is copied, and numbers that change, such as the learning rate, from tensors. What cannot be
recorded runs eagerly on the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Logs = dict[str, Tensor]
# Eager runs before a recording: they choose algorithms, compile kernels and create the optimizers' state.
WARM_UP = 3


class Recorder(Protocol):
    """Records work on a device."""

    def run(self, work: Callable[[], Logs]) -> Logs:
        """Do the work, in the place where it is to be recorded."""

    def record(self, work: Callable[[], Logs]) -> tuple[Logs, Callable[[], None]]:
        """Record the work without doing it; its results, and the function that does it and fills them.

        RuntimeError where it cannot be recorded.
        """


class CudaRecorder:
    """Records CUDA graphs, each with memory of its own."""

    def __init__(self) -> None:
        # Gradients are accumulated on the stream of a weight's first use, so all runs have the recording's.
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

    def record(self, work: Callable[[], Logs]) -> tuple[Logs, Callable[[], None]]:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves its stream current if the recording fails, torch.cuda.stream does not. A DataLoader's
        # thread, which pins memory, must not end a recording: hence "thread_local".
        recording = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self.stream), recording:
            logs = work()
        return logs, graph.replay


class _Form:
    """Inputs of one form: their buffers, and what was recorded for them."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.buffers = [torch.empty_like(t) for t in inputs]
        self.runs = 0
        self.logs: Logs = {}
        self.replay: Callable[[], None] | None = None


class Replayed:
    """Work on tensors that is recorded after some runs, and from then on replayed.

    A recording is kept for every form of the inputs (shapes, dtypes, layouts) and every `key`; those of another
    `stage` are dropped, as stages follow one another.

    Args:
        work: from tensors to named scalars; must read all else that changes from tensors too.
        recorder: None runs everything eagerly.

    Attributes:
        path: how the work runs and why, once that is known; for the user to read.
    """

    def __init__(self, work: Callable[..., Logs], recorder: Recorder | None) -> None:
        self.work, self.recorder = work, recorder
        self.missing = "no GPU" if recorder is None else None
        self.path = ""
        self.forms: dict[Hashable, _Form] = {}
        self.stage: Hashable = None

    def __call__(self, inputs: Sequence[Tensor], stage: Hashable, key: Hashable, obstacle: str | None) -> Logs:
        """Do the work on the inputs; `obstacle` says why it may not be recorded. The results are the caller's."""
        if stage != self.stage:
            self.forms.clear()
            self.stage = stage
        kinds = tuple((t.shape, t.dtype, t.stride()) for t in inputs)
        if (kinds, key) not in self.forms:
            self.forms[kinds, key] = _Form(inputs)
        form = self.forms[kinds, key]
        for buffer, value in zip(form.buffers, inputs, strict=True):
            buffer.copy_(value, non_blocking=True)

        def work() -> Logs:
            return self.work(*form.buffers)

        if self.recorder is not None and obstacle is None and form.replay is None and form.runs >= WARM_UP:
            self._record(form, work)
        obstacle = obstacle or self.missing
        if obstacle is not None:
            self.path = f"eager ({obstacle})"
        if self.recorder is None or obstacle is not None:
            return work()
        if form.replay is None:
            form.runs += 1
            return self.recorder.run(work)
        form.replay()
        return {name: value.clone() for name, value in form.logs.items()}

    def _record(self, form: _Form, work: Callable[[], Logs]) -> None:
        assert self.recorder is not None
        try:
            form.logs, form.replay = self.recorder.record(work)
            self.path = "CUDA graph"
        except RuntimeError as error:
            self.recorder, self.missing = None, "not captured: " + str(error).partition("\n")[0]
            # What was recorded before may have left gradients in memory that eager runs do not share.
            self.forms.clear()

    def forget(self) -> None:
        """Drop the recordings, as after a change of the memory that the work reads."""
        self.forms.clear()
