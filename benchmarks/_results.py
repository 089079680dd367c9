"""Result files of what is not timed: tables with columns of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atop_fast.bench.results import metadata, print_table, write_rows

__all__ = ["OTHERS", "RESULTS", "metadata", "print_table", "write"]

RESULTS = Path(__file__).parent / "results"
# The files that hold no timings; all others have the form of `atop-fast bench`.
OTHERS = (
    "cifar-native--cpu",
    "defenses--cpu",
    "demo--cpu",
    "engine--cpu",
    "eotpgd--cpu-avx2",
    "eot-curves--cpu",
    "judge-nfgsm--cpu",
    "judge-standard--cpu",
    "load--cpu",
    "loaded--cpu-avx2",
    "mutations--cpu-avx2",
    "numerics--cpu",
    "parity--cpu",
    "pilot--cpu-avx2",
    "reliability--cpu",
    "restoration--cpu",
    "suite--cpu-avx2",
)


def write(name: str, device: str, folder: Path, document: dict[str, Any]) -> Path:
    """Write <name>--<device>.json into `folder`, one row a line."""
    path = folder / f"{name}--{device}.json"
    write_rows(path, document)
    return path
