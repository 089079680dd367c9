"""Result files of what is not timed: tables with columns of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atop_fast._core.files import write_text
from atop_fast.bench.results import metadata, print_table

__all__ = ["OTHERS", "RESULTS", "metadata", "print_table", "write"]

RESULTS = Path(__file__).parent / "results"
# The files that hold no timings; all others have the form of `atop-fast bench`.
OTHERS = (
    "cifar-native--cpu",
    "defenses--cpu",
    "demo--cpu",
    "engine--cpu",
    "eot-curves--cpu",
    "judge-nfgsm--cpu-avx2",
    "judge-standard--cpu-avx2",
    "load--cpu",
    "loaded--cpu-avx2",
    "numerics--cpu",
    "parity--cpu",
    "pilot--cpu-avx2",
    "reliability--cpu",
    "restoration--cpu",
    "suite--cpu-avx2",
)


def write(name: str, device: str, folder: Path, document: dict[str, Any]) -> Path:
    """Write <name>--<device>.json into `folder`, one row a line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}--{device}.json"
    body = {key: value for key, value in document.items() if key != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in document["rows"])
    write_text(path, json.dumps(body, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')
    return path
