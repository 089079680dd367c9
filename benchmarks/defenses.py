"""The table of trained defenses: python benchmarks/defenses.py RUN [RUN ...] --data FOLDER --out runs/table [--json]

RUN is a folder of `atop-fast train`. Four systems of it (the classifier alone, behind the transform, behind the
purifier as pre-trained and as fine-tuned) meet the same test images under every attack, and are judged by 20 fresh
draws an image. With --shipped, the fine-tuned system is the package's defense of the run's name. Cells that are in
--out are not computed again. --json also draws docs/gallery-RUN.png for the fine-tuned system of the first run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS, metadata, print_table, write
from torch import Tensor

from atop_fast import PGD, AutoAttack, Dataset, Defense, StAdv, evaluate, image_folder, load_defense, load_model
from atop_fast.attacks import Model
from atop_fast.evaluation import PROTOCOLS
from atop_fast.evaluation.pictures import gallery, gallery_rows

PICTURES = Path(__file__).parent.parent / "docs"
LINF, L2, FLOW = 8 / 255, 0.5, 0.05
# Momentum and schedule are those of the protocol eot-fast, whose only attack is PGD; here a step sees one draw.
(EOT_FAST,) = PROTOCOLS["eot-fast"].attacks.values()


@dataclass(frozen=True)
class Column:
    """An attack: the norm and radius of its threat model, how many steps it takes, and how to build it."""

    norm: str
    eps: float
    steps: int
    attack: Callable[..., Any]


def pgd(model: Model, column: Column, **options: Any) -> PGD:
    settings = {**EOT_FAST.options, "steps": column.steps, "eot_iter": 1}
    return PGD(model, norm=column.norm, eps=column.eps, **settings, **options)


def strongest(model: Model, column: Column) -> Callable[..., Any]:
    """PGD, and AutoAttack on the classifier alone, which draws nothing."""
    return pgd(model, column) if isinstance(model, Defense) else AutoAttack(model, eps=column.eps, version="fast")


COLUMNS = {
    "blind": Column("Linf", LINF, 40, lambda model, column: pgd(model, column, gradient="blind")),
    "BPDA": Column("Linf", LINF, 40, lambda model, column: pgd(model, column, gradient="bpda")),
    "exact": Column("Linf", LINF, 100, strongest),
    "L2": Column("L2", L2, 40, pgd),
    "StAdv": Column("Linf", LINF, 40, lambda model, column: StAdv(model, bound=FLOW, steps=column.steps)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 with a part `test`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the evaluations")
    parser.add_argument("--shipped", action="store_true", help="runs have the names of defenses in the package")
    parser.add_argument("--images", type=int, default=200, help="of the test set, in every cell")
    parser.add_argument("--systems", nargs="+", help="no others")
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=list(COLUMNS), help="no others")
    parser.add_argument("--recorded", action="store_true", help="only cells that are in --out")
    parser.add_argument("--json", action="store_true", help="write results/defenses--cpu.json")
    args = parser.parse_args()
    test = image_folder(args.data / "test").split(args.images, seed=0)[0]
    rows = []
    for run in args.runs:
        for name, system in systems(run, args.shipped).items():
            if args.systems and name not in args.systems:
                continue
            title = f"{run.name}, {name}"
            row: dict[str, Any] = {"defense": run.name, "system": name, "images": args.images}
            for column in args.columns:
                out = args.out / f"{title}, {column}"
                if not args.recorded or (out / "report.json").exists():
                    row |= cell(system, column, test.images, test.labels, out, title)
            rows.append(row)
            print(json.dumps(row), flush=True)
    print_table(rows)
    if args.json:
        document = {
            **metadata("cpu", None),
            "command": f"python benchmarks/defenses.py RUN --data cifar10-jpeg --images {args.images}",
            "data": "CIFAR-10 as JPEG of quality 75, test images",
            "columns": {
                name: {"norm": c.norm, "eps": c.eps, "steps": c.steps}
                for name, c in COLUMNS.items()
                if any(name in row for row in rows)
            },
            "rows": rows,
        }
        print(write("defenses", "cpu", RESULTS, document))
        draw_gallery(args.runs[0], args.shipped, test)


def systems(run: Path, shipped: bool) -> dict[str, torch.nn.Module]:
    """The systems of a run that are judged, by name; only the fine-tuned one may have the package's rounded weights."""
    tuned = load_defense(run / "defense.safetensors")
    assert tuned.purifier is not None
    pretrained = load_model(run / "pretrained.safetensors", "purifier")
    return {
        "classifier alone": tuned.classifier,
        "transform alone": Defense(tuned.transform, None, tuned.classifier),
        "pre-trained": Defense(tuned.transform, pretrained, tuned.classifier),
        "fine-tuned": load_defense(run.name) if shipped else tuned,
    }


def draw_gallery(run: Path, shipped: bool, test: Dataset) -> None:
    """The first ten test images, their candidates under exact gradients, and what the defense makes of these."""
    system = systems(run, shipped)["fine-tuned"]
    part = test.take(slice(0, 10))
    ids, labels = torch.arange(10), [part.classes[label] for label in part.labels.tolist()]
    adversarial = pgd(system, COLUMNS["exact"])(part.images, part.labels, sample_ids=ids)
    rows = gallery_rows(system, part.images, adversarial, ids, 0, part.classes)
    path = PICTURES / f"gallery-{run.name}.png"
    path.write_bytes(gallery([("label", part.images, labels), *rows], LINF))
    print(path)


def shipped(document: dict[str, Any]) -> str:
    """A row for each system: mean accuracy of a draw, with its 95 % interval, clean and under exact gradients."""
    lines = ["| defense | system | clean | PGD, exact gradients |", "|---|---|---|---|"]
    for row in document["rows"]:
        lines.append(f"| {row['defense']} | {row['system']} | {_cell(row, 'clean')} | {_cell(row, 'exact')} |")
    return "\n".join(lines)


def defenses(document: dict[str, Any]) -> str:
    """A row for each system: mean accuracy of a draw, with its 95 % interval, under every attack."""
    names = list(document["columns"])
    head = ["defense", "system", "images", "clean", *names, "single draw"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in document["rows"]:
        cells = [_cell(row, name) for name in ("clean", *names)]
        single = f"{row['single draw']:.3f}" if "single draw" in row else ""
        lines.append(f"| {row['defense']} | {row['system']} | {row['images']} | {' | '.join(cells)} | {single} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    low, high = row[f"{name} interval"]
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"


def cell(system: torch.nn.Module, name: str, x: Tensor, y: Tensor, out: Path, title: str) -> dict[str, Any]:
    """The verdicts on one attack: mean accuracy of a draw with its interval, and the verdict of a single draw."""
    column = COLUMNS[name]
    if name in ("blind", "BPDA") and not isinstance(system, Defense):
        return {}
    report = evaluate(
        system, x, y, norm=column.norm, eps=column.eps, attacks={name: column.attack(system, column)}, out=out,
        title=title, diagnostics=(),
    ).to_dict()  # fmt: skip
    clean, robust = report["clean"], report["attacks"][name]
    found = {"clean": clean["mean"], "clean interval": clean["mean_ci"]}
    found |= {name: robust["mean"], f"{name} interval": robust["mean_ci"]}
    if name == "exact":
        found |= {"all draws right": robust["worst"], "single draw": report["emulated"]["single_draw"]["accuracy"]}
        found["samples"] = [sample["robust"] for sample in report["samples"]]
    return found


if __name__ == "__main__":
    main()
