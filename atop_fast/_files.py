"""Atomic files: a reader, or a run that resumes after kill -9, sees a whole file or none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

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
