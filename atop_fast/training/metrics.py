"""The record of a training: one line of JSON for every history entry, and the same for TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from .._core.files import remove_leftovers, write_text


class Metrics:
    """Adds a line to a JSON-lines file, and scalars and pictures to a TensorBoard log, for every history entry.

    Args:
        path: the file; None writes no file.
        title: name of the training; several trainings may share a file.
        done: number of updates at which this process resumes; later lines of an earlier run are dropped.
        tensorboard: folder of TensorBoard logs, with the log of this training in <folder>/<title>; None writes none.

    Raises:
        ImportError: see summary_writer.
    """

    def __init__(self, path: Path | None, title: str, done: int, tensorboard: Path | None = None) -> None:
        self.path, self.title = path, title
        self.lines: list[dict[str, Any]] = []
        if path is not None:
            remove_leftovers(path.parent, path.stem)
            lines = read_metrics(path)
            self.lines = [line for line in lines if line["training"] != title or line["updates"] <= done]
        self.writer: Any = None
        if tensorboard is not None:
            self.writer = summary_writer()(str(tensorboard / title), purge_step=done + 1)
        # Images since the last line; the throughput is that of this process.
        self.start, self.images = time.monotonic(), 0

    def add(self, epoch: int, done: int, values: dict[str, float], lr: float) -> None:
        """Write a line after `done` updates: mean scalars since the last line, learning rate and throughput."""
        seconds = time.monotonic() - self.start
        speed = {"lr": lr, "seconds": round(seconds, 3), "images_per_second": round(self.images / seconds, 2)}
        self.start, self.images = time.monotonic(), 0
        if self.path is not None:
            self.lines.append({"training": self.title, "epoch": epoch, "updates": done, **values, **speed})
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        if self.writer is not None:
            for name, value in {**values, **speed}.items():
                self.writer.add_scalar(name, value, done)
            self.writer.flush()

    def add_pictures(self, done: int, images: Tensor) -> None:
        """Show images (N, C, H, W) in [0, 1] in TensorBoard, if there is a log and C is 1 or 3."""
        if self.writer is not None and len(images) and images.shape[1] in (1, 3):
            self.writer.add_images("purified", images.clamp(0, 1).cpu(), done)
            self.writer.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of Metrics; empty if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def summary_writer() -> type:
    """TensorBoard's writer; if it is missing, an ImportError says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("training: the package tensorboard is missing: pip install 'atop-fast[track]'") from error
    return SummaryWriter
