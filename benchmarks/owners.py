"""Writes atop_fast/ops/owners.json, the measured exceptions from the order of backends: python benchmarks/owners.py

The order is that of `KERNELS` in atop_fast/ops/_registry.py. The suite ops of the committed result files has the times
of all backends of a case, measured in turns. A later backend gets an op, and its backward op, if it is faster than the
first by MARGIN on the geometric mean of the cases, and in none slower by MARGIN. The reference is no candidate: `eager`
in result files is plain PyTorch, and a kernel slower than that is not registered at all (tests/test_results.py).
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _results import OTHERS, RESULTS

from atop_fast._core.files import write_text
from atop_fast.bench.results import print_table, read
from atop_fast.ops import _registry

# The ops of cases with another name: functions over one op, and one op with several functions.
OPS = {"random_resize_pad": "resample", "gated_elu": "gated", "gated_elu_bias": "gated", "gated_relu": "gated"}
MARGIN = 1.05

# Seconds by device and op, case (machine, name, shape and dtype), and backend.
Seconds = dict[tuple[str, str], dict[tuple[str, ...], dict[str, float]]]


def committed() -> list[Path]:
    """The committed files that may have times of ops."""
    return [path for path in sorted(RESULTS.glob("*.json")) if path.stem not in OTHERS]


def measured(paths: Iterable[Path]) -> tuple[Seconds, dict[str, list[str]]]:
    """The newest times of kernels, and the files that have some, by device; a file is named <name>--<machine>.json."""
    seconds: Seconds = defaultdict(dict)
    files: dict[str, list[str]] = {device: [] for device in _registry.KERNELS}
    documents = [(path, read(path)) for path in paths]
    for path, document in sorted(documents, key=lambda pair: pair[1]["date"]):
        machine = path.stem.rpartition("--")[2]
        device = machine.partition("-")[0]
        found: Seconds = defaultdict(lambda: defaultdict(dict))
        for row in document["rows"]:
            name = row["case"].partition(" ")[0]
            op = OPS.get(name, name)
            if (
                row["suite"] == "ops"
                and row["ours"]
                and op in _registry.OPS
                and row["variant"] in _registry.KERNELS[device]
            ):
                case = (machine, row["case"], row["shape"], row["dtype"])
                found[device, op][case][row["variant"]] = row["median_s"]
        for key, cases in found.items():
            seconds[key].update(cases)
        if found:
            files[device].append(path.name)
    return seconds, {device: sorted(names) for device, names in files.items()}


def compared(seconds: Seconds) -> list[dict[str, Any]]:
    """A row for each op and backend that could own it: how much faster it is than the first, and whether it owns it."""
    rows = []
    for (device, op), cases in sorted(seconds.items()):
        first, *others = [b for b in _registry.KERNELS[device] if any(b in times for times in cases.values())]
        for backend in others:
            ratios = [times[first] / times[backend] for times in cases.values() if {first, backend} <= times.keys()]
            if ratios:
                mean, worst = statistics.geometric_mean(ratios), min(ratios)
                owns = mean > MARGIN and worst > 1 / MARGIN
                row = {"device": device, "op": op, "cases": len(ratios), "backend": backend, "against": first}
                rows.append({**row, "mean": mean, "worst": worst, "owns": owns})
    return rows


def document(paths: Iterable[Path]) -> dict[str, Any]:
    """The contents of owners.json."""
    seconds, files = measured(paths)
    owners: dict[str, dict[str, str]] = {device: {} for device in files}
    # With more than two backends of a device, the fastest comes last.
    for row in sorted(compared(seconds), key=lambda row: row["mean"]):
        if row["owns"]:
            owners[row["device"]] |= dict.fromkeys(_family(row["op"]), row["backend"])
    return {device: {"files": files[device], "owners": dict(sorted(owners[device].items()))} for device in files}


def _family(op: str) -> list[str]:
    """An op and its backward op, whose times are measured together."""
    return [name for name in (op, f"{op}_bwd") if name in _registry.OPS]


def main() -> None:
    paths = committed()
    write_text(_registry.EXCEPTIONS, json.dumps(document(paths), indent=1) + "\n")
    rows = compared(measured(paths)[0])
    if rows:
        print_table(rows)
    print(f"{len(rows)} comparisons of backends; wrote {_registry.EXCEPTIONS.name}")


if __name__ == "__main__":
    main()
