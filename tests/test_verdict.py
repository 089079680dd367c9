"""Verdicts: definitions, intervals, emulated rules, and random classifiers whose true accuracy is known."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atop_fast import RT1, Defense, Verdict, evaluate
from atop_fast.evaluation import bootstrap_interval, emulated_verdicts, wilson_interval

LABELS = torch.arange(100) % 10


def test_definitions_on_a_small_example():
    predictions = torch.tensor([[1, 1, 1], [1, 1, 2], [2, 2, 1], [3, 1, 2]])
    verdict = Verdict.from_predictions(predictions, torch.ones(4, dtype=torch.int64))
    assert verdict.mean == pytest.approx(7 / 12)
    # The last image's three-way tie is no majority.
    assert verdict.majority == 0.5
    assert verdict.worst == 0.25
    assert (verdict.draws, verdict.images) == (3, 4)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert Verdict.from_predictions(predictions.byte(), torch.ones(4, dtype=dtype)) == verdict


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


def test_bootstrap_is_keyed_and_about_as_wide_as_the_normal_interval():
    values = torch.rand(300, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == bootstrap_interval(values, seed=1)
    assert (low, high) != bootstrap_interval(values, seed=2)
    mean, error = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(300)
    assert low == pytest.approx(mean - error, abs=0.2 * error)
    assert high == pytest.approx(mean + error, abs=0.2 * error)
    assert bootstrap_interval(torch.ones(5)) == (1.0, 1.0)


def test_bootstrap_covers():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(torch.rand(60, generator=generator) ** 2, seed, resamples=400)
        hits += low <= 1 / 3 <= high
    # A percentile bootstrap of 60 values covers a little less than it says.
    assert 200 * 0.93 - 4 * math.sqrt(200 * 0.93 * 0.07) <= hits < 200


def test_the_mean_takes_the_interval_that_is_asked_for():
    predictions = torch.randint(0, 2, (80, 20), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(80, dtype=torch.int64)
    wilson = Verdict.from_predictions(predictions, labels)
    bootstrap = Verdict.from_predictions(predictions, labels, "bootstrap", 3)
    assert bootstrap.mean_ci == bootstrap_interval((predictions == 0).double().mean(dim=1), 3)
    assert wilson.mean_ci[0] < bootstrap.mean_ci[0] < bootstrap.mean_ci[1] < wilson.mean_ci[1]
    assert bootstrap.worst_ci == wilson.worst_ci
    with pytest.raises(ValueError, match="Verdict: interval must be one of 'wilson', 'bootstrap', got 'exact'"):
        Verdict.from_predictions(predictions, labels, "exact")


def test_emulated_rules_on_a_small_example():
    # Two candidates, two images, three draws.
    correct = torch.tensor([[[1, 1, 1], [1, 0, 1]], [[1, 0, 0], [0, 1, 1]]]).bool()
    emulated = emulated_verdicts(correct)
    assert emulated["single_draw"]["accuracy"] == 0.5
    assert emulated["fixed_draws"]["accuracy"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert emulated["fixed_draws"]["draws"] == 3
    assert not emulated["single_draw"]["sound"]
    # One draw of a random model is as unsound.
    assert not emulated_verdicts(correct[:, :, :1])["single_draw"]["sound"]
    assert emulated_verdicts(correct[:, :, :1], deterministic=True)["fixed_draws"]["sound"]


class PerDraw(nn.Module):
    """Right with a given probability in every draw of torch's global generator; the first pixel tells the label."""

    def __init__(self, accuracy: float, seed: int) -> None:
        super().__init__()
        self.accuracy, self.seed = accuracy, seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _answer(x.flatten(1)[:, 0], torch.rand(len(x)) < self.accuracy)


class PerSample(PerDraw):
    """Right on some of the samples, always the same ones; the second pixel tells the sample."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        luck = torch.rand(256, generator=torch.Generator().manual_seed(self.seed))
        return _answer(x.flatten(1)[:, 0], luck[(255 * x.flatten(1)[:, 1]).round().long()] < self.accuracy)


class Counter(PerDraw):
    """Right except in every tenth call, for every image: the randomness is a counter of Python's."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        turn = (torch.arange(len(x)) * 7 + self.calls + self.seed) % 10
        return _answer(x.flatten(1)[:, 0], turn > 0)


class FirstBlock(nn.Module):
    """Wrong iff the mask of RT1 hides the first of the four pixels; the other three tell the label."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _answer(x.flatten(1)[:, 1:].median(dim=1).values, x.flatten(1)[:, 0] > 0.75)


def _answer(coded: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    labels = (20 * coded).round().long()
    return F.one_hot(torch.where(right, labels, (labels + 1) % 10), 10).float()


def _images() -> torch.Tensor:
    x = (LABELS / 20)[:, None].repeat(1, 4)
    x[:, 1] = torch.arange(100) / 255
    return x.view(100, 1, 2, 2)


def _defense(seed: int) -> Defense:
    return Defense(RT1(patch=1, mask_ratio=0.25), None, FirstBlock())


def _masked_images() -> torch.Tensor:
    x = (LABELS / 20)[:, None].repeat(1, 4)
    x[:, 0] = 1
    return x.view(100, 1, 2, 2)


KNOWN = {
    "0.5 a draw": (0.5, lambda seed: PerDraw(0.5, seed), _images()),
    "0.9 a draw": (0.9, lambda seed: PerDraw(0.9, seed), _images()),
    "0.99 a draw": (0.99, lambda seed: PerDraw(0.99, seed), _images()),
    "0.9 a sample": (0.9, lambda seed: PerSample(0.9, seed), _images()),
    "0.9 by a counter": (0.9, lambda seed: Counter(0.9, seed), _images()),
    "0.75 by the mask": (0.75, _defense, _masked_images()),
}


def _same(x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return x


def _judged(case: str, seed: int, attacks: int = 2):
    _, model, x = KNOWN[case]
    named = {f"attack{i}": _same for i in range(attacks)}
    options = {"selection_draws": 3, "diagnostics": (), "progress": False}
    return evaluate(model(seed), x, LABELS, attacks=named, seed=seed, **options)


# The first tier has a random sample and a random transform.
LONG = ("0.5 a draw", "0.9 a draw", "0.99 a draw", "0.9 by a counter")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in LONG else ()) for case in KNOWN])
def test_the_true_accuracy_lies_in_the_interval(case):
    """Intervals cover the accuracy of a random classifier that no attack can harm, in at least 90 of 100 seeds."""
    p, hits, single, fixed = KNOWN[case][0], 0, [], []
    for seed in range(100):
        report = _judged(case, seed)
        hits += all(v.mean_ci[0] <= p <= v.mean_ci[1] for v in (report.clean, report.robust, report.eight_bit))
        single.append(report.emulated["single_draw"]["accuracy"])
        fixed.append(report.emulated["fixed_draws"]["accuracy"])
    assert hits >= 90
    independent = case not in ("0.9 a sample", "0.9 by a counter")
    if independent:
        # Three candidates: the clean image and two attacks'.
        wrong = p**3
        assert sum(single) / 100 == pytest.approx(wrong, abs=4 * math.sqrt(wrong * (1 - wrong) / 100 / 100))
        assert sum(fixed) / 100 == pytest.approx(_least_of_three(p), abs=0.005)
        assert sum(fixed) / 100 < p - 0.005


def test_four_attacks_give_a_coin_of_090_the_score_of_059():
    single = [_judged("0.9 a draw", seed, attacks=4).emulated["single_draw"]["accuracy"] for seed in range(10)]
    assert sum(single) / 10 == pytest.approx(0.59, abs=4 * math.sqrt(0.59 * 0.41 / 1000))


def test_majority_and_worst_of_a_coin():
    report = _judged("0.9 a draw", 0)
    assert report.robust.majority == 1
    assert report.robust.worst_ci[0] <= 0.9**20 <= report.robust.worst_ci[1]


def _least_of_three(p: float, draws: int = 20) -> float:
    """Expected least share of right ones among three candidates with 20 draws of a coin each."""
    mass = [math.comb(draws, k) * p**k * (1 - p) ** (draws - k) for k in range(draws + 1)]
    return sum(sum(mass[k:]) ** 3 for k in range(1, draws + 1)) / draws
