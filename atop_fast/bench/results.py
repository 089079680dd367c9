"""Result files: contents, validation, writing and printing."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .._core.checks import message
from .._core.files import write_text
from ..env import cpu_model
from ..ops import _registry

PEERS = ("torchattacks", "pyautoattack", "foolbox", "adversarial-robustness-toolbox", "kornia", "torchvision")
# The columns of every row with their types; columns with None may be null.
ROW: dict[str, tuple[type, ...]] = {
    "suite": (str,), "case": (str,), "shape": (str,), "variant": (str,), "ours": (bool,), "dtype": (str,),
    "threads": (int,), "samples": (int,), "median_s": (float, int), "iqr_s": (float, int), "ratio": (float, int),
    "images_per_s": (float, int, type(None)), "roofline": (float, int, type(None)),
    "peak_mib": (float, int, type(None)), "difference": (float, int, type(None)),
    "accuracy": (float, int, type(None)), "agree": (float, int, type(None)),
}  # fmt: skip
DOCUMENT = {"date": str, "commit": str, "device": str, "threads": int, "system": str, "versions": dict, "rows": list}
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def metadata(device: str, commit: str | None = None) -> dict[str, Any]:
    """The context that a reader needs to judge the numbers."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in PEERS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or _git_commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()} ({capability})",
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "clock": "wall clock" if device == "cpu" else "CUDA events; ops as replays of CUDA graphs unless noted",
        "versions": versions,
        "owners": {name: _registry.owner(name, device) for name in sorted(_registry.OPS)},
    }


def check_document(document: Any, source: object = "the document") -> dict[str, Any]:
    """Validate a document of results; a ValueError names the fault and `source`."""
    expected = "a result file of atop-fast bench"
    if not isinstance(document, dict):
        raise ValueError(message("bench", "json", expected, source))
    for key, kind in DOCUMENT.items():
        if not isinstance(document.get(key), kind):
            raise ValueError(message("bench", "json", expected, f"{source}, whose {key!r} is {document.get(key)!r}"))
    for number, row in enumerate(document["rows"]):
        if not isinstance(row, dict) or set(row) != set(ROW):
            raise ValueError(message("bench", "json", expected, f"{source}, whose row {number} has other columns"))
        for key, kinds in ROW.items():
            if type(row[key]) not in kinds:
                given = f"{source}, whose row {number} has {key} {row[key]!r}"
                raise ValueError(message("bench", "json", expected, given))
    return document


def read(path: Path) -> dict[str, Any]:
    """Read a result file; ValueError if it is invalid."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(message("bench", "json", "a result file of atop-fast bench", f"{path} ({error})")) from error
    return check_document(document, path)


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a document with one row per line; creates the folder if needed."""
    check_document(document)
    write_rows(path, document)


def write_rows(path: Path, document: dict[str, Any]) -> None:
    """Write a document of any kind as JSON with one of its "rows" per line; creates the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = {key: value for key, value in document.items() if key != "rows"}
    rows = ",\n".join("  " + json.dumps(row) for row in document["rows"])
    write_text(path, json.dumps(body, indent=1)[:-2] + f',\n "rows": [\n{rows}\n ]\n}}\n')


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The rows of a document as a table."""
    print_table([_cells(row) for row in rows])


def print_table(rows: list[dict[str, Any]]) -> None:
    """Rows with any columns as aligned text, with a line of headings; a row may lack columns of others."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def format_time(seconds: float) -> str:
    """Three digits with a suitable unit."""
    scale, unit = next(((s, u) for s, u in UNITS if seconds >= s), UNITS[-1])
    return f"{seconds / scale:.3g} {unit}" if seconds < 100 else f"{seconds:.0f} s"


def format_quality(row: dict[str, Any]) -> str:
    """Difference, accuracy and agreement, as far as they were measured."""
    parts = (
        [] if row["difference"] is None else [f"differs by {row['difference']:.1g}" if row["difference"] else "equal"]
    )
    if row["accuracy"] is not None:
        parts.append(f"accuracy {100 * row['accuracy']:.1f} %")
    if row["agree"] is not None:
        parts.append(f"{100 * row['agree']:.1f} % alike")
    return ", ".join(parts)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "case": row["case"],
        "shape": row["shape"],
        "variant": row["variant"],
        "dtype": row["dtype"],
        "threads": str(row["threads"]),
        "median": format_time(row["median_s"]),
        "IQR": format_time(row["iqr_s"]) if row["samples"] > 1 else "",
        "ratio": f"{row['ratio']:.2f}",
        "images/s": "" if row["images_per_s"] is None else f"{row['images_per_s']:.3g}",
        "roofline": "" if row["roofline"] is None else f"{100 * row['roofline']:.0f} %",
        "peak": "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f} MiB",
        "result": format_quality(row),
    }


def _git_commit() -> str:
    """The commit of the checkout that is running; of an installed package, its version."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return f"release {__version__}"
