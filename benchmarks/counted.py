"""Tables of what was counted and not timed: results/counted, by roofline.py and examples/coin_flip.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "counted"


def coin() -> str:
    """What two rules say of a coin, attack by attack."""
    document = _read("coin-flip")
    right, evaluated = document["right"], document["evaluate"]
    lines = ["| rule | candidates | says | expected |", "|---|---|---|---|"]
    for version, accuracy in document["autoattack"].items():
        for count, (attack, value) in enumerate(accuracy.items(), start=1):
            rule = f"AutoAttack, `{version}`" if attack == "clean" else ""
            step = "the images as they are" if attack == "clean" else f"and of {attack}"
            lines.append(f"| {rule} | {step} | {value:.2f} | {right}^{count} = {right**count:.2f} |")
    low, high = evaluated["mean_ci"]
    lines.append(f"| `evaluate` | all of `standard` | {evaluated['mean']:.2f} [{low:.2f}, {high:.2f}] | {right:.2f} |")
    return "\n".join(lines) + (
        f"\n\n{document['images']} images, {document['draws']} fresh draws of each for `evaluate` "
        "([coin-flip.json](../benchmarks/results/counted/coin-flip.json))."
    )


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


TABLES = {"coin": coin}
PAGES = {"docs/evaluation.md": ("coin",)}
