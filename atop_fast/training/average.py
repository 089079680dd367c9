"""Averages of a network's weights over its training, which often generalize better than the final weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainingConfig


class Average:
    """Computes the final weights by the rule of TrainingConfig.average, and so the statistics of batch norm.

        ema      w <- d w + (1 - d) w_t after every update t = 0, 1, ..., starting from w_0, with
                 d = min(decay, (1 + t) / (10 + t)), so that the first weights do not stay in the average of a short
                 training, as in TensorFlow's moving average with a number of updates
        median   elementwise median of the weights after each epoch of the second half (MEAT)

    Args:
        module: the network.
        config: TrainingConfig.
        epochs: number of epochs of the training, with one that is cut; `config.updates` may leave few of its epochs.
    """

    def __init__(self, module: nn.Module, config: TrainingConfig, epochs: int) -> None:
        # Statistics of the last weights do not fit averaged ones.
        statistics = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self.tensors, self.config, self.epochs = [*module.parameters(), *statistics], config, epochs
        # One list of weights for "ema", one for each epoch for "median".
        self.kept: list[list[Tensor]] = []
        self.updates = 0

    def after_update(self) -> None:
        """Account for the weights after an update."""
        if self.config.average != "ema":
            return
        if self.kept:
            decay = min(self.config.ema_decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.kept[0], self._now(), 1 - decay)
        else:
            self.kept = [[p.clone() for p in self._now()]]
        self.updates += 1

    def after_epoch(self, epoch: int) -> None:
        """Account for the weights after epoch number `epoch`, counted from 0."""
        if self.config.average == "median" and epoch >= self.epochs // 2:
            self.kept.append([p.clone() for p in self._now()])

    def apply(self) -> None:
        """Copy the average into the network."""
        if not self.kept:
            return
        count = len(self.kept)
        for tensor, *values in zip(self._now(), *self.kept, strict=True):
            ordered = torch.stack(values).sort(dim=0).values
            tensor.copy_((ordered[(count - 1) // 2] + ordered[count // 2]) / 2)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the average inside of the context, and its own weights again afterwards."""
        own = [p.clone() for p in self._now()]
        self.apply()
        try:
            yield
        finally:
            for tensor, value in zip(self._now(), own, strict=True):
                tensor.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The averages so far."""
        return {"kept": self.kept, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the averages in `state`."""
        self.kept = [[value.to(p) for value, p in zip(values, self._now(), strict=True)] for values in state["kept"]]
        self.updates = state["updates"]

    def _now(self) -> list[Tensor]:
        return [tensor.detach() for tensor in self.tensors]
