"""The table of trained defenses: python benchmarks/defenses.py DEFENSE [...] --data FOLDER --out runs/table [--json]

DEFENSE is a name in the package, or a folder of `atop-fast train`. Its systems (the classifier alone, behind the
transform, and behind the purifier as pre-trained and as fine-tuned, as far as they are stored) meet the same test
images under every attack, and are judged by 20 fresh draws an image. With --transfer, the transform and the purifier
stand in front of classifiers that the purifier has not seen. Cells that are in --out are not computed again. --json
puts the rows into results/defenses--cpu.json, where rows of earlier calls stay.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from _results import RESULTS, metadata, print_table, write
from torch import Tensor, nn

from atop_fast import (
    PGD,
    AutoAttack,
    Dataset,
    Defense,
    StAdv,
    evaluate,
    image_folder,
    list_defenses,
    load_classifier,
    load_defense,
    load_model,
)
from atop_fast.attacks import Model
from atop_fast.evaluation import PROTOCOLS
from atop_fast.evaluation.pictures import gallery, gallery_rows
from atop_fast.recipes.verdicts import ABLATION

PICTURES = Path(__file__).parent.parent / "docs"
LINF, L2, FLOW = 8 / 255, 0.5, 0.05
# Purifiers that a folder may hold, and the names of their systems.
PURIFIERS = {"pretrained": "pre-trained", ABLATION: "fine-tuned on the classifier alone"}
SYSTEMS = ("classifier alone", "transform alone", *PURIFIERS.values(), "fine-tuned")
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
    parser.add_argument("defenses", nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 with a part `test`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the evaluations")
    parser.add_argument("--images", type=int, default=200, help="of the test set, in every cell")
    parser.add_argument("--transfer", action="store_true", help="in front of other classifiers")
    parser.add_argument("--systems", nargs="+", help="no others")
    parser.add_argument("--columns", nargs="+", default=list(COLUMNS), choices=list(COLUMNS), help="no others")
    parser.add_argument("--json", action="store_true", help="add the rows to results/defenses--cpu.json")
    parser.add_argument("--gallery", action="store_true", help="draw docs/gallery-DEFENSE.png of the first defense")
    args = parser.parse_args()
    test = image_folder(args.data / "test").split(args.images, seed=0)[0]
    rows = []
    for defense in args.defenses:
        for name, system in (unseen(defense) if args.transfer else systems(defense)).items():
            if args.systems and name not in args.systems:
                continue
            title = f"{Path(defense).name}, {name}"
            row: dict[str, Any] = {"defense": Path(defense).name, "system": name, "images": args.images}
            for column in args.columns:
                out = args.out / f"{title}, {column}, {args.images}"
                row |= cell(system, column, test.images, test.labels, out, title)
            rows.append(row)
            print(json.dumps(row), flush=True)
    print_table(rows)
    if args.json:
        record(rows)
    if args.gallery:
        draw_gallery(args.defenses[0], test)


def systems(defense: str) -> dict[str, nn.Module]:
    """The systems of a defense, by name."""
    run = Path(defense)
    tuned = load_defense(run / "defense.safetensors" if run.is_dir() else defense)
    found = {
        "classifier alone": tuned.classifier,
        "transform alone": Defense(tuned.transform, None, tuned.classifier),
        "fine-tuned": tuned,
    }
    for stem, name in PURIFIERS.items():
        if (stored := run / f"{stem}.safetensors").exists():
            found[name] = Defense(tuned.transform, load_model(stored, "purifier"), tuned.classifier)
    return found


def unseen(defense: str) -> dict[str, nn.Module]:
    """The transform and the purifier of a defense in front of classifiers that the purifier has not seen, by name."""
    package = Path(cast(str, importlib.import_module("pyautoattack").__file__)).parent
    classifiers = {
        "ResNet-18 of pyautoattack": load_classifier(package / "examples" / "model_test.pt", "resnet18"),
        **{f"classifier of {name}": load_classifier(name) for name in list_defenses() if name != defense},
    }
    given, found = load_defense(defense), {}
    for name, classifier in classifiers.items():
        found[f"{name}, alone"] = classifier
        found[f"{name}, behind the transform"] = Defense(given.transform, None, classifier)
        found[f"{name}, behind the purifier"] = Defense(given.transform, given.purifier, classifier)
    return found


def record(rows: list[dict[str, Any]]) -> None:
    """Put rows, with date and commit, into the result file; each replaces the cells that it has anew."""
    context = metadata("cpu", None)
    origin = {key: context[key] for key in ("date", "device", "commit")}
    path = RESULTS / "defenses--cpu.json"
    known = {(row["defense"], row["system"], row["images"]): row for row in json.loads(path.read_text())["rows"]}
    for row in rows:
        key = row["defense"], row["system"], row["images"]
        known[key] = {**known.get(key, {}), **row, **origin}
    document = {
        **context,
        "command": "python benchmarks/defenses.py DEFENSE --data cifar10-jpeg --images IMAGES",
        "data": "CIFAR-10 as JPEG of quality 75, test images",
        "columns": {name: {"norm": c.norm, "eps": c.eps, "steps": c.steps} for name, c in COLUMNS.items()},
        "rows": sorted(known.values(), key=_rank),
    }
    print(write("defenses", "cpu", RESULTS, document))


def _rank(row: dict[str, Any]) -> tuple[Any, ...]:
    """Defenses by name, then systems in the order in which they are built, then transfer."""
    system = row["system"]
    return (
        system not in SYSTEMS,
        row["defense"],
        SYSTEMS.index(system) if system in SYSTEMS else system,
        row["images"],
    )


def draw_gallery(defense: str, test: Dataset) -> None:
    """The first ten test images, their candidates under exact gradients, and what the defense makes of these."""
    system = systems(defense)["fine-tuned"]
    part = test.take(slice(0, 10))
    ids, labels = torch.arange(10), [part.classes[label] for label in part.labels.tolist()]
    adversarial = pgd(system, COLUMNS["exact"])(part.images, part.labels, sample_ids=ids)
    rows = gallery_rows(system, part.images, adversarial, ids, 0, part.classes)
    path = PICTURES / f"gallery-{Path(defense).name}.png"
    path.write_bytes(gallery([("label", part.images, labels), *rows], LINF))
    print(path)


def origins(document: dict[str, Any]) -> str:
    """When, where and by which commit the rows were measured."""
    found = sorted({(row["date"], row["device"], row["commit"][:7]) for row in document["rows"]})
    parts = [f"{date} on {device}, commit {commit}" for date, device, commit in found]
    return f"Measured {'; '.join(parts)}; {document['threads']} thread, torch {document['versions']['torch']}."


def shipped(document: dict[str, Any]) -> str:
    """For each system of a defense in the package, its accuracy on the most images, clean and under exact gradients."""
    lines = ["| defense | system | images | clean | PGD, exact gradients |", "|---|---|---|---|---|"]
    known = {(row["defense"], row["system"]): row for row in document["rows"] if "exact" in row}
    for row in known.values():
        if row["defense"] in list_defenses() and row["system"] in SYSTEMS:
            cells = " | ".join(_cell(row, name) for name in ("clean", "exact"))
            lines.append(f"| {row['defense']} | {row['system']} | {row['images']} | {cells} |")
    return "\n".join(lines) + f"\n\n{origins(document)}"


def defenses(document: dict[str, Any]) -> str:
    """A row for each system: mean accuracy of a draw, with its 95 % interval, under every attack."""
    names = list(document["columns"])
    head = ["defense", "system", "images", "clean", *names, "single draw", "commit"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in document["rows"]:
        cells = [_cell(row, name) for name in ("clean", *names)]
        single = f"{row['single draw']:.3f}" if "single draw" in row else ""
        parts = (row["defense"], row["system"], str(row["images"]), *cells, single, row["commit"][:7])
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines) + f"\n\n{origins(document)}"


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    low, high = row[f"{name} interval"]
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"


def cell(system: nn.Module, name: str, x: Tensor, y: Tensor, out: Path, title: str) -> dict[str, Any]:
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
