"""Traces of an evaluation: the steps of every unit's attack, in a file, in TensorBoard and in a picture."""

from __future__ import annotations

import bisect
import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._core.checks import message
from .._core.files import remove_leftovers, writable_folder, write_text
from ..attacks import Attack, AutoAttack, TraceStep
from ..training.metrics import summary_writer

Line = dict[str, Any]
# The fields that identify a line: its unit (attack and first image), and a step of that unit.
ID_FIELDS = {"attack": str, "first": int, "part": str, "restart": int, "step": int}
BEGINNING = '{"attack": "'
NUMBERS = ("images", "accuracy", "forward", "backward")


def traced(attack: Any, callback: Callable[[TraceStep], object]) -> Any:
    """A copy of an attack of this library with an additional callback; any other attack is returned unchanged."""
    if not isinstance(attack, (Attack, AutoAttack)):
        return attack
    this, own = copy.copy(attack), attack.callback

    def both(step: TraceStep) -> None:
        if own is not None:
            own(step)
        callback(step)

    this.callback = both
    return this


def trace_line(name: str, first: int, step: TraceStep) -> Line:
    """The line of a step of the attack `name` on the unit whose first image is `first`."""
    values = step._asdict()
    return {"attack": name, "first": first, "part": values.pop("attack"), **values}


def check_line(line: Any) -> Line:
    """A line as trace_line makes it; ValueError for anything else."""
    whole = (
        isinstance(line, dict)
        and all(type(line.get(key)) is kind for key, kind in ID_FIELDS.items())
        and all(type(line.get(key)) in (int, float) for key in NUMBERS)
        and type(line.get("loss", "")) in (int, float, type(None))
    )
    if not whole:
        raise ValueError("not a step of an attack")
    return dict(line)


class TraceFile:
    """A file of JSON lines, one for each step of every finished unit.

    During the run, rank 0 appends the lines of its finished units; at the end, it writes the lines of all ranks.

    Args:
        path: the file; an earlier trace is replaced, any other file is refused.
        lines: lines of the units that are already done.

    Raises:
        ValueError: `path` is not a trace, or its folder cannot be written.
    """

    def __init__(self, path: Path, lines: Iterable[Line]) -> None:
        self.path = path
        writable_folder("evaluate", "trace", path.parent)
        if path.exists():
            try:
                *whole, torn = path.read_text(encoding="utf-8").split("\n")
                for line in whole:
                    check_line(json.loads(line))
                # A killed process may have left an incomplete last line.
                if not torn.startswith(BEGINNING[: len(torn)]):
                    raise ValueError("not a step of an attack")
            except (OSError, ValueError, RecursionError) as error:
                expected = "a new file, or the trace of an evaluation"
                raise ValueError(message("evaluate", "trace", expected, f"{path} ({error})")) from error
        remove_leftovers(path.parent, path.stem)
        self.write(lines)

    def add(self, lines: Iterable[Line]) -> None:
        """Append the lines of a unit."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_text(lines))

    def write(self, lines: Iterable[Line]) -> None:
        """Replace all lines."""
        write_text(self.path, _text(lines))


def _text(lines: Iterable[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def mean_trace(lines: Iterable[Line]) -> list[Line]:
    """The units of every attack together, step by step.

    A unit that ended before the others counts with its last line. Loss and accuracy are means over images, passes are
    sums; lines have no "first". The loss of a step is None if no unit has one.
    """
    runs: dict[tuple[Any, ...], dict[int, list[Line]]] = {}
    for line in lines:
        run = runs.setdefault((line["attack"], line["part"], line["restart"]), {})
        run.setdefault(line["first"], []).append(line)
    found = []
    for (attack, part, restart), units in runs.items():
        fields = {"attack": attack, "part": part, "restart": restart}
        steps = [[line["step"] for line in unit] for unit in units.values()]
        for step in sorted(set().union(*steps)):
            last = [bisect.bisect_right(own, step) - 1 for own in steps]
            now = [unit[i] for unit, i in zip(units.values(), last, strict=True) if i >= 0]
            found.append({**fields, "step": step, **_together(now)})
    return found


def _together(lines: Sequence[Line]) -> Line:
    sums = {key: sum(line[key] for line in lines) for key in ("images", "forward", "backward")}
    known = [(line["loss"], line["images"]) for line in lines if line["loss"] is not None]
    loss = sum(value * images for value, images in known) / sum(images for _, images in known) if known else None
    accuracy = sum(line["accuracy"] * line["images"] for line in lines) / sums["images"]
    return {"images": sums["images"], "loss": loss, "accuracy": accuracy, **sums}


def write_scalars(folder: Path, trace: Sequence[Line]) -> None:
    """Write loss, accuracy and passes of a mean_trace as scalars of TensorBoard, to a folder for every run."""
    writers: dict[str, Any] = {}
    for line in trace:
        title = "-".join([line["attack"], *([line["part"]] if _composite(trace, line["attack"]) else [])])
        if line["restart"]:
            title += f"-restart{line['restart']}"
        if title not in writers:
            # purge_step hides the scalars of an earlier evaluation.
            name = re.sub(r"[^\w.@-]", "_", title).lstrip(".")
            writers[title] = summary_writer()(str(folder / name), purge_step=0)
        for key in ("loss", "accuracy", "forward", "backward"):
            if line[key] is not None:
                writers[title].add_scalar(key, line[key], line["step"])
    for writer in writers.values():
        writer.close()


def _composite(trace: Sequence[Line], attack: str) -> bool:
    return len({line["part"] for line in trace if line["attack"] == attack}) > 1


def trace_picture(trace: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG of accuracy and loss of a mean_trace against passes, forward and backward, for an image."""
    from .pictures import as_png, new_figure

    runs: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in trace:
        runs.setdefault((line["attack"], line["part"], line["restart"]), []).append(line)
    figure = new_figure(9, 3.2)
    colors: dict[str, str] = {}
    left, right = axes = figure.subplots(1, 2)
    for (attack, _, _), lines in runs.items():
        label = None if attack in colors else attack
        color = colors.setdefault(attack, f"C{len(colors) % 10}")
        passes = [(line["forward"] + line["backward"]) / line["images"] for line in lines]
        left.plot(passes, [line["accuracy"] for line in lines], ".-", markersize=3, color=color, label=label)
        right.plot(passes, [line["loss"] for line in lines], ".-", markersize=3, color=color)
    left.set(ylabel="accuracy of the attack's own draws", ylim=(0, 1))
    right.set(ylabel="loss")
    legend = left.legend(fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    for axis in axes:
        axis.set_xlabel("passes for an image")
        axis.grid(alpha=0.3)
    return as_png(figure)
