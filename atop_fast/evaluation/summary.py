"""Turns the results of a run into a Report: choice among candidates, verdicts, emulated verdicts, table of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import chance_level
from .export import format_latex, write_csv
from .findings import budget_finding, constant_finding, doubt_finding, unchanged_finding
from .report import format_table, versions
from .resubmission import resubmission_curve
from .runs import Run
from .tracing import mean_trace
from .verdict import Verdict, emulated_verdicts

CLEAN = "clean"
# A candidate's name with this suffix is that candidate rounded to 8 bits.
EIGHT_BIT = "@8bit"


def curve_name(radius: float | str) -> str:
    """The candidates of the accuracy curve at a radius."""
    return f"curve@{radius}"


@dataclass(frozen=True)
class Report:
    """The results of evaluate for one model.

    Attributes:
        clean: verdict on the unchanged images.
        robust: verdict on each image's chosen candidate, the one with the worst result in the selection draws.
        attacks: verdict on each attack's candidates; an image that was fooled already, in a protocol that stops there,
            keeps the candidate chosen so far. If the budget cut an attack, the verdict covers the images that it
            reached (`images` of the verdict); None if it reached none.
        eight_bit: verdict on the chosen candidates rounded to 8 bits, under the draws of `robust`.
        resubmission: for "clean" and "robust" the accuracy against an attacker who may try M times, M = 1 .. K; see
            resubmission_curve.
        emulated: what AutoAttack's rules would say, unsound for random defenses: see emulated_verdicts.
        headline: which of them the protocol's source reports, or None.
        complete: whether every attack got to every image; if not, `robust` is an upper bound on the robust accuracy.
        curve: "eps" of every radius asked for, how many images were "attacked", and the verdict on these, if any.
        chance: accuracy of always naming the most frequent class of these images.
        classes: names of the classes, if the images came with them.
        samples: for every image its id, label, share of right draws ("clean", "robust"), the most frequent class of
            these draws ("clean_class", "robust_class"), chosen "attack", the norm of its perturbation ("distance"),
            whether every attack got to it ("attacked"), and its "file", if known.
        passes: attack -> images through the model "forward" and "backward", verdicts included (None: not counted), and
            how many "images" it attacked.
        seconds: the same of the time, summed over processes, and "total".
        trace: loss, accuracy and passes after each step of every attack, if they were traced: see evaluate and
            tracing.mean_trace.
        settings: protocol, norm, eps, seed, draws, selection_draws, randomness, transform (of a Defense), images.
        diagnostics: {"name", "status", "reason"} and perhaps "numbers", as given or as atop_fast.doctor found them.
        versions: of atop_fast and torch.
    """

    clean: Verdict
    robust: Verdict
    attacks: dict[str, Verdict | None]
    eight_bit: Verdict
    resubmission: dict[str, list[dict[str, Any]]]
    emulated: dict[str, Any]
    headline: str | None
    complete: bool
    curve: list[dict[str, Any]]
    chance: float
    classes: list[str] | None
    samples: list[dict[str, Any]]
    passes: dict[str, dict[str, int | None]]
    seconds: dict[str, float]
    trace: list[dict[str, Any]]
    settings: dict[str, Any]
    diagnostics: list[dict[str, Any]]
    versions: dict[str, str]

    def __repr__(self) -> str:
        """The table of the report, whether a budget cut it, and the findings that do not pass."""
        columns = {name: getattr(self, name).to_dict() for name in ("clean", "robust", "eight_bit")}
        columns |= {name: verdict and verdict.to_dict() for name, verdict in self.attacks.items()}
        heading = f"Report by the protocol {self.settings['protocol']}, {self.settings['norm']}, eps"
        cut = "" if self.complete else "\nThe budget cut attacks: robust and eight_bit are upper bounds."
        lines = [f"{f['status']}  {f['name']}: {f['reason']}" for f in self.diagnostics if f["status"] != "pass"]
        table = format_table({"model": columns}, self.chance)
        return "\n".join([f"{heading} {self.settings['eps']:.4g}", table + cut, *lines])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the settings are next to the results."""
        values = {**vars(self), **self.settings}
        del values["settings"]
        verdicts: dict[str, Any] = {"attacks": {name: v and v.to_dict() for name, v in self.attacks.items()}}
        verdicts |= {name: getattr(self, name).to_dict() for name in ("clean", "robust", "eight_bit")}
        return {**values, **verdicts}

    def to_csv(self, path: str | Path) -> None:
        """Write the verdicts as CSV, one row each for "clean", every attack, "robust", its 8-bit rounding, "chance".

        Columns: "verdict", "images", "draws", "complete" (whether every image was attacked), and for "mean", "majority"
        and "worst" the value and the ends of its 95 % interval ("mean_low", "mean_high"). An attack that reached no
        image has 0 images and empty cells. Chance is the mean alone: accuracy of always naming the most frequent class.
        """
        write_csv(self, path)

    def to_latex(self) -> str:
        r"""The table of to_csv as a LaTeX tabular, with three digits; needs \usepackage{booktabs}."""
        return format_latex(self)


def choice(run: Run, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Each image's worst candidate: fewest correct selection draws, ties broken by the larger mean cross-entropy.

    Returns:
        Its index in `names` (N,) and its number of correct selection draws (N,). Missing candidates are not chosen;
        the first name must have a candidate for every image that the caller reads.
    """
    shape = (len(names), run.count)
    correct = torch.full(shape, torch.iinfo(torch.int32).max, dtype=torch.int32)
    loss = torch.full(shape, -torch.inf)
    for row, name in enumerate(names):
        if name in run.tables:
            table = run.tables[name]
            correct[row] = torch.where(table["done"], table["correct"], correct[row])
            loss[row] = torch.where(table["done"], table["loss"], loss[row])
    fewest = correct.amin(dim=0)
    return loss.masked_fill(correct > fewest, -torch.inf).argmax(dim=0), fewest


def summarize(
    run: Run,
    labels: Tensor,
    attacks: Sequence[str],
    radii: Sequence[float],
    settings: dict[str, Any],
    interval: str = "wilson",
    cascade: bool = False,
    headline: str | None = None,
    diagnostics: Sequence[Mapping[str, Any]] = (),
    classes: Sequence[str] | None = None,
    files: Sequence[str] | None = None,
    deterministic: bool = False,
) -> Report:
    """The Report of a run whose clean images and chosen 8-bit candidates are all judged."""
    names = [CLEAN, *attacks]
    predictions, right, reached = _judged(run, labels, names, cascade)
    chosen, _ = choice(run, names)
    rounded = torch.zeros_like(predictions[0])
    for row, name in enumerate(names):
        if (at := chosen == row).any():
            rounded[at] = run.tables[name + EIGHT_BIT]["predictions"][at]

    def verdict(values: Tensor, rows: Tensor | slice = slice(None)) -> Verdict:
        return Verdict.from_predictions(values[rows], labels[rows], interval, settings["seed"])

    verdicts = [verdict(p, rows) if rows.any() else None for p, rows in zip(predictions[1:], reached, strict=True)]
    counts = {name: int(rows.sum()) for name, rows in zip(attacks, reached, strict=True)}
    if cascade and settings["protocol"] == "fast":
        diagnostics = [*diagnostics, *doubt_finding(dict(zip(attacks, verdicts, strict=True)))]
    robust = _pick(predictions, chosen)
    stands = {CLEAN: right[0], "robust": robust == labels[:, None]}
    return Report(
        clean=verdict(predictions[0]),
        robust=verdict(robust),
        attacks=dict(zip(attacks, verdicts, strict=True)),
        eight_bit=verdict(rounded),
        resubmission={name: resubmission_curve(v, interval, settings["seed"]) for name, v in stands.items()},
        emulated=emulated_verdicts(torch.stack(right), deterministic=deterministic),
        headline=headline,
        complete=all(count == run.count for count in counts.values()),
        curve=[_point(run, radius, verdict) for radius in radii],
        chance=chance_level(labels),
        classes=None if classes is None else list(classes),
        samples=_samples(run, labels, names, chosen, {CLEAN: predictions[0], "robust": robust}, reached, files),
        **_costs(run, names),
        trace=mean_trace(run.trace([*attacks, *map(curve_name, radii)])),
        settings=settings,
        diagnostics=[
            *map(dict, diagnostics),
            *constant_finding(predictions[0], labels),
            *unchanged_finding(run, attacks, settings["eps"]),
            *budget_finding(counts, run.count),
        ],
        versions=versions(),
    )


def _judged(
    run: Run, labels: Tensor, names: Sequence[str], cascade: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Verdicts of the draws on the candidates in `names`, of which the first are the clean images.

    Returns:
        For each name, predictions (N, K), where an image without the candidate has those of the one chosen among the
        names before; and whether the draws are right, or there is no candidate (N, K). For each name but the first, the
        images that its attack has decided (N,).
    """
    predictions = [run.tables[names[0]]["predictions"]]
    right = [predictions[0] == labels[:, None]]
    reached: list[Tensor] = []
    for row, name in enumerate(names[1:], start=1):
        chosen, correct = choice(run, names[:row])
        known = run.tables.get(name, {"predictions": predictions[0]})["predictions"]
        done = run.done(name)
        predictions.append(torch.where(done[:, None], known, _pick(predictions, chosen)))
        # A missing candidate cannot fail under the emulated rules.
        right.append((predictions[-1] == labels[:, None]) | ~done[:, None])
        reached.append(whole_prefix(done, correct == 0) if cascade else done)
    return predictions, right, reached


def whole_prefix(done: Tensor, fooled: Tensor) -> Tensor:
    """The images, bool (N,), that an attack of a cascade has decided: all of them, or the first up to where it was cut.

    A cut attack has met some of those `done` (N,), but the attacks before it have met all that are `fooled` (N,): an
    accuracy over both would count every fooled image, and only a few of the others.
    """
    decided = (done | fooled).long().cumprod(0).bool()
    if not decided.all():
        last = (decided & done).nonzero()[:, 0]
        decided[int(last[-1]) + 1 if len(last) else 0 :] = False
    return decided


def _pick(predictions: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Each image's predictions (N, K) under its chosen candidate (N,)."""
    return torch.stack(list(predictions))[chosen, torch.arange(len(chosen))]


def _point(run: Run, radius: float, verdict: Any) -> dict[str, Any]:
    name = curve_name(radius)
    done = run.done(name)
    found = verdict(run.tables[name]["predictions"], done).to_dict() if done.any() else {}
    return {"eps": radius, **found, "attacked": int(done.sum())}


def _samples(
    run: Run,
    labels: Tensor,
    names: Sequence[str],
    chosen: Tensor,
    predictions: Mapping[str, Tensor],
    reached: Sequence[Tensor],
    files: Sequence[str] | None,
) -> list[dict[str, Any]]:
    distances = torch.stack(
        [run.tables[name]["distance"] if name in run.tables else torch.zeros(run.count) for name in names]
    )
    columns = {
        "id": range(run.count),
        "label": labels.tolist(),
        **{name: (p == labels[:, None]).double().mean(dim=1).tolist() for name, p in predictions.items()},
        **{f"{name}_class": p.long().mode(dim=1).values.tolist() for name, p in predictions.items()},
        "attack": [names[row] for row in chosen.tolist()],
        "distance": _pick(list(distances), chosen).tolist(),
        "attacked": torch.stack([*reached, torch.ones(run.count, dtype=torch.bool)]).all(dim=0).tolist(),
        **({} if files is None else {"file": files}),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _costs(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """Passes and seconds by name, in order; the 8-bit candidates together."""
    passes: dict[str, dict[str, int | None]] = {}
    seconds: dict[str, float] = dict.fromkeys(names, 0.0)
    for unit in run.units:
        name = "eight_bit" if unit.name.endswith(EIGHT_BIT) else unit.name
        seconds[name] = seconds.get(name, 0.0) + unit.seconds
        sums = passes.setdefault(name, {"forward": 0, "backward": 0, "images": 0})
        for key, value in (("forward", unit.forward), ("backward", unit.backward), ("images", len(unit.ids))):
            before = sums[key]
            sums[key] = None if before is None or value is None else before + value
    return {"passes": passes, "seconds": {**seconds, "total": sum(seconds.values())}}
