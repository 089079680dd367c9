"""One row of the table of defenses: what the literature's rules say of a model, and what a sound verdict says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from .._core.checks import check_choice, check_integer, check_radius, message
from .._core.distributed import process_group
from ..attacks import PGD, AutoAttack, Model, Square, frozen
from ..data import Dataset
from ..defense import Defense, classifier_alone
from ..evaluation.evaluate import evaluate, parse_budget
from ..evaluation.identity import model_identity, probe_images
from ..evaluation.judge import Judge, judged
from ..evaluation.protocols import PROTOCOLS, AnyAttack
from ..evaluation.runs import Run, Unit
from ..evaluation.source import Source, make_source
from ..evaluation.summary import Report
from ..evaluation.verdict import wilson_interval
from ..randomness import derive_seed
from .inside import Replaced
from .noise import GaussianNoise

# The rules of judging: two of AutoAttack's versions with its own count, and fresh draws under the strongest attacks.
RULES = ("standard", "rand", "sound")
# PGD's draws and schedule, the only attack of its protocol.
(EOT_FAST,) = PROTOCOLS["eot-fast"].attacks.values()


@dataclass(frozen=True)
class Effort:
    """Settings of a judgment that are the same for all rows of a table.

    Attributes:
        eps: radius of the Linf ball, in units of [0, 1] pixels.
        seed: key of all randomness.
        steps: steps of every gradient attack; AutoAttack and the protocol eot-fast take 100.
        n_queries: queries of Square in AutoAttack standard, 5000 in the original; a fifth of it under the rule sound.
        draws: fresh draws of the sound verdict.
        batch_size: images attacked together; on a CPU, no number depends on it. A stopped call loses at most the work
            of one rule on one batch.
    """

    eps: float = 8 / 255
    seed: int = 0
    steps: int = 100
    n_queries: int = 5000
    draws: int = 20
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_radius("judge", "Linf", self.eps)
        check_integer("judge", "seed", self.seed)
        for name in ("steps", "n_queries", "draws", "batch_size"):
            check_integer("judge", name, getattr(self, name), low=1)


def judge(
    model: Model,
    images: Tensor | Dataset | TorchDataset[Any],
    labels: Tensor | None = None,
    *,
    out: str | Path,
    name: str = "defense",
    rules: Sequence[str] = RULES,
    effort: Effort = Effort(),
    budget: float | str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Judge a model by single draws, as AutoAttack counts, and by fresh draws under the strongest attacks here.

        standard, rand   share of the images that AutoAttack of this version leaves, by its own count: one draw decides
        sound            verdict of evaluate, 20 fresh draws an image, on the worst candidate of PGD of the protocol
                         eot-fast by the exact gradient ("exact"), by BPDA ("bpda") and on the classifier without its
                         defense ("blind"), and of Square ("square")

    A model whose draws do not differ is attacked and judged by one draw.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        images: float images (N, C, H, W) in [0, 1]; or a Dataset of this library, a map-style torch Dataset of (image,
            label), or a DataLoader over one.
        labels: int64 labels (N,); None for a dataset, which has labels.
        out: folder of the runs, one for each rule; a stopped call resumes, and finished attacks are not repeated.
        name: name of the row.
        rules: some of RULES.
        effort: radius, steps, queries and draws, which all rows of a table share.
        budget: seconds, or text such as "90s", "10m", "2h", after which no further block of images starts. The same
            call resumes.
        progress: whether to show progress bars.

    Returns:
        The row, JSON-ready: "defense" (its name), "model", "images", "complete" (whether all `rules` are finished),
        "seconds" (rule -> seconds of its attacks and verdicts, over all calls), and the numbers of the finished rules;
        a rule that the budget cut has none.
        The rules standard and rand have "standard", "rand" and their intervals "standard_ci", "rand_ci". The rule sound
        has "clean", "clean_ci", the accuracy under each attack by its name, "sound", "sound_ci", "majority",
        "majority_ci", "tries" (accuracy against one try and against as many as draws: the ends of the resubmission
        curve), "draws", and "findings": name -> status of each finding of the doctor that is not a pass. Intervals are
        of 95 %. On one machine, equal arguments give the same bits, except for "seconds".

    Raises:
        TypeError, ValueError: an argument is wrong, and named in the message; or `out` holds another run or is damaged,
            and is left unchanged.
    """
    deadline = None if budget is None else time.monotonic() + parse_budget(budget, "judge")
    rules = check_rules(rules)
    source = make_source(images, labels, model)
    random = is_random(model, source, effort.seed)
    row: dict[str, Any] = {"defense": name, "model": described(model), "images": len(source)}
    seconds: dict[str, float] = {}
    for rule in rules:
        folder = Path(out) / rule
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if left == 0 and not (folder / "run.json").exists():
            # Even without attacks, an evaluation would take the time of its clean images and of the doctor.
            continue
        if rule == "sound":
            report = evaluate(
                model, images, labels, norm="Linf", eps=effort.eps, seed=effort.seed, draws=effort.draws,
                attacks=strongest(model, effort, random), batch_size=effort.batch_size, out=folder, budget=left,
                title=f"{name}, {rule}", progress=progress,
            )  # fmt: skip
            seconds[rule] = report.seconds["total"]
            found = sound(report) if report.complete else {}
        else:
            options: dict[str, Any] = {"title": f"{name}, {rule}", "progress": progress}
            found, seconds[rule] = counted(model, source, rule, effort, random, folder, deadline, **options)
        row |= found
    return {**row, "seconds": seconds, "complete": all(rule in row for rule in rules)}


def check_rules(rules: Sequence[str]) -> list[str]:
    """Raise unless `rules` are some of RULES."""
    if isinstance(rules, str) or not rules:
        raise ValueError(message("judge", "rules", f"a list of some of {', '.join(map(repr, RULES))}", repr(rules)))
    return [check_choice("judge", "rules", rule, RULES) for rule in rules]


def strongest(model: Model, effort: Effort, random: bool) -> dict[str, AnyAttack]:
    """PGD of the protocol eot-fast by every gradient that the model has, and Square, which needs none."""
    options: dict[str, Any] = {"norm": "Linf", "eps": effort.eps, "seed": derive_seed(effort.seed, "attack")}
    steps = {**options, **EOT_FAST.options, "steps": effort.steps}
    if not random:
        steps["eot_iter"] = 1
    attacks: dict[str, AnyAttack] = {"exact": PGD(model, **steps)}
    if isinstance(model, Defense):
        if _in_front(model):
            attacks["bpda"] = PGD(model, gradient="bpda", **steps)
        attacks["blind"] = PGD(undefended(model), **{**steps, "eot_iter": 1})
    attacks["square"] = Square(model, n_queries=max(1, effort.n_queries // 5), **options)
    return attacks


def _in_front(model: Defense) -> bool:
    """Whether something is in front of the classifier, for BPDA to replace its derivative.

    A defense inside the classifier stands behind noise of sigma 0.
    """
    inside = isinstance(model.classifier, Replaced) and model.purifier is None
    return not (inside and isinstance(model.transform, GaussianNoise) and not model.transform.sigma)


def undefended(model: Defense) -> nn.Module:
    """The classifier without transform, purifier, and replaced layers."""
    return model.classifier.model if isinstance(model.classifier, Replaced) else classifier_alone(model)


def described(model: Model) -> str:
    """A defense in a few words."""
    if not isinstance(model, Defense):
        return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "model")
    inner = model.classifier
    parts = [repr(model.transform)] if _in_front(model) else []
    parts += [] if model.purifier is None else [type(model.purifier).__name__]
    parts += [f"{type(inner).__name__}({inner.extra_repr()})"] if isinstance(inner, Replaced) else []
    return ", ".join(parts)


def is_random(model: Model, source: Source, seed: int) -> bool:
    """Whether the logits of images differ in three draws, by the same check as in evaluate."""
    # In training mode, dropout would count as a random defense, and batch norm would take statistics.
    with frozen(model):
        return not Judge(model, seed, 1, 1).is_repeatable(source)


def counted(
    model: Model,
    source: Source,
    rule: str,
    effort: Effort,
    random: bool,
    folder: Path,
    deadline: float | None,
    title: str,
    progress: bool,
) -> tuple[dict[str, Any], float]:
    """The accuracy that AutoAttack's version `rule` reports, empty if the deadline came first; and its seconds."""
    attack = AutoAttack(
        model, "Linf", effort.eps, version=rule, seed=effort.seed, steps=effort.steps, n_queries=effort.n_queries,
        eot_iter=None if random else 1,
    )  # fmt: skip
    with process_group() as group:
        header = {"attack": repr(attack), "images": len(source), "data": source.identity}
        run = Run(len(source), folder, {**header, "model": model_identity(model, *probe_images(source))}, group)
        blocks = torch.arange(len(source)).split(effort.batch_size)[group.rank :: group.size]
        # Another batch size may have left parts of blocks.
        done = run.done(rule)
        todo = [part for ids in blocks if len(part := ids[~done[ids]])]
        for ids in tqdm(todo, desc=title, disable=not progress or group.rank != 0, unit="block"):
            start = time.monotonic()
            if deadline is not None and start >= deadline:
                break
            x, y = source.take(ids)
            predicted = attack._evaluate(judged(x), y, ids.to(x.device), 250, attack.attacks_to_run)[1]
            values = {"right": (predicted == y).cpu()}
            run.add(Unit(rule, ids, values, None, time.monotonic() - start, None, None))
        run.share()
    seconds = sum(unit.seconds for unit in run.units)
    if not run.done(rule).all():
        return {}, seconds
    accuracy = float(run.tables[rule]["right"].double().mean())
    return {rule: accuracy, f"{rule}_ci": list(wilson_interval(accuracy, len(source)))}, seconds


def sound(report: Report) -> dict[str, Any]:
    """Verdicts on fresh draws under each attack and under the worst for each image, and the doctor's findings."""
    verdict, tries = report.robust, report.resubmission["robust"]
    return {
        "clean": report.clean.mean,
        "clean_ci": list(report.clean.mean_ci),
        **{name: one.mean for name, one in report.attacks.items() if one},
        "sound": verdict.mean,
        "sound_ci": list(verdict.mean_ci),
        "majority": verdict.majority,
        "majority_ci": list(verdict.majority_ci),
        "tries": [tries[0]["accuracy"], tries[-1]["accuracy"]],
        "draws": report.settings["draws"],
        "findings": {f["name"]: f["status"] for f in report.diagnostics if f["status"] != "pass"},
    }
