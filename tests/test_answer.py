"""The summary of a run: paired gains of the defense, chance, and predictions that hardly depend on the images."""

from __future__ import annotations

import math

import pytest
import torch

from atop_fast import evaluate
from atop_fast.evaluation.report import format_table
from atop_fast.evaluation.verdict import paired_interval
from atop_fast.recipes.answer import answer, paired_gains


def report(clean, robust, attacked=None, chance=0.1, diagnostics=(), complete=True):
    """The part of an evaluation's report that the answer reads."""
    attacked = [True] * len(clean) if attacked is None else attacked
    rows = zip(clean, robust, attacked, strict=True)
    samples = [{"clean": c, "robust": r, "attacked": a} for c, r, a in rows]
    mean = sum(robust) / len(robust)
    verdict = {"mean_ci": [mean - 0.1, mean + 0.1]}
    found = {"samples": samples, "chance": chance, "robust": verdict, "diagnostics": list(diagnostics)}
    return {**found, "complete": complete}


def test_the_interval_is_agresti_and_min_s():
    """For yes and no on both sides: b and c are the pairs in which one alone is right."""
    b, c, same = 3, 9, 28
    n = b + c + same + 2
    mean = (c - b) / n
    half = 1.959963984540054 * math.sqrt((b + c + 1 - (c - b) ** 2 / n) / n**2)
    differences = torch.cat([-torch.ones(b), torch.ones(c), torch.zeros(same)])
    assert paired_interval(differences) == pytest.approx((mean - half, mean + half))
    # It is never a point, and never beyond what a difference can be.
    low, high = paired_interval(torch.ones(10))
    assert (low < 0.7, high) == (True, 1)
    low, high = paired_interval(torch.zeros(10))
    assert -high == low < -0.1
    for wrong in (torch.zeros(0), torch.zeros(2, 2), torch.tensor([1.5]), torch.tensor([torch.nan])):
        with pytest.raises(ValueError, match="paired_interval: differences must be of shape"):
            paired_interval(wrong)


@pytest.mark.parametrize(("count", "gain"), [(20, 0.0), (20, 0.3), (100, 0.05), (100, 0.6)])
def test_the_interval_covers(count, gain):
    """Differences of shares of 20 draws of images that are unlike one another."""
    generator, covered, rounds = torch.Generator().manual_seed(0), 0, 1000
    for _ in range(rounds):
        accuracy = torch.rand(count, generator=generator) * (1 - gain)
        draws = torch.rand(count, 40, generator=generator)
        own, other = (draws[:, :20] < accuracy[:, None] + gain), (draws[:, 20:] < accuracy[:, None])
        low, high = paired_interval(own.double().mean(1) - other.double().mean(1))
        covered += low <= gain <= high
    # Three standard errors below 0.95.
    assert covered >= 0.95 * rounds - 3 * math.sqrt(0.95 * 0.05 * rounds)


def test_gains_are_of_pairs_that_both_attacks_reached():
    own = report([1.0, 1.0, 0.5, 1.0], [1.0, 0.5, 0.5, 0.25], [True, True, True, False])
    other = report([1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [True, True, False, False])
    gains = paired_gains({"classifier": other, "finetuned": own})["classifier"]
    assert gains["robust"]["difference"] == 0.75
    assert gains["robust"]["accuracies"] == [0.75, 0.0]
    assert gains["robust"]["images"] == 2
    assert gains["robust"]["interval"] == list(paired_interval(torch.tensor([1.0, 0.5])))
    assert gains["clean"]["difference"] == pytest.approx((0 + 1 - 0.5 + 0) / 4)
    assert gains["clean"]["images"] == 4
    none = paired_gains({"classifier": report([1.0], [1.0], [False]), "finetuned": report([1.0], [1.0])})
    assert none["classifier"]["robust"] is None


@pytest.mark.parametrize(
    ("own", "other", "verb"),
    [(0.9, 0.1, "helps"), (0.1, 0.9, "harms"), (0.5, 0.5, "makes no difference that these images show")],
)
def test_the_first_sentence_is_the_gain(own, other, verb):
    reports = {"classifier": report([1.0] * 30, [other] * 30), "finetuned": report([0.9] * 30, [own] * 30)}
    lines = answer(paired_gains(reports), reports, "quick")
    assert lines[0].startswith(
        f"The defense {verb}. Under attack (protocol quick): accuracy {own:.3f} with the defense"
    )
    assert f"{own - other:+.3f} [" in lines[0]
    assert "on the same 30 images" in lines[0]
    assert "-0.100 [" in lines[1]
    assert "would score 0.100" in lines[2]
    assert ("not above that beyond doubt" in " ".join(lines)) is (own == 0.1)
    assert "upper bound" not in " ".join(lines)
    cut = {**reports, "finetuned": {**reports["finetuned"], "complete": False}}
    assert "upper bound" in " ".join(answer(paired_gains(cut), cut, "quick"))


def test_without_attacked_images_there_is_no_answer():
    reports = {"classifier": report([1.0], [1.0], [False]), "finetuned": report([1.0], [1.0], [False])}
    assert answer(paired_gains(reports), reports, "quick")[0].endswith("no answer.")


def test_constant_predictions_are_flagged():
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 4
    options = {"attacks": {"none": lambda x, y: x}, "diagnostics": (), "progress": False, "eps": 0}

    def model(share):
        """Class 2 for the first of the images, the brightest, and the label for the others."""

        def logits(batch):
            scores = torch.zeros(len(batch), 4)
            places = (batch.flatten(1)[:, None] == x.flatten(1)).all(2).double().argmax(1)
            scores[torch.arange(len(batch)), torch.where(places < 20 * share, 2, y[places])] = 1
            return scores

        return logits

    found = evaluate(model(1.0), x, y, **options)
    assert found.chance == 0.25
    assert [d["name"] for d in found.diagnostics] == ["constant"]
    assert "100% of the predictions on clean images are class 2, the most frequent class has 25%" in str(
        found.to_dict()
    )
    assert not evaluate(model(0.5), x, y, **options).diagnostics
    # If one class has nearly all images, a constant prediction is not suspicious.
    assert not evaluate(model(1.0), x, torch.full_like(y, 2), **options).diagnostics
    reports = {"classifier": report([1.0], [1.0]), "finetuned": report([1.0], [1.0], diagnostics=found.diagnostics)}
    assert "finetuned: 100% of the predictions" in " ".join(answer(paired_gains(reports), reports, "quick"))


def test_tables_mark_what_a_budget_cut():
    verdict = {"mean": 0.5, "mean_ci": [0.4, 0.6], "majority": 0.5, "worst": 0.5, "images": 40, "draws": 20}
    reached = {**verdict, "mean": 0.0125, "images": 8}
    whole = {"clean": verdict, "robust": verdict, "eight_bit": verdict, "pgd": verdict}
    text = format_table({"whole": whole, "cut": {**whole, "pgd": reached}, "none": {**whole, "pgd": None}}, 0.2)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert "<=" not in lines["whole"]
    assert lines["cut"].count("<= 0.500") == lines["none"].count("<= 0.500") == 2
    assert "0.013 [0.40, 0.60] (8 of 40 attacked)" in lines["cut"]
    assert "0 of 40 attacked" in lines["none"]
    assert text.endswith("chance, by always naming the most frequent class: 0.200")
    # A deterministic system has one number, and one row.
    assert text.count("majority / worst") == 3
    one = {name: {**v, "draws": 1} for name, v in whole.items()}
    assert format_table({"whole": whole, "one": one}).count("majority / worst") == 1
