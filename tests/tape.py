"""A tape of operators, which stands in for CUDA graphs on a CPU.

It knows tensors by their memory and numbers by their value, repeats what a CUDA graph would repeat, and refuses what a
CUDA graph cannot hold.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
# They wait for a GPU, or copy from the host: torch.tensor ends in lift_fresh.
FORBIDDEN = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.lift_fresh, aten.lift_fresh_copy, aten.is_nonzero,
    aten.equal, aten._unique2,
}  # fmt: skip


class Tape(TorchDispatchMode):
    """A graph of operators. Unlike a CUDA graph it computes while it records; its first replay does nothing."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in FORBIDDEN:
            raise RuntimeError(f"{func} while recording")
        result = func(*args, **(kwargs or {}))
        # By their memory: a tensor's `data` may be set to another.
        alias = functools.partial(tree_map_only, torch.Tensor, torch.Tensor.detach)
        self.calls.append((func, alias(args), alias(kwargs or {}), alias(result)))
        return result

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                again = func(*args, **kwargs)
                pairs = zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (result, again)), strict=True)
                for old, new in pairs:
                    if isinstance(new, torch.Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


class TapeRecorder:
    """Records tapes, on the CPU."""

    def __init__(self):
        self.runs = self.records = self.replays = 0

    def run(self, work):
        self.runs += 1
        return work()

    def rehearse(self, work):
        return self.run(work), None

    def record(self, work):
        self.records += 1
        tape, fresh = Tape(), True
        with tape:
            logs = work()

        def replay():
            nonlocal fresh
            self.replays += 1
            if not fresh:
                tape.replay()
            fresh = False

        return logs, replay


def look_at_no_classes(monkeypatch):
    """On a GPU, attack_loss does not look at them."""
    module = importlib.import_module("atop_fast.ops.attack_loss")
    monkeypatch.setattr(module, "_check_classes", lambda *args: None)
