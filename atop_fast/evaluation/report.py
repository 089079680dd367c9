"""Reports: a table for the terminal, report.json, report.html and a gallery of images."""

from __future__ import annotations

import base64
import importlib.resources
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._core.files import write_atomic, write_text
from .tracing import trace_picture

# A system's verdicts: "clean" and the attacks' names -> Verdict.to_dict(), or None if no image was attacked.
Verdicts = Mapping[str, Mapping[str, Any] | None]
MEASURES = (("mean", "mean of draws"), ("majority", "majority vote"), ("worst", "worst of K"))
# Columns that only bound the robust accuracy, for a system with attacks that a budget cut.
BOUNDS = ("robust", "eight_bit")
# Keys of a line of metrics.jsonl that are not losses.
NOT_DRAWN = ("training", "epoch", "updates", "lr", "seconds", "images_per_second")


def format_table(systems: Mapping[str, Verdicts], chance: float | None = None) -> str:
    """The mean accuracies with their 95 % intervals, and the other two measures under each attack, as text.

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
        both = [f"{v['majority']:.3f} / {v['worst']:.3f}" if v else "" for v in verdicts.values()]
        rows.append(["  majority / worst", *both])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if chance is not None:
        lines.append(f"chance, by always naming the most frequent class: {chance:.3f}")
    return "\n".join(lines)


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


def gallery(rows: Sequence[tuple[str, Tensor, Sequence[str]]], eps: float) -> bytes:
    """A PNG of image rows.

    Args:
        rows: (title, images (n, C, H, W), captions). Rows with negative values are shown as perturbations, in colors
            from -10 eps (blue) to 10 eps (red); the others in [0, 1].
        eps: radius of the attack.
    """
    # Agg needs no display; pyplot would keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = max(len(images) for _, images, _ in rows)
    figure = Figure(figsize=(1.25 * count + 1.6, 1.5 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (title, images, captions) in zip(axes, rows, strict=True):
        signed = bool((images < 0).any())
        for axis in line:
            axis.set_axis_off()
        for axis, image, caption in zip(line, images, captions, strict=False):
            pixels = (image.mean(dim=0) if signed or len(image) == 1 else image.permute(1, 2, 0)).cpu()
            if signed:
                axis.imshow(pixels.numpy(), cmap="RdBu_r", vmin=-10 * eps, vmax=10 * eps)
            else:
                axis.imshow(pixels.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
            # Class names are plain text, even if they contain dollar signs.
            axis.set_title(caption, fontsize=9, pad=2, parse_math=False)
        where = {"transform": line[0].transAxes, "ha": "right", "va": "center"}
        line[0].text(-0.12, 0.5, title, fontsize=10, parse_math=False, **where)
    return _png(figure)


def write_report(
    folder: Path,
    title: str,
    data: Mapping[str, Any],
    notes: Sequence[str] = (),
    picture: bytes | None = None,
    picture_caption: str = "",
    curves: bytes | None = None,
    repeat: str | None = None,
) -> None:
    """Write report.json, report.html and, with a picture, gallery.png; each atomically.

    Args:
        folder: an existing folder.
        title: heading of the page.
        data: the JSON: "seed", "threat_model", "systems" (name -> Verdicts), and other records of the run; further
            groups of systems under "findings" get a table of their own, and the sentences under "answer" come first.
        notes: paragraphs under the tables.
        picture, picture_caption: a PNG and its caption.
        curves: a PNG of the trainings' losses (see training_picture).
        repeat: a script that repeats the run.
    """
    page = _page(
        title=title,
        data=data,
        notes=notes,
        picture=_base64(picture) if picture else None,
        picture_caption=picture_caption,
        curves=_base64(curves) if curves else None,
        repeat=repeat,
    )
    write_text(folder / "report.json", json.dumps(data, indent=2) + "\n")
    write_text(folder / "report.html", page)
    if picture is not None:
        write_atomic(folder / "gallery.png", lambda path: path.write_bytes(picture))


def write_evaluation(
    folder: Path, title: str, report: Mapping[str, Any], rows: Sequence[tuple[str, Tensor]] = ()
) -> None:
    """Write report.json and report.html of one evaluation, each atomically.

    Args:
        folder: an existing folder.
        title: name of the evaluated model.
        report: Report.to_dict(); the JSON holds it beside "threat_model" and "systems", as other reports have them.
        rows: (title, images (n, C, H, W) in [0, 1]) of the gallery.
    """
    data = {
        "seed": report["seed"],
        "threat_model": {"norm": report["norm"], "eps": report["eps"]},
        "systems": {title: {"clean": report["clean"], **report["attacks"]}},
        **report,
    }
    curve = _base64(curve_picture(report["curve"])) if report["curve"] else None
    tries = _base64(resubmission_picture(report["resubmission"])) if report["draws"] > 1 else None
    strips = [(name, _base64(_strip(images))) for name, images in rows]
    trace = _base64(trace_picture(report["trace"])) if report["trace"] else None
    pictures = {"curve": curve, "tries": tries, "trace": trace, "strips": strips}
    page = _page(title=f"atop_fast evaluation: {title}", data=data, details=report, **pictures)
    write_text(folder / "report.json", json.dumps(data, indent=2) + "\n")
    write_text(folder / "report.html", page)


def _strip(images: Tensor) -> bytes:
    """A PNG of images (n, C, H, W) in [0, 1] side by side, pixel for pixel."""
    from matplotlib.image import imsave

    # A column of white on the right of each image keeps them apart.
    row = torch.nn.functional.pad(images.detach().float().cpu().clamp(0, 1), (0, 1), value=1.0)
    pixels = row.expand(-1, 3, -1, -1).permute(2, 0, 3, 1).flatten(1, 2)
    buffer = io.BytesIO()
    imsave(buffer, pixels.contiguous().numpy(), format="png", metadata={"Software": None})  # type: ignore[dict-item]
    return buffer.getvalue()


def curve_picture(points: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of accuracy (mean, with its interval) against eps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = sorted((point for point in points if "mean" in point), key=lambda point: point["eps"])
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    radii = [point["eps"] for point in points]
    low, high = ([point["mean_ci"][end] for point in points] for end in (0, 1))
    axis.fill_between(radii, low, high, alpha=0.25, color="#4878a8", linewidth=0)
    axis.plot(radii, [point["mean"] for point in points], "o-", color="#4878a8")
    axis.set(xlabel="eps", ylabel="accuracy of one draw", ylim=(0, 1))
    axis.grid(alpha=0.3)
    return _png(figure)


def resubmission_picture(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """A PNG of accuracy, with its interval, against the number of tries; see resubmission_curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for (name, points), color in zip(curves.items(), ("#8aa06b", "#4878a8"), strict=False):
        tries = [point["tries"] for point in points]
        low, high = zip(*(point["accuracy_ci"] for point in points), strict=True)
        axis.fill_between(tries, low, high, alpha=0.25, color=color, linewidth=0)
        axis.plot(tries, [point["accuracy"] for point in points], ".-", color=color, label=name)
    axis.set(xlabel="tries", ylabel="images that survive them all", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    axis.grid(alpha=0.3)
    return _png(figure)


def training_picture(lines: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of all scalars of all trainings against updates, from the lines of a metrics.jsonl; None if it is empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trainings: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        trainings.setdefault(line["training"], []).append(line)
    if not trainings:
        return None
    scalars = {title: [key for key in part[-1] if key not in NOT_DRAWN] for title, part in trainings.items()}
    columns = max(map(len, scalars.values()))
    figure = Figure(figsize=(2.1 * columns, 1.9 * len(trainings)), layout="constrained")
    FigureCanvasAgg(figure)
    for row, (title, part) in zip(
        figure.subplots(len(trainings), columns, squeeze=False), trainings.items(), strict=True
    ):
        for axis, key in zip(row, scalars[title], strict=False):
            axis.plot([line["updates"] for line in part], [line.get(key) for line in part], ".-", color="#4878a8")
            axis.set_title(f"{title}: {key}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        for axis in row[len(scalars[title]) :]:
            axis.set_axis_off()
    return _png(figure)


def _page(title: str, data: Mapping[str, Any], **values: Any) -> str:
    """Render report.html; everything is escaped."""
    # jinja2 is imported here so that `import atop_fast` stays quick.
    import jinja2

    template = importlib.resources.files("atop_fast.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    groups = {"Robust accuracy": data["systems"], "Findings": data.get("findings")}
    tables = [
        (heading, part, _note(part), max(map(_images, part.values()))) for heading, part in groups.items() if part
    ]
    bounds = {name: BOUNDS for _, part, *_ in tables for name, verdicts in part.items() if _is_cut(verdicts)}
    # Sections without values are omitted.
    keys = ("details", "curve", "tries", "trace", "strips", "notes", "picture", "picture_caption", "curves", "repeat")
    given = {key: values.get(key) for key in keys}
    return environment.from_string(template).render(
        title=title, data=data, tables=tables, measures=MEASURES, bounds=bounds, **given
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def versions() -> dict[str, str]:
    """Versions that a report records."""
    from .. import __version__

    return {"atop_fast": __version__, "torch": torch.__version__}
