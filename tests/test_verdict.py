"""Verdicts: definitions, intervals, fresh draws, and models whose true accuracy is known."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atop_fast import RT2, Defense, Verdict, build_classifier, evaluate
from atop_fast.evaluation import quick_attacks, wilson_interval
from atop_fast.randomness import Tag, random_uniform

Y = torch.arange(100) % 10
X = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class CoinFlip(nn.Module):
    """Answers correctly with a given probability in every draw, whatever the image: its robust accuracy is known."""

    def __init__(self, accuracy: float, labels: torch.Tensor) -> None:
        super().__init__()
        self.accuracy, self.labels, self.calls = accuracy, labels, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        heads = random_uniform((), 5, torch.arange(len(x)), self.calls, Tag.NOISE) < self.accuracy
        return F.one_hot(torch.where(heads, self.labels, (self.labels + 1) % 10), 10) + 0 * x.mean()


def test_definitions_on_a_small_example():
    predictions = torch.tensor([[1, 1, 1], [1, 1, 2], [2, 2, 1], [3, 1, 2]])
    verdict = Verdict.from_predictions(predictions, torch.ones(4, dtype=torch.int64))
    assert verdict.mean == pytest.approx(7 / 12)
    # The last image's three-way tie is no majority.
    assert verdict.majority == 0.5
    assert verdict.worst == 0.25
    assert (verdict.draws, verdict.images) == (3, 4)


def test_deterministic_predictions_make_the_three_measures_coincide():
    predictions = torch.randint(0, 3, (50, 1)).expand(-1, 7)
    v = Verdict.from_predictions(predictions, torch.zeros(50, dtype=torch.int64))
    assert v.mean == v.majority == v.worst
    assert v.mean_ci == v.majority_ci == v.worst_ci


@pytest.mark.parametrize(("p", "n"), [(0.0, 10), (0.3, 40), (0.5, 200), (0.97, 200), (1.0, 10)])
def test_wilson_solves_its_equation(p, n):
    low, high = wilson_interval(p, n)
    assert 0 <= low <= p <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(bound - p) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), rel=1e-5)


def test_wilson_covers():
    generator = torch.Generator().manual_seed(0)
    for p in (0.05, 0.5, 0.9):
        hits = 0
        for _ in range(400):
            low, high = wilson_interval(float((torch.rand(100, generator=generator) < p).double().mean()), 100)
            hits += low <= p <= high
        assert hits >= 400 * 0.95 - 4 * math.sqrt(400 * 0.95 * 0.05)


def test_coin_flip_gets_its_true_accuracy():
    report = evaluate(CoinFlip(0.9, Y), X, Y, attacks={"none": lambda x, y, ids: x}, batch_size=100, progress=False)
    for verdict in (report.clean, report.attacks["none"]):
        assert verdict.mean_ci[0] <= 0.9 <= verdict.mean_ci[1]
        assert verdict.majority == 1
        assert verdict.worst_ci[0] <= 0.9**20 <= verdict.worst_ci[1]


def test_attack_and_verdict_draws_are_disjoint():
    """The verdict never calls the defence with a key that an attack used."""
    seen: dict[str, set] = {"attack": set(), "verdict": set()}

    class Spy(RT2):
        def forward(self, x, seed=0, sample_ids=None, draws=0):
            phase = "attack" if torch.is_grad_enabled() else "verdict"
            seen[phase] |= {(seed, int(i), int(d)) for i, d in zip(sample_ids, draws, strict=True)}
            return super().forward(x, seed, sample_ids, draws)

    classifier = build_classifier("small_cnn", channels=1)
    defense = Defense(Spy(4), None, classifier)
    attacks = quick_attacks(defense, eps=0.1, steps=3)
    evaluate(defense, X[:4], Y[:4], attacks=attacks, draws=5, progress=False)
    # 4 draws of FGSM and of the first PGD step coincide; PGD has 3 steps.
    assert len(seen["attack"]) == 4 * 4 * 3
    # One more, with draw 0 of seed 0: the trial that the model takes the images at all.
    assert len(seen["verdict"]) == 4 * 5 * 3 + 1
    assert not seen["attack"] & seen["verdict"]


def test_report_does_not_depend_on_batches_and_repeats():
    # The classes are pixels, and the right one is brighter by little more than the noise.
    defense = Defense(RT2(4, sigma=0.1), None, nn.Flatten())
    x = X / 2
    x.flatten(1)[torch.arange(100), Y] = 0.7

    def run(**options):
        attacks = quick_attacks(defense, eps=0.1, steps=2, seed=options["seed"])
        report = evaluate(defense, x, Y, attacks=attacks, draws=4, progress=False, **options)
        return json.dumps(report.to_dict())

    first = run(seed=0)
    assert run(seed=0) == first
    assert run(seed=1) != first
    small, whole = json.loads(run(seed=0, batch_size=7, max_batch=5)), json.loads(first)
    # No convolution rounds differently for other batch sizes here: the reports are equal.
    assert small == whole


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_a_stopped_evaluation_resumes_to_the_same_report(tmp_path, stop_at):
    defense = Defense(RT2(4, sigma=0.1), None, nn.Flatten())
    calls = 0

    def attacks(fail_at=None):
        def counted(attack):
            def run(x, y, ids):
                nonlocal calls
                calls += 1
                if calls == fail_at:
                    raise KeyboardInterrupt
                return attack(x, y, ids)

            return run

        return {name: counted(attack) for name, attack in quick_attacks(defense, eps=0.1, steps=2).items()}

    options = {"draws": 3, "batch_size": 30, "progress": False}
    whole = evaluate(defense, X, Y, attacks=attacks(), **options)
    calls = 0
    path = tmp_path / "evaluate.pt"
    with pytest.raises(KeyboardInterrupt):
        evaluate(defense, X, Y, attacks=attacks(fail_at=stop_at), checkpoint=path, **options)
    calls = 0
    assert evaluate(defense, X, Y, attacks=attacks(), checkpoint=path, **options) == whole
    # Four batches for each of two attacks; only what was missing is attacked again.
    assert calls == 8 - (stop_at - 1)
    with pytest.raises(ValueError, match="evaluate: checkpoint must be a checkpoint of this run"):
        evaluate(defense, X, Y, attacks=attacks(), checkpoint=path, **options, seed=1)
    other = Defense(RT2(4, sigma=0.2), None, nn.Flatten())
    with pytest.raises(ValueError, match="evaluate: checkpoint must be a checkpoint of this run"):
        evaluate(other, X, Y, attacks=attacks(), checkpoint=path, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "pattern"),
    [
        ({"draws": 0}, ValueError, "evaluate: draws must be an integer and >= 1, got 0"),
        ({"attacks": {"clean": None}}, ValueError, "evaluate: attacks must be named otherwise than the clean images"),
        ({"eps": -1.0}, ValueError, "FGSM: eps must be finite and >= 0"),
        (
            {"model": nn.Conv2d(3, 1, 1)},
            ValueError,
            r"evaluate: x must be images that the networks take, got \(1, 8, 8\)",
        ),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "evaluate: x must be at least one, got none"),
        ({"x": X + float("nan")}, ValueError, "evaluate: x must be finite, got NaN or infinity"),
        ({"y": Y + 5}, ValueError, "evaluate: y must be class indices below the model's 10 logits, got 14"),
        ({"model": lambda x: x.flatten(1) / 0}, ValueError, "evaluate: model must be a callable with finite logits"),
    ],
    ids=["draws", "attacks", "eps", "channels", "empty", "nan", "labels", "logits"],
)
def test_wrong_input_is_named(arguments, error, pattern):
    call = {"model": CoinFlip(1.0, Y), "x": X, "y": Y, "progress": False, **arguments}
    with pytest.raises(error, match=pattern):
        evaluate(call.pop("model"), call.pop("x"), call.pop("y"), **call)
