"""The record of a training: a line of JSON for every epoch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from .._files import remove_leftovers, write_text


class Metrics:
    """Adds a line to a JSON-lines file at the end of every epoch; without a file it does nothing.

    Args:
        path: the file, or None.
        title: of the training; several trainings may share a file.
        epoch: the first epoch of this process: lines of an earlier run from there on are dropped.
    """

    def __init__(self, path: Path | None, title: str, epoch: int) -> None:
        self.path, self.title = path, title
        self.lines: list[dict[str, Any]] = []
        if path is not None:
            remove_leftovers(path.parent, path.stem)
        if path is not None and path.exists():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
            self.lines = [line for line in lines if line["training"] != title or line["epoch"] < epoch]
        self.start, self.images = time.monotonic(), 0

    def start_epoch(self, images: int) -> None:
        """`images` will pass before the epoch ends."""
        self.start, self.images = time.monotonic(), images

    def finish_epoch(self, epoch: int, values: dict[str, float], lr: float) -> None:
        """Write the line of an epoch: its mean scalars, last learning rate and throughput."""
        if self.path is None:
            return
        seconds = time.monotonic() - self.start
        speed = {"lr": lr, "seconds": round(seconds, 3), "images_per_second": round(self.images / seconds, 2)}
        self.lines.append({"training": self.title, "epoch": epoch, **values, **speed})
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
