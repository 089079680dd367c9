"""The table of defenses: files of `atop-fast judge`, one for each classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _results import RESULTS

from atop_fast._core.files import write_text
from atop_fast.defenses.table import alarms, draw, to_csv, truths

# Result file -> the classifier that is defended.
FILES = {
    "judge-standard--cpu": "The standard classifier",
    "judge-nfgsm--cpu": "The classifier trained by N-FGSM",
}
NOTHING = "No result is published yet; the commands above make the table."
ATTACKS = ("blind", "bpda", "exact", "square")
HEAD = ("defense", "clean", "standard", "rand", *ATTACKS, "sound", "majority", "all tries", "doctor", "verdict")
WORDS = {"sound": "sound", "illusion": "**illusion**", "no claim": "no claim", None: ""}


def documents() -> dict[str, dict[str, Any]]:
    """The committed files by name."""
    paths = {name: RESULTS / f"{name}.json" for name in FILES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def judged() -> str:
    """Picture, table and confusion of every file."""
    return "\n\n".join(section(name, document) for name, document in documents().items()) or NOTHING


def section(name: str, document: dict[str, Any]) -> str:
    """The section of the page on one classifier."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for row, kind in zip(document["rows"], truths(document["rows"]), strict=True):
        cells = [row["defense"], *(interval(row, rule) for rule in ("clean", "standard", "rand"))]
        cells += [f"{row[attack]:.2f}" if attack in row else "" for attack in ATTACKS]
        cells += [interval(row, "sound"), interval(row, "majority")]
        cells.append(f"{row['tries'][-1]:.2f}" if "tries" in row else "")
        warned = ", ".join(alarms(row, "warn"))
        cells.append(", ".join(alarms(row)) + (f" ({warned})" if warned else ""))
        lines.append(f"| {' | '.join([*cells, WORDS[kind]])} |")
    settings, machine = document["settings"], f"{document['threads']} thread(s) of {document['device']}"
    hours = sum(sum(row["seconds"].values()) for row in document["rows"]) / 3600
    files = ", ".join(f"[{name}.{kind}](../benchmarks/results/{name}.{kind})" for kind in ("json", "csv"))
    return "\n".join(
        [
            f"### {FILES[name]}\n",
            f"![Accuracy by every rule for each defense]({name.partition('--')[0]}.png)\n",
            *lines,
            f"\n{settings['images']} images, eps {settings['eps']:.4g}, seed {settings['seed']}; 95 % intervals. "
            f"Attacks and verdicts took {hours:.1f} hours of {machine}, torch {document['versions']['torch']}, commit "
            f"{document['commit'][:12]}. Files: {files}.\n",
            *confusion_table(document["confusion"]),
        ]
    )


def interval(row: dict[str, Any], name: str) -> str:
    """An accuracy with its interval."""
    if name not in row:
        return ""
    low, high = row[f"{name}_ci"]
    return f"{row[name]:.2f} [{low:.2f}, {high:.2f}]"


def confusion_table(table: dict[str, dict[str, list[str]]]) -> list[str]:
    """The numbers and names of the rows that the doctor flags, and of the others, as a Markdown table."""
    lines = ["| | flagged by the doctor | not flagged |", "|---|---|---|"]
    for kind, names in table.items():
        cells = [f"{len(names[key])}: {', '.join(names[key])}".rstrip(": ") for key in ("flagged", "not flagged")]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def write_files(docs: Path) -> None:
    """The pictures of the page, and the CSV files."""
    for name, document in documents().items():
        draw(document["rows"], docs / f"{name.partition('--')[0]}.png")
        write_text(RESULTS / f"{name}.csv", to_csv(document["rows"]))
