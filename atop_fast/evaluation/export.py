"""A report's verdicts as a table for other programs: CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .._core.files import write_text
from .verdict import Verdict

if TYPE_CHECKING:
    from .summary import Report

MEASURES = ("mean", "majority", "worst")
LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def write_csv(report: Report, path: str | Path) -> None:
    """Write the table of Report.to_csv, atomically."""
    header = ["verdict", "images", "draws", "complete"]
    for measure in MEASURES:
        header += [measure, f"{measure}_low", f"{measure}_high"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for name, verdict, complete in _rows(report):
        if verdict is None:
            writer.writerow([name, 0, "", complete, *[""] * 3 * len(MEASURES)])
            continue
        values = [v for m in MEASURES for v in (getattr(verdict, m), *getattr(verdict, f"{m}_ci"))]
        writer.writerow([name, verdict.images, verdict.draws, complete, *values])
    writer.writerow(["chance", report.clean.images, "", True, report.chance, *[""] * (3 * len(MEASURES) - 1)])
    write_text(Path(path), buffer.getvalue())


def format_latex(report: Report) -> str:
    """The table of Report.to_latex."""
    settings = report.settings
    lines = [
        f"% atop_fast {report.versions['atop_fast']}, {settings['norm']}, eps {settings['eps']:.6g}, seed "
        f"{settings['seed']}; accuracy with 95 % intervals over the images",
        r"\begin{tabular}{l" + "r" * (2 + len(MEASURES)) + "}",
        r"\toprule",
        r"verdict & images & draws & mean of draws & majority vote & worst of draws \\",
        r"\midrule",
    ]
    for name, verdict, complete in _rows(report):
        label = _escaped(name) + ("" if complete else " (incomplete)")
        cells = ["0", *["--"] * (1 + len(MEASURES))]
        if verdict is not None:
            cells = [str(verdict.images), str(verdict.draws)]
            for measure in MEASURES:
                low, high = getattr(verdict, f"{measure}_ci")
                cells.append(f"{getattr(verdict, measure):.3f} [{low:.3f}, {high:.3f}]")
        lines.append(" & ".join([label, *cells]) + r" \\")
    notes = [f"chance, by always naming the most frequent class: {report.chance:.3f}"]
    if not report.complete:
        notes.insert(0, "robust is an upper bound: not every attack reached every image")
    lines += [r"\midrule", *(rf"\multicolumn{{{3 + len(MEASURES)}}}{{l}}{{{note}}}\\" for note in notes)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _rows(report: Report) -> Iterator[tuple[str, Verdict | None, bool]]:
    """The name of each verdict, the verdict, and whether it covers every image and every attack that it stands for."""
    images = report.clean.images
    yield "clean", report.clean, True
    for name, verdict in report.attacks.items():
        yield name, verdict, verdict is not None and verdict.images == images
    yield "robust", report.robust, report.complete
    yield "robust, 8 bit", report.eight_bit, report.complete


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
