"""The report of a recipe: the verdicts on the classifier alone and on the defenses, and a gallery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._core.distributed import Group
from ..data import Dataset
from ..defense import Defense
from ..evaluation import page
from ..evaluation.pictures import gallery, training_picture
from ..evaluation.report import versions, write_report
from ..evaluation.runs import read_candidates
from ..randomness import derive_seed
from ..training.metrics import read_metrics
from .answer import answer, paired_gains
from .budget import Budget
from .evaluation import EvaluationConfig
from .pack import RECIPE, write_repeat
from .schema import Recipe

# The purifier fine-tuned on adversarial images of the classifier alone.
ABLATION = "finetuned_against_classifier_alone"
NOTES = (
    "classifier: no defense. rt_only: the corrupted image goes straight to the classifier. pretrained: the purifier "
    "has seen clean images only. finetuned: AToP, trained on adversarial images.",
    "Every attack goes through the whole system that it attacks. A column of an attack is on its candidates alone; "
    "robust takes each image's worst candidate, and eight_bit rounds it to what a file can hold.",
    "The folders evaluate_<system> have a full report each, and the adversarial images.",
)
FINDING = (
    "Finding: the row of a purifier fine-tuned on adversarial images of the classifier alone, as in the public code, "
    "under the same attacks through the whole pipeline."
)
INCOMPLETE = "evaluate_{}: the budget ended before every image was attacked: the robust accuracy is an upper bound."
CAPTION = (
    "The first images, whatever became of them: adversarial images of {} on the fine-tuned pipeline, their "
    "perturbation, one draw of the transform, and the outputs of the two purifiers; above each, the class that the "
    "classifier assigns to it."
)
# Images of the gallery.
COUNT = 8


def write_verdicts(
    out: Path,
    recipe: Recipe,
    seed: int,
    budget: Budget | None,
    group: Group,
    config: EvaluationConfig,
    test: Dataset,
    systems: Mapping[str, nn.Module],
    reports: Mapping[str, dict[str, Any]],
    reduced: Recipe | None = None,
) -> dict[str, Any]:
    """Write report.json, report.html, gallery.png, recipe.yaml and repeat.sh of a run; the contents of report.json.

    Args:
        out: folder of the run, with the evaluations.
        recipe, seed, budget, group: of the run.
        config: of the evaluations, after the reductions of a budget.
        test: the images that were attacked are its first.
        systems, reports: name -> model, and its evaluation's report.
        reduced: the recipe that a budget made of the run's, for recipe.yaml.
    """
    verdicts = {name: _verdicts(report) for name, report in reports.items()}
    gains = paired_gains(reports)
    threat = {key: reports["finetuned"][key] for key in ("norm", "eps")}
    data: dict[str, Any] = {
        "seed": seed,
        "threat_model": threat,
        "systems": {name: verdict for name, verdict in verdicts.items() if name != ABLATION},
        **({"findings": {ABLATION: verdicts[ABLATION]}} if ABLATION in verdicts else {}),
        "answer": answer(gains, reports, config.protocol),
        "gains": gains,
        "chance": reports["finetuned"]["chance"],
        "doctor": dict(zip(("status", "sentence"), page.doctor_says(reports["finetuned"]["diagnostics"]), strict=True)),
        "complete": {name: report["complete"] for name, report in reports.items()},
        "protocol": config.protocol,
        "recipe": asdict(recipe),
        "versions": versions(),
    }
    notes = [*NOTES, *([FINDING] if recipe.ablation else []), *([recipe.notes] if recipe.notes else [])]
    if budget is not None:
        data["budget"] = budget.plan
        cut = [INCOMPLETE.format(name) for name, report in reports.items() if not report["complete"]]
        notes = [*budget.notes(recipe.evaluation), *notes, *cut]
    if group.rank == 0:
        curves = training_picture(read_metrics(out / "metrics.jsonl"))
        attack = list(reports["finetuned"]["attacks"])[-1]
        rows, names, largest = _gallery(out / "evaluate_finetuned", attack, test, systems, seed, threat)
        pictures: dict[str, Any] = {"rows": rows, "names": names, "picture": gallery(rows, largest) if rows else None}
        pictures |= {"picture_caption": CAPTION.format(attack), "curves": curves}
        repeat = write_repeat(out, reduced or recipe, seed, versions())
        both = {name: reports[name]["samples"] for name in ("classifier", "finetuned")}
        write_report(
            out,
            "atop_fast: AToP from images to verdict",
            data,
            notes,
            repeat=repeat,
            recipe=(out / RECIPE).read_text(encoding="utf-8"),
            cards=_cards(gains["classifier"], data["chance"]),
            limits=page.limits(reports["finetuned"]),
            facts=_facts(recipe, test, systems["finetuned"], data["systems"]),
            per_class=page.per_class(both, test.classes),
            **pictures,
        )
    group.gather(None)
    return data


def _cards(gain: Mapping[str, Any], chance: float) -> list[tuple[str, str, str]]:
    """Label, value and note of the numbers that the page begins with."""
    cards = []
    for label, measure in (("gain under attack", "robust"), ("gain without an attack", "clean")):
        if (found := gain[measure]) is None:
            cards.append((label, "none", "no image was attacked"))
            continue
        low, high = found["interval"]
        own, other = found["accuracies"]
        note = f"[{low:+.3f}, {high:+.3f}]: {own:.3f} with the defense, {other:.3f} of the classifier alone"
        cards.append((label, f"{found['difference']:+.3f}", note))
    return [*cards, ("chance", f"{chance:.3f}", "the most frequent class")]


def _facts(recipe: Recipe, test: Dataset, defense: nn.Module, systems: Mapping[str, Any]) -> dict[str, str]:
    """The run in short."""
    count = systems["finetuned"]["clean"]["images"]
    images = page.describe_images(count, test.shape, test.classes)
    return {
        "model": page.describe_model(defense),
        "images": f"{images}, held out of {recipe.data.test or recipe.data.source}",
        "transform": str(recipe.transform.build()),
        "recipe": f"fine-tuning on {recipe.finetune.attack} of the {recipe.finetune.attacked}, {recipe.finetune.norm} "
        f"{recipe.finetune.eps:.4g}; every option is below and in recipe.yaml",
    }


def _verdicts(report: dict[str, Any]) -> dict[str, Any]:
    """The columns of a report's table."""
    return {**{name: report[name] for name in ("clean", "robust", "eight_bit")}, **report["attacks"]}


def _gallery(
    folder: Path, attack: str, test: Dataset, systems: Mapping[str, nn.Module], seed: int, threat: dict[str, Any]
) -> tuple[list[tuple[str, Tensor, list[str]]], list[str], float]:
    """Rows of clean, adversarial, perturbation, corrupted, and purified before and after fine-tuning.

    With them the true classes, and the largest change of a pixel. No rows if the budget ended before the attack, or
    without one or three channels.
    """
    found = read_candidates(folder, attack, range(COUNT))
    pretrained, finetuned = systems["pretrained"], systems["finetuned"]
    assert isinstance(pretrained, Defense)
    assert isinstance(finetuned, Defense)
    if not found or test.shape[0] not in (1, 3):
        return [], [], 0.0
    ids = torch.tensor(sorted(found), device=test.images.device)
    x = test.images[ids]
    adversarial = torch.stack([found[i] for i in ids.tolist()]).to(x)
    key = (derive_seed(seed, "gallery"), ids, 0)
    with torch.no_grad():
        corrupted = (finetuned.transform(adversarial, *key)[:: finetuned.transform.copies, :-2] + 1) / 2
        purified = [defense.purify(adversarial, *key).clamp(0, 1) for defense in (pretrained, finetuned)]

        def row(title: str, images: Tensor) -> tuple[str, Tensor, list[str]]:
            return title, images, [test.classes[int(c)] for c in finetuned.classify(images, *key).argmax(dim=1)]

        rows = [row("clean", x), row("adversarial", adversarial)]
        rows.append(("perturbation\nx 10", 10 * (adversarial - x), [""] * len(x)))
        rows += [row("corrupted", corrupted), row("purified,\npre-trained", purified[0])]
        rows.append(row("purified,\nfine-tuned", purified[1]))
    # In other balls a pixel may change by more than the radius.
    largest = threat["eps"] if threat["norm"] == "Linf" else float((adversarial - x).abs().amax())
    return rows, [test.classes[c] for c in test.labels[ids].tolist()], max(largest, 1e-6)
