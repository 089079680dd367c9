"""Reports: a table for the terminal, report.json, report.html and a gallery of images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._core.files import write_atomic, write_text
from . import page
from .pictures import Rows, curve_picture, resubmission_picture
from .tracing import trace_picture

# A system's verdicts: "clean" and the attacks' names -> Verdict.to_dict(), or None if no image was attacked.
Verdicts = Mapping[str, Mapping[str, Any] | None]
MEASURES = (("mean", "mean of draws"), ("majority", "majority vote"), ("worst", "worst of K"))
EVALUATION_CAPTION = (
    "The first images, whatever became of them. Above a picture stands the class that the model assigns to it; of a "
    "defense, that is the classifier behind transform and purifier, and one draw of these is shown."
)
# Columns that only bound the robust accuracy, for a system with attacks that a budget cut.
BOUNDS = ("robust", "eight_bit")


def format_table(systems: Mapping[str, Verdicts], chance: float | None = None) -> str:
    """The mean accuracies with their 95 % intervals and, of random systems, the other two measures, as text.

    Args:
        systems: name -> Verdicts; in those that a budget cut, robust and eight_bit are marked as upper bounds.
        chance: see Report; a last line says it.
    """
    columns = list(next(iter(systems.values())))
    rows = [["system", *columns]]
    for name, verdicts in systems.items():
        images = _images(verdicts)
        bounds = BOUNDS if _is_cut(verdicts) else ()
        rows.append([name, *(("<= " if key in bounds else "") + _cell(v, images) for key, v in verdicts.items())])
        if is_random(verdicts):
            both = [f"{v['majority']:.3f} / {v['worst']:.3f}" if v else "" for v in verdicts.values()]
            rows.append(["  majority / worst", *both])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if chance is not None:
        lines.append(f"chance, by always naming the most frequent class: {chance:.3f}")
    return "\n".join(lines)


def is_random(verdicts: Verdicts) -> bool:
    """Whether a system is judged by several draws, so that the three measures differ."""
    return any(v is not None and v["draws"] > 1 for v in verdicts.values())


def _is_cut(verdicts: Verdicts) -> bool:
    """Whether a budget kept an attack from some of the images."""
    return any(v is None or v["images"] < _images(verdicts) for v in verdicts.values())


def _images(verdicts: Verdicts) -> int:
    """The number of images that a system is evaluated on; an attack that a budget cut has fewer."""
    return max(v["images"] for v in verdicts.values() if v)


def _cell(v: Mapping[str, Any] | None, images: int) -> str:
    if v is None:
        return f"0 of {images} attacked"
    cut = f" ({v['images']} of {images} attacked)" if v["images"] < images else ""
    return f"{v['mean']:.3f} [{v['mean_ci'][0]:.2f}, {v['mean_ci'][1]:.2f}]{cut}"


def _note(systems: Mapping[str, Verdicts]) -> str:
    """The numbers of images and draws of the columns; systems without randomness have one draw."""
    first = [next(v for v in verdicts.values() if v) for verdicts in systems.values()]
    names: dict[int, list[str]] = {}
    for name, v in zip(systems, first, strict=True):
        names.setdefault(v["draws"], []).append(name)
    images = f"{max(map(_images, systems.values()))} images, "
    if len(names) == 1:
        return f"{images}K = {first[0]['draws']} draws of each."
    return f"{images}K draws of each: " + "; ".join(f"K = {k} for {', '.join(of)}" for k, of in names.items()) + "."


def write_report(
    folder: Path,
    title: str,
    data: Mapping[str, Any],
    notes: Sequence[str] = (),
    picture: bytes | None = None,
    picture_caption: str = "",
    curves: bytes | None = None,
    repeat: str | None = None,
    rows: Rows = (),
    names: Sequence[str] = (),
    **sections: Any,
) -> None:
    """Write report.json, report.html and, with a picture, gallery.png; each atomically.

    Args:
        folder: an existing folder.
        title: heading of the page.
        data: the JSON: "seed", "threat_model", "systems" (name -> Verdicts), and other records of the run; further
            groups of systems under "findings" get a table of their own, and the sentences under "answer" come first.
        notes: paragraphs under the tables.
        picture, picture_caption: a PNG of the gallery, and its caption.
        curves: a PNG of the trainings' losses (see training_picture).
        repeat: a script that repeats the run.
        rows, names: the gallery on the page, and the true classes of its images; see page.gallery_table.
        sections: of the page: "cards" (label, value, note), "limits" (sentences), "facts" (name -> text), "per_class"
            (see page.per_class), "recipe" (text).
    """
    groups = {"Accuracy": data["systems"], "Findings": data.get("findings")}
    tables = [
        (heading, part, _note(part), max(map(_images, part.values()))) for heading, part in groups.items() if part
    ]
    bounds = {name: BOUNDS for _, part, *_ in tables for name, verdicts in part.items() if _is_cut(verdicts)}
    given = {"tables": tables, "bounds": bounds, "notes": notes, "repeat": repeat, **sections}
    given |= {"pictures": page.gallery_table(rows, names), "picture_caption": picture_caption}
    facts = {**sections.get("facts", {}), **page.circumstances(data["versions"])}
    given |= {"curves": page.base64_png(curves), "facts": facts}
    text = page.render(title, data, **given)
    write_text(folder / "report.json", json.dumps(data, indent=2) + "\n")
    write_text(folder / "report.html", text)
    if picture is not None:
        write_atomic(folder / "gallery.png", lambda path: path.write_bytes(picture))


def write_evaluation(
    folder: Path,
    title: str,
    report: Mapping[str, Any],
    rows: Rows = (),
    facts: Mapping[str, str] | None = None,
    repeat: str | None = None,
) -> None:
    """Write report.json, report.html and, if given, repeat.sh of one evaluation, each atomically.

    Args:
        folder: an existing folder.
        title: name of the evaluated model.
        report: Report.to_dict(); the JSON holds it beside "answer", "threat_model" and "systems", as other reports do.
        rows: of the gallery: the first images; see pictures.gallery_rows.
        facts: name -> text on model, data and others.
        repeat: a script that repeats the evaluation.
    """
    status, sentence = page.doctor_says(report["diagnostics"])
    data = {
        "answer": page.evaluation_answer(report),
        "doctor": {"status": status, "sentence": sentence},
        "seed": report["seed"],
        "threat_model": {"norm": report["norm"], "eps": report["eps"]},
        "systems": {title: {"clean": report["clean"], **report["attacks"]}},
        **report,
    }
    classes, samples = report["classes"], report["samples"]
    shown = len(rows[0][1]) if rows else 0
    pictures = {
        "curve": page.base64_png(curve_picture(report["curve"])) if report["curve"] else None,
        "tries": page.base64_png(resubmission_picture(report["resubmission"])) if report["draws"] > 1 else None,
        "trace": page.base64_png(trace_picture(report["trace"])) if report["trace"] else None,
        "pictures": page.gallery_table(rows, [page.class_name(s["label"], classes) for s in samples[:shown]]),
        "picture_caption": EVALUATION_CAPTION,
    }
    text = page.render(
        f"atop_fast evaluation: {title}",
        data,
        details=report,
        verdicts=_verdict_rows(report),
        measures=MEASURES if report["draws"] > 1 else (("mean", "accuracy"),),
        limits=page.limits(report),
        cards=_cards(report),
        per_class=page.per_class({title: samples}, classes),
        samples=page.sample_rows(samples, classes),
        facts={**(facts or {}), **page.circumstances(report["versions"])},
        repeat=repeat,
        **pictures,
    )
    write_text(folder / "report.json", json.dumps(data, indent=2) + "\n")
    write_text(folder / "report.html", text)
    if repeat is not None:
        write_text(folder / "repeat.sh", repeat)


def _verdict_rows(report: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """Label and verdict of each row of an evaluation's table, and whether it is an upper bound."""
    cut = not report["complete"]
    rows = [("no attack", report["clean"], False), *((name, v, False) for name, v in report["attacks"].items())]
    rows.append(("all attacks: each image's worst candidate", report["robust"], cut))
    return [*rows, ("the same, rounded to 8 bits", report["eight_bit"], cut)]


def _cards(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label, value and note of the numbers that a page begins with."""
    bound = "" if report["complete"] else "\u2264 "
    robust, clean = report["robust"], report["clean"]
    ends = "[{:.3f}, {:.3f}]"
    draws = f"mean of {report['draws']} fresh draws" if report["draws"] > 1 else "one fresh draw of each"
    if report["emulated"]["single_draw"]["sound"]:
        draws = "deterministic model"
    return [
        ("under attack", f"{bound}{robust['mean']:.3f}", ends.format(*robust["mean_ci"])),
        ("without an attack", f"{clean['mean']:.3f}", ends.format(*clean["mean_ci"])),
        ("chance", f"{report['chance']:.3f}", "the most frequent class"),
        ("images", f"{len(report['samples']):,}", draws),
    ]


def versions() -> dict[str, str]:
    """Versions that a report records."""
    from .. import __version__

    return {"atop_fast": __version__, "torch": torch.__version__}
