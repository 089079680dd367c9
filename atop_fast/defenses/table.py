"""The table of defenses: its rows by name, what they claim and what is true, and the table as CSV and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .._core.checks import message
from ..defense import Defense
from ..doctor import CHECKS
from ..doctor.masking import GAIN
from ..randomness import seeded
from ..transforms import RT1, RT2, RT3, RandomResizePad, RandomTransform
from .bilateral import NoisyBilateral
from .filters import FilterDraw, ResidualFilters
from .jpeg import JPEG
from .layers import ActivationPruning, SelfEnsemble, WinnersTakeAll
from .noise import GaussianNoise
from .series import RandomSeries
from .smooth import TotalVariation

# A defense of a classifier, for images of a shape (C, H, W).
Build = Callable[[nn.Module, Sequence[int]], nn.Module]


def _before(transform: Callable[[Sequence[int]], RandomTransform]) -> Build:
    """A transform in front of the classifier."""
    return lambda model, shape: Defense(transform(shape), None, model)


def _inside(wrap: Callable[[nn.Module], nn.Module]) -> Build:
    """A classifier with other layers."""
    return lambda model, shape: Defense(GaussianNoise(0), None, wrap(model))


def _resize_pad(shape: Sequence[int]) -> RandomResizePad:
    """Frames of the images' size, in which they shrink to 13 / 16 at most: to 26 of 32 pixels."""
    _, height, width = shape
    if height != width:
        raise ValueError(message("judge", "images", "square for resize-pad", f"{height}x{width} pixels"))
    return RandomResizePad(max(1, round(height * 13 / 16)), height)


def _filters(model: nn.Module, shape: Sequence[int]) -> Defense:
    with seeded(0):
        return Defense(FilterDraw(4), ResidualFilters(4, shape[0]), model)


# The first row is the classifier alone. Patches and filters have sizes that suit 32x32 pixels.
ALONE = "none"
DEFENSES: dict[str, Build] = {
    ALONE: lambda model, shape: model,
    "noise": _before(lambda shape: GaussianNoise(0.1)),
    "resize-pad": _before(_resize_pad),
    "series": _before(lambda shape: RandomSeries(5)),
    "bilateral": _before(lambda shape: NoisyBilateral(0.06, repeats=20)),
    "filters": _filters,
    "jpeg": _before(lambda shape: JPEG(75)),
    "random-jpeg": _before(lambda shape: JPEG((30, 90))),
    "variation": _before(lambda shape: TotalVariation()),
    "rt1": _before(lambda shape: RT1(4)),
    "rt2": _before(lambda shape: RT2(4, sigma=0.06)),
    "rt3": _before(lambda shape: RT3(4, sigma=0.06)),
    "self-ensemble": _inside(lambda model: SelfEnsemble(model, 0.1, 0.05)),
    "pruning": _inside(ActivationPruning),
    "winners": _inside(WinnersTakeAll),
}
# The numbers that papers report.
CLAIMS = ("standard", "rand", "blind")
# Mark, color and legend of what the picture shows beside the sound verdict; colors are Wong's.
MARKS = {
    "clean": ("|", "#000000", "no attack"),
    "standard": ("x", "#d55e00", "AutoAttack standard, one draw"),
    "rand": ("+", "#d55e00", "AutoAttack rand, one draw"),
    "blind": ("v", "#e69f00", "attack on the classifier alone"),
}
INTERVALS = ("clean", "standard", "rand", "sound", "majority")
COLUMNS = (
    *("defense", "model", "images", "draws"),
    *(f"{name}{end}" for name in ("clean", "standard", "rand") for end in ("", "_low", "_high")),
    *("blind", "bpda", "exact", "square"),
    *(f"{name}{end}" for name in ("sound", "majority") for end in ("", "_low", "_high")),
    *("one_try", "all_tries", "failed", "warned", "truth", "seconds"),
)


def truth(row: Mapping[str, Any], alone: float) -> str | None:
    """The truth about a row, given `alone`, the sound accuracy of the classifier without a defense.

    - "sound": the sound accuracy is at least `alone` + GAIN; also the row of the classifier itself.
    - "illusion": the sound accuracy is lower, but one of CLAIMS is at least `alone` + GAIN.
    - "no claim": neither.

    None for a row without a sound verdict, and for an unsound one without any of the CLAIMS.
    """
    if "sound" not in row:
        return None
    # Shares of images and draws are often exactly GAIN apart, up to rounding.
    least = alone + GAIN - 1e-9
    if row["defense"] == ALONE or row["sound"] >= least:
        return "sound"
    claims = [row[name] for name in CLAIMS if name in row]
    if not claims:
        return None
    return "illusion" if max(claims) >= least else "no claim"


def alarms(row: Mapping[str, Any], status: str = "fail") -> list[str]:
    """The doctor's checks that fail on a row, or warn."""
    return [name for name, found in row.get("findings", {}).items() if found == status and name in CHECKS]


def truths(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """`truth` of each row; None without a finished row of the classifier alone."""
    alone = [row["sound"] for row in rows if row["defense"] == ALONE and "sound" in row]
    return [truth(row, alone[0]) if alone else None for row in rows]


def confusion(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """For each truth, the names of the rows that the doctor flags, by a check that fails, and of the others.

    The doctor misses the illusions that are not flagged; sound rows that are flagged are its false alarms. Flags on
    rows without a claim are neither: such a defense adds nothing, as the check useless_transform says.
    """
    table: dict[str, dict[str, list[str]]] = {
        kind: {"flagged": [], "not flagged": []} for kind in ("illusion", "sound", "no claim")
    }
    for row, kind in zip(rows, truths(rows), strict=True):
        if kind is not None:
            table[kind]["flagged" if alarms(row) else "not flagged"].append(row["defense"])
    return table


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV with the columns COLUMNS; cells of rules that are not finished are empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row, kind in zip(rows, truths(rows), strict=True):
        ends = {f"{n}_{end}": row[f"{n}_ci"][i] for n in INTERVALS if n in row for i, end in enumerate(("low", "high"))}
        tries = {"one_try": row["tries"][0], "all_tries": row["tries"][1]} if "tries" in row else {}
        found = {"failed": " ".join(alarms(row)), "warned": " ".join(alarms(row, "warn")), "truth": kind or ""}
        writer.writerow({**row, **ends, **tries, **found, "seconds": round(sum(row["seconds"].values()))})
    return buffer.getvalue()


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A picture of the finished rows, one line each: clean accuracy, the claims, and the sound verdict; a PNG."""
    import matplotlib.figure

    rows = [row for row in rows if "sound" in row]
    heights = [-rank for rank in range(len(rows))]
    figure = matplotlib.figure.Figure(figsize=(7.5, 1.4 + 0.3 * len(rows)), layout="constrained")
    axes: Any = figure.subplots()
    for name, (mark, color, label) in MARKS.items():
        points = [(row[name], height) for row, height in zip(rows, heights, strict=True) if name in row]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=mark, s=36, color=color, label=label)
    sound = [row["sound"] for row in rows]
    ends = [[abs(row["sound_ci"][end] - row["sound"]) for row in rows] for end in (0, 1)]
    label = "fresh draws, strongest attacks, 95 %"
    axes.errorbar(sound, heights, xerr=ends, fmt="o", color="#0072b2", markersize=5, label=label)
    axes.set_yticks(heights, [row["defense"] for row in rows])
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("accuracy")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
