"""The summary of a run: whether the defense helps, by how much on the same images, and reasons for doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation.verdict import paired_interval

# The system that the others are compared with.
DEFENSE = "finetuned"


def paired_gains(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """How much more accurate the fine-tuned defense is than each other system, image by image.

    Args:
        reports: name -> Report.to_dict() of evaluations of the same images.

    Returns:
        name -> {"clean", "robust"} -> {"difference", "interval" (95 %), "accuracies" of both, "images"}; robust
        accuracies are of the images that every attack on both reached, and None where there are none.
    """
    return {
        name: {
            measure: _gain(reports[DEFENSE]["samples"], report["samples"], measure) for measure in ("clean", "robust")
        }
        for name, report in reports.items()
        if name != DEFENSE
    }


def _gain(own: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Any] | None:
    pairs = [
        (a[measure], b[measure])
        for a, b in zip(own, other, strict=True)
        if measure == "clean" or (a["attacked"] and b["attacked"])
    ]
    if not pairs:
        return None
    values: Tensor = torch.tensor(pairs, dtype=torch.float64)
    difference = values[:, 0] - values[:, 1]
    return {
        "difference": float(difference.mean()),
        "interval": list(paired_interval(difference)),
        "accuracies": values.mean(dim=0).tolist(),
        "images": len(pairs),
    }


def answer(
    gains: Mapping[str, Mapping[str, Any]], reports: Mapping[str, Mapping[str, Any]], protocol: str
) -> list[str]:
    """The sentences of the summary; the first gives the gain of the defense over the classifier alone."""
    gain, report = gains["classifier"], reports[DEFENSE]
    lines = [_robust(gain["robust"], protocol), f"Without an attack: {_compared(gain['clean'])}."]
    chance, low = report["chance"], report["robust"]["mean_ci"][0]
    lines.append(f"Always naming the most frequent class of these images would score {chance:.3f}.")
    if low <= chance:
        lines.append("The robust accuracy of the defense is not above that beyond doubt.")
    if not report["complete"]:
        lines.append("The budget ended before every attack reached every image: that accuracy is an upper bound.")
    for name, other in reports.items():
        lines += [f"{name}: {d['reason']}" for d in other["diagnostics"] if d["name"] == "constant"]
    return lines


def _robust(gain: Mapping[str, Any] | None, protocol: str) -> str:
    if gain is None:
        return "The budget ended before any image was attacked in both the classifier alone and the defense: no answer."
    low, high = gain["interval"]
    verb = "helps" if low > 0 else "harms" if high < 0 else "makes no difference that these images show"
    return f"The defense {verb}. Under attack (protocol {protocol}): {_compared(gain)}."


def _compared(gain: Mapping[str, Any]) -> str:
    own, other = gain["accuracies"]
    low, high = gain["interval"]
    return (
        f"accuracy {own:.3f} with the defense, {other:.3f} of the classifier alone, {gain['difference']:+.3f} "
        f"[{low:+.3f}, {high:+.3f}] on the same {gain['images']:,} images"
    )
