"""Judges random defenses in front of a classifier, by the rules of the literature and by a sound verdict.

    python benchmarks/judge.py FOLDER --classifier FILE --out runs/judge [--only jpeg --only noise] [--images 200]
        [--cells sound rand] [--budget 30m] [--json NAME]

FOLDER holds one folder of test images for each class. Every cell (a defense under one rule) is an evaluation in a
separate folder in --out: a stopped call resumes, and finished attacks are not repeated. A row with a cell whose budget
is spent has complete = false; the next call resumes it. Each classifier needs a separate --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _results import RESULTS, metadata, print_table, write
from torch import Tensor, nn

from atop_fast import (
    PGD,
    RT1,
    RT2,
    RT3,
    Defense,
    RandomResizePad,
    Report,
    Square,
    evaluate,
    image_folder,
    load_classifier,
)
from atop_fast.defenses import (
    JPEG,
    ActivationPruning,
    FilterDraw,
    GaussianNoise,
    NoisyBilateral,
    RandomSeries,
    ResidualFilters,
    SelfEnsemble,
    TotalVariation,
    WinnersTakeAll,
)
from atop_fast.evaluation import PROTOCOLS
from atop_fast.randomness import derive_seed, seeded

EPS, QUERIES = 8 / 255, 1000
# Sizes suit 32x32 pixels.
DEFENSES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "noise": lambda model: Defense(GaussianNoise(0.1), None, model),
    "resize-pad": lambda model: Defense(RandomResizePad(26, 32), None, model),
    "series": lambda model: Defense(RandomSeries(5), None, model),
    "bilateral": lambda model: Defense(NoisyBilateral(0.06, repeats=20), None, model),
    "filters": lambda model: Defense(FilterDraw(4), seeded_filters(), model),
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


def seeded_filters() -> nn.Module:
    with seeded(0):
        return ResidualFilters(4)


def strongest(model: nn.Module) -> Mapping[str, Any]:
    """PGD of the protocol eot-fast by every gradient that the model has, and Square, which needs none."""
    (entry,) = PROTOCOLS["eot-fast"].attacks.values()
    seed = derive_seed(0, "attack")
    gradients = ("exact", "bpda", "blind") if isinstance(model, Defense) else ("exact",)
    attacks: dict[str, Any] = {
        g: PGD(model, norm="Linf", eps=EPS, gradient=g, seed=seed, **entry.options) for g in gradients
    }
    return attacks | {"square": Square(model, norm="Linf", eps=EPS, n_queries=QUERIES, seed=seed)}


# Rules of judging, as options of evaluate.
CELLS: dict[str, dict[str, Any]] = {
    "standard": {"protocol": "paper", "diagnostics": ()},
    "rand": {"protocol": "autoattack-rand", "diagnostics": ()},
    "sound": {"attacks": strongest},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classifier", required=True, help="a file or name for load_classifier")
    parser.add_argument("--out", type=Path, required=True, help="folder of the evaluations")
    parser.add_argument("--only", action="append", choices=DEFENSES, help="this defense; may be repeated")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--budget", help="of each cell, such as 10m")
    parser.add_argument("--json", metavar="NAME", help="write results/judge-NAME--cpu.json")
    args = parser.parse_args()
    test = image_folder(args.folder).split(args.images, seed=0)[0]
    classifier = load_classifier(args.classifier).eval()
    rows = []
    for name in args.only or DEFENSES:
        rows.append(judge(name, classifier, test.images, test.labels, args.cells, args.out, args.budget))
        print(json.dumps(rows[-1]), flush=True)
    print_table([{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in rows])
    if args.json:
        command = f"python benchmarks/judge.py cifar10-jpeg/test --classifier {Path(args.classifier).name}"
        document = {
            **metadata("cpu", None),
            "command": f"{command} --images {args.images} --cells {' '.join(args.cells)}",
            "threat": {"norm": "Linf", "eps": EPS},
            "rows": rows,
        }
        print(write(f"judge-{args.json}", "cpu", RESULTS, document))


def judge(
    name: str, classifier: nn.Module, x: Tensor, y: Tensor, cells: list[str], out: Path, budget: str | None
) -> dict[str, Any]:
    """The row of a defense: accuracy on clean images, and the robust accuracy that each cell claims."""
    model = DEFENSES[name](classifier).eval()
    row: dict[str, Any] = {"defense": name, "transform": repr(getattr(model, "transform", None))}
    complete = True
    for cell in cells:
        folder = out / name / cell
        report = evaluate(
            model, x, y, norm="Linf", eps=EPS, out=folder, budget=budget, title=f"{name}, {cell}", **CELLS[cell]
        )
        complete &= report.complete
        row |= {"clean": report.clean.mean, **(sound(report) if cell == "sound" else single_draw(cell, report))}
    return {**row, "images": len(x), "complete": complete}


def single_draw(cell: str, report: Report) -> dict[str, Any]:
    """What AutoAttack counts: one draw of the clean image and of each candidate."""
    return {cell: report.emulated["single_draw"]["accuracy"]}


def sound(report: Report) -> dict[str, Any]:
    """Verdicts on fresh draws under each attack and under the worst for each image, and the doctor's findings."""
    verdict, tries = report.robust, report.resubmission["robust"]
    return {
        **{name: one and one.mean for name, one in report.attacks.items()},
        "sound": verdict.mean,
        "sound_ci": list(verdict.mean_ci),
        "majority": verdict.majority,
        "majority_ci": list(verdict.majority_ci),
        "tries": [tries[0], tries[-1]],
        "draws": report.settings["draws"],
        "findings": {f["name"]: f["status"] for f in report.diagnostics if f["status"] != "pass"},
    }


if __name__ == "__main__":
    main()
