"""The resubmission curve: all subsets of draws, the hypergeometric distribution, draws of a known accuracy."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy import stats

from atop_fast import RT2, Defense, build_classifier, evaluate
from atop_fast.evaluation import Verdict, bootstrap_interval, resubmission_curve, survival, wilson_interval
from atop_fast.randomness import seeded


@pytest.mark.parametrize("draws", [1, 2, 5, 8])
def test_equals_the_enumeration_of_all_subsets(draws):
    correct = torch.tensor(list(itertools.product((False, True), repeat=draws)))
    values = survival(correct)
    assert values.shape == correct.shape
    for tries in range(1, draws + 1):
        subsets = [correct[:, list(subset)].all(dim=1) for subset in itertools.combinations(range(draws), tries)]
        expected = torch.stack(subsets).double().mean(dim=0)
        torch.testing.assert_close(values[:, tries - 1], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("draws", [20, 150])
def test_equals_the_hypergeometric_distribution(draws):
    right = torch.arange(draws + 1)
    values = survival(torch.arange(draws) < right[:, None])
    # M drawn of K, c of them right: all M are.
    for tries in range(1, draws + 1):
        expected = stats.hypergeom(draws, right.numpy(), tries).pmf(tries)
        torch.testing.assert_close(values[:, tries - 1], torch.from_numpy(expected), rtol=1e-9, atol=0)
    assert (values.diff(dim=1) <= 0).all()


def test_unbiased_where_the_accuracy_of_a_draw_is_known():
    generator = torch.Generator().manual_seed(0)
    p, draws = 0.8, 6
    values = survival(torch.rand(40000, draws, generator=generator) < p)
    expected = p ** torch.arange(1, draws + 1)
    error = values.std(dim=0) / 200
    assert ((values.mean(dim=0) - expected).abs() < 4 * error).all()
    # The estimate from the first M draws is unbiased too, and varies more.
    assert (values.var(dim=0) < expected * (1 - expected))[:-1].all()


@pytest.mark.parametrize("interval", ["wilson", "bootstrap"])
def test_begins_at_the_mean_and_ends_at_the_worst(interval):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (60,), generator=generator)
    predictions = torch.where(torch.rand(60, 10, generator=generator) < 0.9, labels[:, None], 3)
    verdict = Verdict.from_predictions(predictions, labels, interval, seed=4)
    points = resubmission_curve(predictions == labels[:, None], interval, seed=4)
    assert [point["tries"] for point in points] == list(range(1, 11))
    assert points[0]["accuracy"] == pytest.approx(verdict.mean, abs=1e-12)
    assert points[0]["accuracy_ci"] == pytest.approx(list(verdict.mean_ci), abs=1e-12)
    assert points[-1]["accuracy"] == verdict.worst
    assert points[-1]["accuracy_ci"] == list(verdict.worst_ci)
    for point in points:
        low, high = point["accuracy_ci"]
        assert low <= point["accuracy"] <= high


def test_intervals_cover_what_they_say():
    """Images of accuracies 0.5 .. 1; the true share that survives 4 tries lies in about 95 % of the intervals."""
    generator, runs = torch.Generator().manual_seed(2), 150
    accuracy = 0.5 + torch.rand(runs, 100, 1, generator=generator) / 2
    correct = torch.rand(runs, 100, 8, generator=generator) < accuracy
    truth = (1 - 0.5**5) / 5 / 0.5
    covered = {"wilson": 0, "bootstrap": 0}
    for name in covered:
        for run, right in enumerate(correct):
            low, high = resubmission_curve(right, name, seed=run)[3]["accuracy_ci"]
            covered[name] += low <= truth <= high
    assert covered["wilson"] >= 0.97 * runs
    assert 0.89 * runs <= covered["bootstrap"]


def test_columns_of_a_bootstrap_are_those_of_one():
    generator = torch.Generator().manual_seed(3)
    correct = torch.rand(50, 5, generator=generator) < 0.7
    values = survival(correct)
    points = resubmission_curve(correct, "bootstrap", seed=9)
    for column in range(4):
        assert points[column]["accuracy_ci"] == pytest.approx(bootstrap_interval(values[:, column], 9), abs=1e-12)


def test_one_draw_is_a_share_of_images():
    correct = torch.tensor([[True], [False], [True], [True]])
    (point,) = resubmission_curve(correct)
    assert point == {"tries": 1, "accuracy": 0.75, "accuracy_ci": list(wilson_interval(0.75, 4))}


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"survival: correct must be bool of shape \(images, K\), not empty, got"):
        survival(torch.ones(3, 4))
    with pytest.raises(ValueError, match="survival: correct"):
        survival(torch.zeros(0, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="resubmission_curve: interval must be one of 'wilson', 'bootstrap'"):
        resubmission_curve(torch.ones(3, 4, dtype=torch.bool), "exact")


def test_report_has_the_curve(tmp_path):
    with seeded(0):
        model = Defense(RT2(4, sigma=0.3), None, build_classifier("small_cnn", channels=1).eval())
    x, y = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    options = {"draws": 5, "selection_draws": 2, "diagnostics": (), "progress": False}
    report = evaluate(model, x, y, attacks={"none": lambda x, y: x}, out=tmp_path / "random", **options)
    curve = report.to_dict()["resubmission"]
    assert list(curve) == ["clean", "robust"]
    for name, points in curve.items():
        verdict = getattr(report, name)
        assert points[0]["accuracy"] == pytest.approx(verdict.mean)
        assert points[-1]["accuracy"] == verdict.worst
    assert "accuracy against tries" in (tmp_path / "random/report.html").read_text()
    # A deterministic model has no curve.
    evaluate(model.classifier, x, y, attacks={"none": lambda x, y: x}, out=tmp_path / "plain", **options)
    assert "accuracy against tries" not in (tmp_path / "plain/report.html").read_text()
