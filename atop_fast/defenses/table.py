"""The table of defenses: its rows by name, what they claim and what is true, and the table as CSV and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..defense import Defense
from ..doctor import CHECKS
from ..randomness import seeded
from ..transforms import RT1, RT2, RT3, RandomResizePad
from .bilateral import NoisyBilateral
from .filters import FilterDraw, ResidualFilters
from .jpeg import JPEG
from .layers import ActivationPruning, SelfEnsemble, WinnersTakeAll
from .noise import GaussianNoise
from .series import RandomSeries
from .smooth import TotalVariation

# The first row is the classifier alone. Sizes suit 32x32 pixels.
ALONE = "none"
DEFENSES: dict[str, Callable[[nn.Module], nn.Module]] = {
    ALONE: lambda model: model,
    "noise": lambda model: Defense(GaussianNoise(0.1), None, model),
    "resize-pad": lambda model: Defense(RandomResizePad(26, 32), None, model),
    "series": lambda model: Defense(RandomSeries(5), None, model),
    "bilateral": lambda model: Defense(NoisyBilateral(0.06, repeats=20), None, model),
    "filters": lambda model: Defense(FilterDraw(4), _filters(), model),
    "jpeg": lambda model: Defense(JPEG(75), None, model),
    "random-jpeg": lambda model: Defense(JPEG((30, 90)), None, model),
    "variation": lambda model: Defense(TotalVariation(), None, model),
    "rt1": lambda model: Defense(RT1(4), None, model),
    "rt2": lambda model: Defense(RT2(4, sigma=0.06), None, model),
    "rt3": lambda model: Defense(RT3(4, sigma=0.06), None, model),
    "self-ensemble": lambda model: Defense(GaussianNoise(0), None, SelfEnsemble(model, 0.1, 0.05)),
    "pruning": lambda model: Defense(GaussianNoise(0), None, ActivationPruning(model)),
    "winners": lambda model: Defense(GaussianNoise(0), None, WinnersTakeAll(model)),
}
# A gain of accuracy that counts: what the doctor demands of a transform, too.
GAIN = 0.1
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


def _filters() -> nn.Module:
    with seeded(0):
        return ResidualFilters(4)


def truth(row: Mapping[str, Any], alone: float) -> str | None:
    """The truth about a row, given `alone`, the sound accuracy of the classifier without a defense.

    - "sound": the sound accuracy is at least `alone` + GAIN; also the row of the classifier itself.
    - "illusion": the sound accuracy is lower, but one of CLAIMS is at least `alone` + GAIN.
    - "no claim": neither.

    None for a row without a sound verdict, and for an unsound one without any of the CLAIMS.
    """
    if "sound" not in row:
        return None
    if row["defense"] == ALONE or row["sound"] - alone >= GAIN:
        return "sound"
    claims = [row[name] for name in CLAIMS if name in row]
    if not claims:
        return None
    return "illusion" if max(claims) - alone >= GAIN else "no claim"


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
    heights = [-place for place in range(len(rows))]
    figure = matplotlib.figure.Figure(figsize=(7.5, 1.4 + 0.3 * len(rows)), layout="constrained")
    axes: Any = figure.subplots()
    for name, (mark, color, label) in MARKS.items():
        places = [(row[name], height) for row, height in zip(rows, heights, strict=True) if name in row]
        if places:
            axes.scatter(*zip(*places, strict=True), marker=mark, s=36, color=color, label=label)
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
