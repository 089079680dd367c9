"""Timing, metadata, tables and result files for all benchmarks. README.md states the method."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atop_fast.env import cpu_model

RESULTS = Path(__file__).parent / "results"


@dataclass
class Case:
    """One comparison: what each variant runs, "eager" first, and how many bytes it must move at least."""

    op: str
    direction: str
    shape: str
    dtype: torch.dtype
    layout: str
    nbytes: int
    run: dict[str, Callable[[], Any]]
    check: Callable[[], None]


def keep_heap() -> None:
    """Start the program again with an allocator that keeps freed memory.

    By default glibc returns large blocks to the system, and the page faults of getting them back would be charged to
    whichever variant allocates most: eager mode would lose by a factor that warm programs do not see.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**40))
        os.execv(sys.executable, [sys.executable, *sys.argv])


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_us(functions: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    """Times of every function in microseconds, measured in turns so that a disturbance hits all of them alike.

    Fast functions are repeated within a sample. Each gets about `seconds` in all, and at least 7 samples.
    """
    repeats = {}
    for name, function in functions.items():
        for _ in range(2):
            function()
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        repeats[name] = max(1, round(2e-3 / max(time.perf_counter() - start, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < deadline or len(next(iter(samples.values()))) < 7:
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                function()
            synchronize(device)
            samples[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Median and interquartile range."""
    low, median, high = statistics.quantiles(samples, n=4)
    return {"median_us": round(median, 2), "iqr_us": round(high - low, 2)}


def copy_gbps(nbytes: int, device: str) -> float:
    """Bandwidth of torch's copy at this size, bytes read plus bytes written, in GB/s."""
    source = torch.zeros(max(nbytes // 8, 1), device=device)
    target = torch.zeros_like(source)
    samples = time_us({"copy": lambda: target.copy_(source)}, device, 0.1)["copy"]
    return 2 * source.numel() * 4 / statistics.median(samples) / 1e3


def metadata(device: str, commit: str | None) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or _git_commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as aligned text."""
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write(suite: str, device: str, folder: Path, document: dict[str, Any]) -> Path:
    """Write <suite>--<device>.json into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}--{device}.json"
    body = {key: value for key, value in document.items() if key != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in document["rows"])
    path.write_text(json.dumps(body, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')
    return path


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
