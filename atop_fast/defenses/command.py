"""The command `atop-fast judge`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

from .._core.checks import check_device, check_integer, message
from .._core.distributed import launched
from .._core.files import claim_folder, write_atomic, write_text
from ..bench.results import metadata, print_table, write_rows
from ..classifiers.zoo import System
from ..data import Dataset
from ..evaluation.evaluate import parse_budget
from ..evaluation.identity import attack_identity, model_identity, probe_images
from ..evaluation.source import make_source
from ..recipes.options import DataConfig, GivenTransform
from .judge import RULES, Effort, check_rules, is_random
from .judge import judge as judge_model
from .own import find
from .table import DEFENSES, alarms, confusion, draw, to_csv, truths

# Columns of the table on the terminal.
SHOWN = ("clean", *RULES[:2], "blind", "bpda", "exact", "square", "sound")


def judge(
    classifier: str,
    defense: str = "all",
    out: str = "runs/judge",
    data: DataConfig = DataConfig(),
    architecture: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    normalize: str | None = None,
    trust: bool = False,
    rules: tuple[str, ...] = RULES,
    images: int = 100,
    eps: float = 8 / 255,
    steps: int = 100,
    n_queries: int = 5000,
    draws: int = 20,
    batch_size: int = 8,
    budget: str | None = None,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Judge defenses by the literature's rules and by a sound verdict; `atop-fast judge DEFENSE|all [options]`.

    DEFENSE is none, noise, jpeg, ... (docs/judged.md), FILE.py:NAME for one of your own, a file of save_defense, the
    name of a defense in the package, or several of these with commas between them. Every call adds its rows to the
    table in `out`: judge.json, judge.csv and judge.png. The same call resumes after a stop. Later calls of a row must
    have the same defense.

    Args:
        classifier: the classifier that is defended, a file or name as in evaluate.
        defense: all, or defenses separated by commas: names in atop_fast.defenses.DEFENSES; FILE.py:NAME, where NAME is
            a subclass of RandomTransform or a function from the classifier to a module (the file's code is executed);
            files of save_defense, and names in list_defenses(), for this classifier. "all" means every name of the
            first kind.
        out: folder of the table, with a folder for each row; a table is of one classifier and of the same images.
        data: images and their split; the first of the held-out part are attacked.
        architecture: of a checkpoint of torch.save: resnet18, wrn_28_10, ...
        weights: file of the weights of FILE.py:Class or of a model of torchvision or timm.
        key: of a checkpoint that holds several networks: the dictionary, or the prefix of the names.
        normalize: mean and standard deviation by which the network expects its input to be normalized: imagenet,
            cifar10, cifar100, mnist, half or MEAN/STD, such as 0.5,0.5,0.5/0.2,0.2,0.2; by default those of its
            package, or none.
        trust: run the program in a file: an archive, or the source of a class.
        rules: some of standard, rand and sound, such as [standard, sound]. A later call with others adds their numbers.
        images: how many held-out images, at most.
        eps: radius of the Linf ball, in units of [0, 1] pixels.
        steps: steps of every gradient attack.
        n_queries: queries of Square in AutoAttack standard; a fifth of it under the rule sound.
        draws: fresh draws of the sound verdict.
        batch_size: images attacked together.
        budget: time after which no further block of images starts, such as 90s, 10m or 2h, for all rows together.
        device: where to compute: auto (a GPU, if there is one), cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    if launched():
        raise ValueError(message("judge", "processes", "one, as a table has one writer", "those of torchrun"))
    chosen = check_device("judge", "device", device)
    deadline = None if budget is None else time.monotonic() + parse_budget(budget, "judge")
    names = [name for part in defense.split(",") for name in (DEFENSES if part == "all" else [part])]
    found = [find(name) for name in names]
    builds = dict(found)
    if len(builds) < len(found):
        raise ValueError(message("judge", "defense", "defenses with different names", defense))
    wanted = check_rules(rules)
    effort = Effort(eps, seed, steps, n_queries, draws, batch_size)
    check_integer("judge", "images", images, low=1)
    system = System(classifier, None, None, GivenTransform(), architecture, weights, key, normalize, trust)
    model, part = system.load("judge", system.sized("judge", data).load(print)[1])
    model, part = model.eval().to(chosen), cast(Dataset, part).take(slice(0, images)).to(chosen)
    defenses = {name: build(model, part.shape).eval().to(chosen) for name, build in builds.items()}
    folder = Path(out)
    source = make_source(part.images, part.labels, model)
    for defended in defenses.values():
        # One that does not fit these images must fail now, not after the rows before it.
        is_random(defended, source, seed)
    settings = {"norm": "Linf", **vars(effort), "images": len(source)}
    del settings["batch_size"]
    identity = model_identity(model, *probe_images(source))["weights"]
    claim_folder("judge", folder, {**settings, "data": source.identity, "classifier": identity})
    context = {**metadata(chosen.type, None), "classifier": Path(classifier).name, "settings": settings}
    unfinished = []
    for name, defended in defenses.items():
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        options: dict[str, Any] = {"rules": wanted, "effort": effort, "budget": left}
        # Each rule's run knows its model, but a row joins rules of several calls.
        claim_folder("judge", folder / name, {"defense": attack_identity(defended, model)})
        row = judge_model(defended, part.images, part.labels, out=folder / name, name=name, **options)
        unfinished += [f"{name} ({rule})" for rule in wanted if rule not in row]
        rows = _add(folder, row)
        _write(folder, {**context, "confusion": confusion(rows), "rows": rows})
    print_table(shown(rows))
    if unfinished:
        print(f"Not finished in the budget, and without a number: {', '.join(unfinished)}; the same command resumes.")
    print(f"Table: {folder / 'judge.csv'}, judge.json and judge.png")


def _add(folder: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of a table, in the order of DEFENSES, with the new numbers of one."""
    path = folder / row["defense"] / "row.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seconds": {}}
    new = {**old, **row, "seconds": {**old["seconds"], **row["seconds"]}}
    # "complete" describes the call, not the row.
    del new["complete"]
    write_text(path, json.dumps(new) + "\n")
    order = {name: rank for rank, name in enumerate(DEFENSES)}
    rows = [json.loads(found.read_text(encoding="utf-8")) for found in folder.glob("*/row.json")]
    return sorted(rows, key=lambda row: (order.get(row["defense"], len(order)), row["defense"]))


def _write(folder: Path, document: dict[str, Any]) -> None:
    """Write judge.json, judge.csv and judge.png."""
    write_rows(folder / "judge.json", document)
    write_text(folder / "judge.csv", to_csv(document["rows"]))
    write_atomic(folder / "judge.png", lambda path: draw(document["rows"], path))


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns of rows for the terminal."""
    return [
        {
            "defense": row["defense"],
            **{name: row.get(name) for name in SHOWN},
            "doctor": ", ".join(alarms(row)),
            "truth": kind,
        }
        for row, kind in zip(rows, truths(rows), strict=True)
    ]
