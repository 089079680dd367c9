"""The tables of docs/reliability.md, of the documents that faults.py, numerics.py and load.py write."""

from __future__ import annotations

from collections import Counter
from typing import Any

Rows = list[dict[str, Any]]


def faults(document: dict[str, Any]) -> str:
    """Kinds of faults, how often each was brought about, and what came of it."""
    rows = faults_by_kind(document["rows"])
    cells = [
        {
            "fault": row["fault"],
            "run": row["task"],
            "injected": row["count"],
            "how it ended": row["ended"],
            "lost at most": row["lost_most"],
            "ended equal": f"{row['equal']} of {row['count']}",
        }
        for row in rows
    ]
    total, right = (sum(row[key] for row in rows) for key in ("count", "right"))
    return f"{total} faults, {right} of them with the right outcome:\n\n{_table(cells)}\n\n`{document['command']}`"


def faults_by_kind(faults: Rows) -> Rows:
    """A row for each kind of fault, of the outcomes that faults.py records."""
    groups: dict[tuple[str, str], Rows] = {}
    for fault in faults:
        groups.setdefault((fault["task"], fault["fault"]), []).append(fault)
    return [
        {
            "task": task,
            "fault": name,
            "count": len(group),
            "ended": ", ".join(f"{end} {count}" for end, count in sorted(Counter(f["ended"] for f in group).items())),
            "lost_most": max(fault["lost"] for fault in group),
            "equal": sum(fault["equal"] for fault in group),
            "right": sum(fault["right"] for fault in group),
        }
        for (task, name), group in groups.items()
    ]


def numerics(document: dict[str, Any]) -> str:
    """attack_loss against float64, attacks in lower precision, and the determinism matrix."""
    parts: dict[str, Rows] = {}
    for row in document["rows"]:
        parts.setdefault(row["part"], []).append({key: value for key, value in row.items() if key != "part"})
    matrix = parts["determinism"]
    keys = ("backend", "batch", "order", "processes", "threads")
    varied = "; ".join(f"{key}: {', '.join(map(str, sorted({row[key] for row in matrix})))}" for key in keys)
    total, others, bits = (
        sum(row[key] for row in matrix) for key in ("flags", "other flags", "images with other bits")
    )
    return "\n\n".join(
        (
            "Largest relative errors of any backend, in units of the result's eps (2^-23; float64: 2^-52):",
            _table(_worst(parts["losses"])),
            "Attacks whose networks run in lower precision, judged in float32; 95 % intervals:",
            _table(parts["strength"]),
            f"Determinism: {len(matrix)} settings ({varied}). {others} of {total} flags are other than the first "
            f"setting's; {bits} adversarial images differ from it in some bit.",
        )
    )


def _worst(rows: Rows) -> Rows:
    """The largest errors over the backends, which every row leaves out."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        kept = worst.setdefault((row["loss"], row["dtype"]), {k: v for k, v in row.items() if k != "backend"})
        kept.update({key: max(kept[key], value) for key, value in row.items() if isinstance(value, float)})
    return list(worst.values())


def load(document: dict[str, Any]) -> str:
    """Memory, threads and workers."""
    memory = [row for row in document["rows"] if "MiB" in row]
    equal = [row for row in document["rows"] if "MiB" not in row]
    keys = list(dict.fromkeys(key for row in equal for key in row))
    return _table(memory) + "\n\n" + _table([{key: row.get(key, "") for key in keys} for row in equal])


def mutations(document: dict[str, Any]) -> str:
    """Deliberate mistakes in ops, and the first test that fails because of each."""
    rows = document["rows"]
    cells = [
        {
            "op family": row["family"],
            "mistake": row["mistake"],
            "in": f"`{row['file']}` ({row['layer']})",
            "fast tier": row["outcome"],
            "first failure": f"`{row['test'].partition('::')[2] or row['test']}`" if row["test"] else "",
        }
        for row in sorted(rows, key=lambda row: row["family"])
    ]
    caught = sum(row["outcome"] == "caught" for row in rows)
    return f"{len(rows)} mutations, {caught} of them caught:\n\n{_table(cells)}\n\n`{document['command']}`"


def _table(rows: Rows) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row.values())) + " |" for row in rows)])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " to ".join(f"{each:.3f}" for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
