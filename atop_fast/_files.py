"""Atomic files and checkpoints: a reader, or a run that resumes after kill -9, sees a whole file or none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._checks import message


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def save_checkpoint(path: Path, fingerprint: str, state: dict[str, Any]) -> None:
    """Write tensors, numbers and containers of them, with the text that tells to which run they belong; atomic."""
    write_atomic(path, lambda p: torch.save({**state, "fingerprint": fingerprint}, p))


def load_checkpoint(function: str, path: Path | None, fingerprint: str) -> dict[str, Any] | None:
    """What save_checkpoint wrote, or None where nothing was; ValueError for a damaged file or one of another run."""
    if path is None or not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != fingerprint:
            raise ValueError("it belongs to another configuration")
    except Exception as error:
        # torch.load raises several unrelated types on a damaged file; each means the same to the caller.
        expected = "a checkpoint of this run (delete it to start again)"
        raise ValueError(message(function, "checkpoint", expected, f"{path}: {error}")) from error
    return state


def describe(*tensors: Tensor) -> str:
    """Shapes and sums of tensors: enough to notice that a checkpoint is used with other data or weights."""
    return " ".join(f"{tuple(t.shape)}:{float(t.sum(dtype=torch.float64)):.9g}" for t in tensors)


def writable_folder(function: str, argument: str, path: str | Path) -> Path:
    """The folder `path`, made if needed; ValueError if nothing can be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(message(function, argument, "a writable folder", f"{folder} ({error.strerror})")) from error
    return folder
