"""Writes the tables of the README and the docs from the committed result files: python benchmarks/readme.py"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Rows of these files that the README shows: op, direction, shape, dtype, layout (or the loss). What stands in the
# second file was measured after the first.
OPS_FILES = ("ops", "attack-ops")
OPS = (
    ("corrupt", "forward", "64x3x32x32", "float32", "nchw"),
    ("corrupt", "both", "64x3x32x32", "float32", "nchw"),
    ("corrupt", "both", "64x3x256x256", "float32", "nchw"),
    ("corrupt", "both", "64x3x32x32 to 256x256", "float32", "nchw"),
    ("random_resize_pad", "both", "16x3x224x224 to 256x256", "float32", "nchw"),
    ("pgd_step_linf", "forward", "64x3x32x32", "float32", "nchw"),
    ("pgd_step_linf", "forward", "64x3x256x256", "float32", "nchw"),
    ("pgd_step_l2", "forward", "64x3x32x32", "float32", "nchw"),
    ("pgd_step_l2", "forward", "64x3x256x256", "float32", "nchw"),
    ("apgd_step_linf", "forward", "64x3x32x32", "float32", "nchw"),
    ("attack_loss", "both", "512x10", "float32", "ce"),
    ("attack_loss", "both", "512x1000", "float32", "ce"),
    ("attack_loss", "both", "512x10", "float32", "dlr"),
    ("attack_loss", "both", "512x1000", "float32", "dlr"),
    ("conv3x3", "both", "64x64x32x32", "float32", "nhwc"),
    ("gated_elu", "both", "8x96x128x128", "float32", "nchw"),
    ("gated_elu", "both", "8x96x128x128", "float32", "nhwc"),
    ("gated_elu", "both", "8x96x128x128", "bfloat16", "nhwc"),
    ("gated_elu", "both", "8x96x128x128", "float16", "nchw"),
)


def demo() -> str:
    """Mean accuracies with their 95 % intervals, of the first recorded run."""
    document = json.loads((RESULTS / "demo--cpu.json").read_text())
    run, *others = document["runs"]
    config = run["config"]
    attacks = {"clean": "no attack", "fgsm": "FGSM", "pgd20_eot": "PGD-20 with EOT"}
    lines = ["| system | " + " | ".join(attacks.values()) + " |", "|---|" + "---|" * len(attacks)]
    for name, verdicts in {**run["systems"], **run["findings"]}.items():
        lines.append(f"| `{name}` | " + " | ".join(_accuracy(verdicts[attack]) for attack in attacks) + " |")
    seconds = ", ".join(str(r["seconds"]) for r in (run, *others))
    return (
        f"Accuracy of one draw on {config['test_images']} digits, mean of {config['draws']} fresh draws, with 95 % "
        f"intervals; Linf, eps {config['eps']}:\n\n" + "\n".join(lines) + "\n\n"
        f"{_source(document)} Seed {run['seed']} is shown; seeds {', '.join(str(r['seed']) for r in others)} tell the "
        f"same ([demo--cpu.json](benchmarks/results/demo--cpu.json)). Times of the three runs: {seconds} s."
    )


def attacks() -> str:
    """Attacks end to end against the originals, with what each found."""
    documents = [json.loads((RESULTS / f"{name}--cpu.json").read_text()) for name in ("attacks", "autoattack")]
    lines = [
        "| work | ours | against | faster | accuracy, theirs and ours | judged alike |",
        "|---|---|---|---|---|---|",
    ]
    for document in documents:
        for row in document["rows"]:
            if row["variant"] in document["versions"]:
                peer = row
                continue
            both = f"{100 * peer['accuracy']:.1f} %, {100 * row['accuracy']:.1f} %"
            lines.append(
                f"| {row['case']} | {row['variant']} | {peer['variant']} | {row['ratio']:.1f}x | {both} "
                f"| {100 * row['agree']:.1f} % |"
            )
    versions = documents[0]["versions"]
    peers = ", ".join(f"{peer} {versions[peer]}" for peer in ("torchattacks", "pyautoattack"))
    names = ("attacks--cpu.json", "autoattack--cpu.json")
    files = ", ".join(f"[{name}](benchmarks/results/{name})" for name in names)
    return "\n".join(lines) + f"\n\n{_source(documents[0])} Peers: {peers}. Files: {files}."


def ops() -> str:
    """Speed-ups of the C++ kernels over eager mode and torch.compile."""
    documents = [json.loads((RESULTS / f"{name}--cpu.json").read_text()) for name in OPS_FILES]
    keys = ("op", "direction", "shape", "dtype", "layout")
    rows = {
        tuple(row[k] for k in keys): row
        for document in documents
        for row in document["rows"]
        if row["backend"] == "cpp"
    }
    lines = [
        "| op | work | shape | type, layout | against eager | against torch.compile |",
        "|---|---|---|---|---|---|",
    ]
    for key in OPS:
        row = rows[key]
        work = {"forward": "forward", "both": "forward + backward"}[row["direction"]]
        compiled = f"{row['speedup_vs_compile']:.1f}x" if row["speedup_vs_compile"] else "not measured"
        lines.append(
            f"| `{row['op']}` | {work} | {row['shape']} | {row['dtype']}, {row['layout'].upper()} "
            f"| {row['speedup_vs_eager']:.1f}x | {compiled} |"
        )
    sources = [
        f"[{name}--cpu.json](benchmarks/results/{name}--cpu.json): {_source(document)}"
        for name, document in zip(OPS_FILES, documents, strict=True)
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(sources)


# Rows of the three runs that docs/transforms.md shows, with the targets that were set: against eager and compile.
TRANSFORMS = (
    ("corrupt", "forward", "64x3x32x32", 15, 35),
    ("corrupt", "both", "64x3x32x32", 17, 30),
    ("corrupt", "forward", "64x3x256x256", 10, 35),
    ("corrupt", "both", "64x3x256x256", 10, 30),
    ("corrupt", "forward", "64x3x32x32 to 256x256", 12, 35),
    ("corrupt", "both", "64x3x32x32 to 256x256", 9, 30),
    ("random_normal", "forward", "64x3x32x32", 15, None),
    ("random_normal", "forward", "64x3x256x256", 15, None),
)


def transforms() -> str:
    """Speed-ups in three runs beside the targets, for float32."""
    names = ("ops", "transforms-2", "transforms-3")
    documents = [json.loads((RESULTS / f"{name}--cpu.json").read_text()) for name in names]
    peers = ("eager", "compile", "torchvision", "kornia")
    lines = [
        "| op | work | shape | eager (target) | compile (target) | torchvision | kornia | share of copy bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for op, direction, shape, *targets in TRANSFORMS:
        runs = [_variants(document, op, direction, shape) for document in documents]
        cells = [", ".join(_times(run, peer) for run in runs) if peer in runs[0] else "" for peer in peers]
        for i, target in enumerate(targets):
            cells[i] += f" (>= {target})" if target else ""
        share = ", ".join(
            f"{run[document['owners'][op]]['pct_copy']} %" for run, document in zip(runs, documents, strict=True)
        )
        work = {"forward": "forward", "both": "forward + backward"}[direction]
        lines.append(f"| `{op}` | {work} | {shape} | " + " | ".join(cells) + f" | {share} |")
    return "\n".join(lines) + f"\n\n{_source(documents[0])} Three runs."


def limits() -> str:
    """What the time of corrupt is made of, in microseconds, with 1 and with 2 threads."""
    document = json.loads((RESULTS / "limits--cpu.json").read_text())
    table: dict[str, dict[str, list[str]]] = {}
    for row in document["rows"]:
        cells = table.setdefault(row["part"], {}).setdefault(row["shape"], [])
        cells.append(f"{row['median_us']:.0f}")
    shapes = list(next(iter(table.values())))
    lines = ["| part | " + " | ".join(shapes) + " |", "|---|" + "---|" * len(shapes)]
    for part, cells in table.items():
        lines.append(f"| {part} | " + " | ".join(", ".join(cells[shape]) for shape in shapes) + " |")
    return "\n".join(lines) + f"\n\n{_source(document).replace('2 threads', '1 and 2 threads')}"


def faults() -> str:
    """Kinds of faults, how often each was brought about, and what came of it."""
    document = json.loads((RESULTS / "reliability--cpu.json").read_text())
    rows = faults_by_kind(document["rows"])
    lines = ["| fault | run | injected | how it ended | lost at most | ended equal |", "|---|---|---|---|---|---|"]
    for row in rows:
        equal = f"{row['equal']} of {row['count']}"
        cells = (row["fault"], row["task"], row["count"], row["ended"], row["lost_most"], equal)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    total, right = (sum(row[key] for row in rows) for key in ("count", "right"))
    repeat = "; ".join(f"`{command}`" for command in document["commands"])
    heading = f"{total} faults, {right} of them with the right outcome:"
    return "\n".join([heading, "", *lines, "", f"{_source(document)} The commands: {repeat}."])


def faults_by_kind(faults: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind of fault, of the outcomes that benchmarks/faults.py records."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
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


def numerics() -> str:
    """attack_loss against float64, attacks in lower precision, and the determinism matrix."""
    document = json.loads((RESULTS / "numerics--cpu.json").read_text())
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        parts.setdefault(row["part"], []).append({key: value for key, value in row.items() if key != "part"})
    matrix = parts["determinism"]
    flags = sum(row["flags"] for row in matrix)
    settings = {
        key: sorted({row[key] for row in matrix}) for key in ("backend", "batch", "order", "processes", "threads")
    }
    varied = "; ".join(f"{key}: {', '.join(map(str, values))}" for key, values in settings.items())
    others = sum(row["other flags"] for row in matrix)
    return "\n\n".join(
        (
            "Largest relative errors, in units of the result's eps (2^-23; float64: 2^-52):",
            _markdown(parts["losses"]),
            "Attacks whose networks run in lower precision, judged in float32; 95 % intervals:",
            _markdown(parts["strength"]),
            f"Determinism: {len(matrix)} settings ({varied}), {flags} flags, {others} of them other than the first "
            f"setting's.",
            _repeat(document),
        )
    )


def load() -> str:
    """Memory, threads and workers."""
    document = json.loads((RESULTS / "load--cpu.json").read_text())
    memory = [row for row in document["rows"] if "MiB" in row]
    equal = [row for row in document["rows"] if "MiB" not in row]
    keys = list(dict.fromkeys(key for row in equal for key in row))
    equal = [{key: row.get(key, "") for key in keys} for row in equal]
    return "\n\n".join((_markdown(memory), _markdown(equal), _repeat(document)))


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in rows)])


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value[0]:.3f} to {value[1]:.3f}"
        if isinstance(value, list)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )


def _repeat(document: dict[str, Any]) -> str:
    return f"{_source(document)} Repeat: `{document['command']}`."


def _variants(document: dict[str, Any], op: str, direction: str, shape: str) -> dict[str, dict[str, Any]]:
    wanted = (op, direction, shape, "float32")
    keys = ("op", "direction", "shape", "dtype")
    found = {row["backend"]: row for row in document["rows"] if tuple(row[key] for key in keys) == wanted}
    return {**found, "ours": found[document["owners"][op]]}


def _times(run: dict[str, dict[str, Any]], peer: str) -> str:
    return f"{run[peer]['median_us'] / run['ours']['median_us']:.1f}"


def filled(text: str, name: str) -> str:
    """`text` with the table `name`, one of TABLES, between its two comments."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}{TABLES[name]()}\n{end}{after}"


def _accuracy(verdict: dict[str, Any]) -> str:
    low, high = verdict["mean_ci"]
    return f"{verdict['mean']:.2f} [{low:.2f}, {high:.2f}]"


def _source(document: dict[str, Any]) -> str:
    return (
        f"Measured {document['date']} on {document['device']}, {document['threads']} threads, "
        f"torch {document['versions']['torch']}, commit {document['commit'][:12]}."
    )


TABLES = {
    "demo": demo,
    "attacks": attacks,
    "ops": ops,
    "transforms": transforms,
    "limits": limits,
    "faults": faults,
    "numerics": numerics,
    "load": load,
}
# Where the tables stand.
PAGES = {
    "README.md": ("demo", "attacks", "ops"),
    "docs/transforms.md": ("transforms", "limits"),
    "docs/reliability.md": ("faults", "numerics", "load"),
}


if __name__ == "__main__":
    for page, tables in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for table in tables:
            text = filled(text, table)
        (ROOT / page).write_text(text, encoding="utf-8")
