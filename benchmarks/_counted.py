"""Tables of what was counted and not timed: results/counted, by roofline.py and examples/coin_flip.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "counted"


def coin() -> str:
    """The verdicts of two rules on a coin, attack by attack."""
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


def headline() -> str:
    """A description of the library, with the verdicts on the coin after all attacks of AutoAttack's `standard`."""
    document = _read("coin-flip")
    right, evaluated = document["right"], document["evaluate"]
    accuracies = list(document["autoattack"]["standard"].values())
    low, high = evaluated["mean_ci"]
    return (
        "A PyTorch library that evaluates random defenses soundly, and trains them by adversarial training on "
        "purification (AToP, ICLR 2024).\n"
        f"A coin that is right in {100 * right:.0f} % of its calls, which no attack can change, is expected to score "
        f"**{right ** len(accuracies):.2f}** under AutoAttack's\nrule and **{right:.2f}** here. Measured on "
        f"{document['images']} images: {accuracies[-1]:.2f}, and {evaluated['mean']:.2f} [{low:.2f}, {high:.2f}]."
    )


def roofline() -> str:
    """The predicted costs of workloads on an H200."""
    document = _read("roofline--h200")
    lines = [
        "| workload | images | networks in | PFLOP | terabytes | launches, millions | floor | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        cells = (row["workload"], row["images"], row["precision"], f"{row['pflop']:g}", f"{row['terabytes']:g}")
        times = " | ".join(_time(row[key]) for key in ("floor_s", "predicted_s"))
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['launches'] / 1e6:.1f} | {times} |")
    return "\n".join(lines) + "\n\nFile: [roofline--h200.json](../benchmarks/results/counted/roofline--h200.json)."


def constants() -> str:
    """The rates that the roofline assumes."""
    rates = _read("roofline--h200")["constants"]
    lines = ["| | datasheet | sustained |", "|---|---|---|"]
    for name in ("bfloat16", "float32"):
        peak, sustained = rates[name]["peak_tflops"], rates[name]["sustained_tflops"]
        lines.append(f"| products in {name} | {peak:g} TFLOP/s | {sustained:g} TFLOP/s |")
    peak, sustained = rates["memory"]["peak_tbps"], rates["memory"]["sustained_tbps"]
    lines.append(f"| memory, read and written | {peak:g} TB/s | {sustained:g} TB/s |")
    return "\n".join(lines)


def deepfill() -> str:
    """DeepFillV2 as published and here."""
    costs = _read("roofline--h200")["deepfill_v2"]
    published, ours, checkpointed = (costs[name] for name in ("published", "ours", "checkpointed"))
    transposed = "a transposed convolution, exactly ([upsample_conv3x3](math.md#upsample_conv3x3))"
    gram = "a Gram matrix and sums along diagonals, exactly ([contextual_attention](math.md#contextual_attention))"
    gate = "the gate keeps its input alone and adds the bias itself ([gated](math.md#gated))"
    rows = (
        ("up-sampling and convolution, 4 layers", "upsampling_gflop", "GFLOP", transposed),
        ("contextual attention", "attention_gflop", "GFLOP", gram),
        ("whole forward pass", "forward_gflop", "GFLOP", ""),
        ("forward and backward", "both_gflop", "GFLOP", ""),
        ("kept for the backward pass, float32", "float32_mb", "MB", gate),
        ("the same, bfloat16, its copies of the weights included", "bfloat16_mb", "MB", ""),
    )
    lines = ["| | as published | here | how |", "|---|---|---|---|"]
    lines += [f"| {what} | {published[key]} {unit} | {ours[key]} {unit} | {how} |" for what, key, unit, how in rows]
    what, again = "the same, float32, `checkpointing=True`", f"{checkpointed['both_gflop']} GFLOP forward and backward"
    lines.append(f"| {what} | | {checkpointed['float32_mb']} MB | {again} |")
    return "\n".join(lines) + "\n\nFile: [roofline--h200.json](../benchmarks/results/counted/roofline--h200.json)."


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 180 else f"{seconds / 60:.3g} min"


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


TABLES = {"headline": headline, "coin": coin, "roofline": roofline, "constants": constants, "deepfill": deepfill}
PAGES = {
    "docs/evaluation.md": ("coin",),
    "docs/purifiers.md": ("deepfill",),
    "docs/roofline.md": ("constants", "roofline"),
}
