"""The training loop: data order, schedules, progress, and checkpoints that resume exactly.

A checkpoint holds the state after an update, possibly within an epoch. Data order and all randomness are functions of
seed, epoch and sample, so a run that was killed resumes to the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._core.checks import message
from .._core.distributed import Group, process_group
from .._core.files import describe_module, load_checkpoint, remove_leftovers, save_checkpoint, writable_folder
from .._core.signals import stop_requests
from .._core.threads import Queueing
from ..randomness import derive_seed, permutation
from .average import Average
from .config import TrainingConfig
from .feed import Feed
from .metrics import Metrics
from .single import check_passes
from .step import Step

History = list[dict[str, float]]
# Approximate number of history entries if the length of the training is given in updates.
PARTS = 20
# Images whose restoration TensorBoard shows.
PICTURES = 8
# Schedule "onecycle": share of the updates in the warm-up, first rate over peak rate, last rate over first rate.
WARM_UP, FIRST, LAST = 0.2, 1 / 25, 1e-4
# State of the training loop in a checkpoint, next to that of networks and optimizers.
LOOP_STATE = ("epoch", "batch", "done", "seen", "sums", "history")


def fit(
    title: str,
    step: Step,
    feed: Feed,
    *,
    seed: int,
    held_out: Feed | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 1.0,
    metrics: str | Path | None = None,
    tensorboard: str | Path | None = None,
    fingerprint: Mapping[str, str] | None = None,
    progress: bool = True,
) -> History:
    """Run `step` over shuffled batches with its networks in training mode; afterwards they are in evaluation mode.

    Under torchrun, or with an initialized process group, each process takes its shard of every batch.

    Args:
        title: name on the progress bar.
        step: the update; its config gives epochs, batch size, schedule and average.
        feed: the images.
        seed: key of the data order.
        held_out: images that are evaluated every `evaluate_every` history entries (see TrainingConfig).
        checkpoint: file from which an interrupted call with the same `fingerprint` resumes to the same result. It is
            written every `checkpoint_minutes`, at the end, and on SIGTERM or Ctrl-C, and holds only tensors and
            numbers. If writing fails, the previous file remains.
        checkpoint_minutes: minutes between checkpoints; 0 writes one after every update.
        metrics: JSON-lines file to which every history entry adds its losses, learning rate and images per second.
        tensorboard: folder for TensorBoard logs with the same numbers and purified images; needs the package.
        fingerprint: further inputs of the result, such as "transform" -> a text that identifies it; the data, the
            initial networks, the options and `seed` are added to it.
        progress: show a progress bar with the ETA.

    Returns:
        The history: the mean of every logged scalar over each epoch or, if the configuration sets `updates`, over each
        twentieth of these.

    Raises:
        ValueError: `checkpoint` is damaged, belongs to another run or cannot be written, nor can `metrics`; processes
            have different networks, data or options; the networks do not take the images of `held_out`; or a loss or a
            weight became NaN or infinite. The latter is detected at the end of an epoch and before every checkpoint, so
            that it is never saved.
        SystemExit, KeyboardInterrupt: after SIGTERM (status 143) or Ctrl-C, once the checkpoint is written; a second
            Ctrl-C does not wait for that.
    """
    checkpoint, metrics, tensorboard = (None if p is None else Path(p) for p in (checkpoint, metrics, tensorboard))
    for module in step.modules.values():
        module.train()
    try:
        with process_group() as group, stop_requests() as stop:
            training = _Training(step, feed, group, seed, fingerprint or {}, held_out)
            training.try_held_out()
            training.load(checkpoint)
            if metrics is not None:
                writable_folder("fit", "metrics", metrics.parent)
            deadline = time.monotonic() + 60 * checkpoint_minutes
            files = (metrics, tensorboard) if group.rank == 0 else (None, None)
            record = Metrics(files[0], title, training.done, files[1])
            for _ in training.run(title, record, progress and group.rank == 0):
                if time.monotonic() >= deadline or stop.signal is not None:
                    training.check()
                    training.save(checkpoint)
                    deadline = time.monotonic() + 60 * checkpoint_minutes
                if stop.signal is not None:
                    if checkpoint is not None and group.rank == 0:
                        done = f"update {training.done:,} of {training.total:,}"
                        print(f"{title}: stopped; {checkpoint} has {done}, and the same call resumes", file=sys.stderr)
                    stop.leave()
            training.save(checkpoint)
            training.average.apply()
            return training.history
    finally:
        for module in step.modules.values():
            module.eval()


class _Training:
    """The state of a training; the next update is number `batch` of `epoch`."""

    def __init__(
        self, step: Step, feed: Feed, group: Group, seed: int, fingerprint: Mapping[str, str], held_out: Feed | None
    ) -> None:
        self.step, self.feed, self.group, self.seed, self.held_out = step, feed, group, seed, held_out
        self.config: TrainingConfig = step.config
        check_passes(step.single, len(feed), self.config.batch_size, self.config.accumulate, group.size)
        self.fingerprint = {
            **fingerprint,
            **{key: repr(value) for key, value in asdict(self.config).items()},
            "seed": f"{seed}",
            "data": feed.description(),
            **{f"initial {name}": describe_module(module) for name, module in step.modules.items()},
        }
        if any(other != self.fingerprint for other in group.gather(self.fingerprint)):
            expected = "the same networks, data and options in every process"
            raise ValueError(message("fit", "step, feed", expected, "differences between the ranks"))
        self.updates = -(-len(feed) // self.config.batch_size)
        self.total = self.config.total(len(feed))
        self.part = self.updates if self.config.updates is None else -(-self.total // PARTS)
        self.average = Average(next(iter(step.modules.values())), self.config, -(-self.total // self.updates))
        self.epoch = self.batch = self.done = 0
        # Sums of the scalars, and number of images, since the last history entry.
        self.sums: dict[str, Tensor] = {}
        self.seen = 0
        # First update in which each scalar was not finite, or -1. Kept on the device to avoid a synchronization.
        self.first_nonfinite: Tensor | None = None
        self.history: History = []
        self.rate, self.path = self.config.lr, ""
        self.parts: dict[str, Any] = {
            **step.modules,
            **{f"optimizer of {name}": optimizer for name, optimizer in step.optimizers.items()},
            **{f"scaler of {name}": scaler for name, scaler in step.scalers.items()},
            "average": self.average,
        }

    def run(self, title: str, record: Metrics, progress: bool) -> Iterator[None]:
        """Train to the end; yields after every update."""
        total, done = self._images(self.total), self._images(self.done)
        queueing = Queueing(torch.get_num_threads() if self.step.device.type == "cpu" else 1)
        with tqdm(total=total, initial=done, desc=title, unit="img", disable=not progress) as bar:
            while self.done < self.total:
                order = permutation(len(self.feed), derive_seed(self.seed, "order"), self.epoch)
                batches = order.split(self.config.batch_size)[self.batch :][: self.total - self.done]
                read = self.feed.batches(self._mine(batches), seed=derive_seed(self.seed, "items", self.epoch))
                for whole, (x, y, ids) in zip(batches, read, strict=True):
                    self._update(x, y, ids, len(whole))
                    bar.update(len(whole))
                    record.images += len(whole)
                    if progress and self.step.replayed.path != self.path:
                        self.path = self.step.replayed.path
                        tqdm.write(f"{title}: updates run as {self.path}", file=sys.stderr)
                    if progress and (remark := queueing.remark()):
                        tqdm.write(f"{title}: {remark}", file=sys.stderr)
                    ends = self.batch == self.updates or self.done == self.total
                    if ends:
                        self.average.after_epoch(self.epoch)
                    if self.done % self.part == 0 or self.done == self.total:
                        self.check()
                        self._finish_part(record)
                        bar.set_postfix({key: f"{value:.3f}" for key, value in self.history[-1].items()})
                    if ends:
                        self.epoch, self.batch = self.epoch + 1, 0
                    yield

    def _images(self, updates: int) -> int:
        """The number of images in the first `updates` updates."""
        return updates // self.updates * len(self.feed) + updates % self.updates * self.config.batch_size

    def _mine(self, batches: tuple[Tensor, ...]) -> list[Tensor]:
        """The shard of each batch for this process; an empty shard becomes one image, which gets weight 0."""
        if self.group.size == 1:
            return list(batches)
        parts = [whole.tensor_split(self.group.size)[self.group.rank] for whole in batches]
        return [part if len(part) else whole[:1] for part, whole in zip(parts, batches, strict=True)]

    def _update(self, x: Tensor, y: Tensor, ids: Tensor, whole: int) -> None:
        self.rate = self.config.lr * _factor(self.config.schedule, self.done, self.total)
        self.step.set_rate(self.rate)
        self.step.progress.fill_(self.done / self.total)
        share = len(ids) / whole if whole > self.group.rank else 0.0
        logs = self.step(x, y, ids, self.epoch, share)
        values = torch.stack([value.double() * share for value in logs.values()])
        self.group.add_up([values])
        before = torch.full_like(values, -1) if self.first_nonfinite is None else self.first_nonfinite
        self.first_nonfinite = torch.where(values.isfinite() | (before >= 0), before, self.done)
        for key, value in zip(logs, values, strict=True):
            self.sums[key] = self.sums.get(key, torch.zeros_like(value)) + value * whole
        self.average.after_update()
        self.seen += whole
        self.batch, self.done = self.batch + 1, self.done + 1

    def _finish_part(self, record: Metrics) -> None:
        entry = {key: float(value) / self.seen for key, value in self.sums.items()}
        every = self.config.evaluate_every
        if self.held_out is not None and every and (len(self.history) + 1) % every == 0:
            with self.average.applied():
                entry |= self._evaluate(self.held_out)
        self.history.append(entry)
        record.add(self.epoch, self.done, self.history[-1], self.rate)
        if record.writer is not None:
            first = torch.arange(min(PICTURES, len(self.feed)))
            # In training mode, the pictures would count in the statistics of batch norm.
            with self._evaluation_mode():
                record.add_pictures(self.done, self.step.pictures(*next(self.feed.batches([first], workers=0))))
        self.sums, self.seen = {}, 0

    def _evaluate(self, feed: Feed) -> dict[str, float]:
        """Means of the present network over the held-out images, sharded over the processes."""
        batches = torch.arange(len(feed)).split(self.config.batch_size)
        sums: dict[str, Tensor] = {}
        with self._evaluation_mode():
            for whole, (x, y, ids) in zip(batches, feed.batches(self._mine(batches)), strict=True):
                count = len(ids) if len(whole) > self.group.rank else 0
                for key, value in self.step.evaluate(x, y, ids).items():
                    sums[key] = sums.get(key, torch.zeros_like(value)) + value.double() * count
        self.group.add_up(list(sums.values()))
        return {f"held_out_{key}": float(value) / len(feed) for key, value in sums.items()}

    def try_held_out(self) -> None:
        """Raise before the first update if the networks do not take the held-out images."""
        if self.held_out is None or not self.config.evaluate_every:
            return
        x, y, ids = next(self.held_out.batches([torch.zeros(1, dtype=torch.int64)], workers=0))
        try:
            with self._evaluation_mode():
                self.step.evaluate(x, y, ids)
        except (RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            given = f"{tuple(x.shape[1:])} ({reason})"
            raise ValueError(message("fit", "held_out", "images that the networks take", given)) from error

    @contextlib.contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        for module in self.step.modules.values():
            module.eval()
        try:
            yield
        finally:
            for module in self.step.modules.values():
                module.train()

    def check(self) -> None:
        """Raise if a logged scalar or a weight is not finite; called before every save."""
        updates = [] if self.first_nonfinite is None else self.first_nonfinite.tolist()
        for name, update in zip(self.sums, updates, strict=False):
            if update >= 0:
                raise ValueError(message("fit", name, "finite", f"NaN or infinity in {self._name(int(update))}"))
        for name, module in self.step.modules.items():
            values = [v.isfinite().all() for v in module.state_dict().values() if v.is_floating_point()]
            if not torch.stack(values).all():
                given = f"NaN or infinity after {self._name(self.done - 1)}"
                raise ValueError(message("fit", f"the weights of {name}", "finite", given))

    def _name(self, update: int) -> str:
        epoch, batch = divmod(update, self.updates)
        return f"update {batch} of epoch {epoch} (both from 0); no checkpoint holds it"

    def save(self, path: Path | None) -> None:
        """Write the checkpoint, if a path is given; only rank 0 writes, because all ranks have the same state."""
        if path is None or self.group.rank:
            return
        loop = {name: getattr(self, name) for name in LOOP_STATE}
        save_checkpoint(path, self.fingerprint, {**loop, **{k: part.state_dict() for k, part in self.parts.items()}})

    def load(self, path: Path | None) -> None:
        """Resume from the checkpoint if there is one; otherwise check that it can be written."""
        if path is not None:
            writable_folder("fit", "checkpoint", path.parent)
            remove_leftovers(path.parent, path.stem)
        state = load_checkpoint("fit", path, self.fingerprint)
        if state is None:
            return
        for name in LOOP_STATE:
            setattr(self, name, state[name])
        self.sums = {key: value.to(self.step.device) for key, value in self.sums.items()}
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        # Loading has moved the state of the optimizers to other memory.
        self.step.replayed.forget()


def _factor(schedule: str, done: int, total: int) -> float:
    """The learning rate relative to the configured one after `done` of `total` updates, 0 <= done < total."""
    if schedule == "onecycle":
        # As in torch's OneCycleLR, one update has exactly the peak rate, and the last update the lowest.
        top, end = max(0.0, WARM_UP * total - 1), total - 1
        if done <= top:
            return FIRST + (1 - FIRST) * (done / top if top else 1.0)
        return 1 + (FIRST * LAST - 1) * (done - top) / (end - top)
    part = done / total
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * part))
    if schedule == "linear":
        return 1 - part
    return 0.1 ** (int(part >= 0.5) + int(part >= 0.75)) if schedule == "step" else 1.0
