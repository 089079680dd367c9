"""A recipe under a budget: what is planned, that a run keeps to it, and what its report says."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_engine import Line, run
from test_train import TINY, fail, files, tiny  # noqa: F401

from atop_fast import FinetuneConfig, PretrainConfig, load_model
from atop_fast._core.distributed import Group
from atop_fast.cli import main
from atop_fast.evaluation import PROTOCOLS
from atop_fast.recipes import budget
from atop_fast.recipes.evaluation import EvaluationConfig
from atop_fast.recipes.forecast import Forecast, too_little
from atop_fast.recipes.schema import load_recipe
from atop_fast.recipes.smaller import fitted, halved

STAGES = ["pretrain", "finetune", "evaluate"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told to go on; an update takes a second."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_training_fills_its_share_and_keeps_its_plan(tmp_path, clock):
    def train(config):
        clock[0] += config.updates

    config = FinetuneConfig(epochs=20, batch_size=10, average="ema", ce_from_epoch=5)
    made = budget.Budget(400, clock[0], tmp_path / "plan.json", STAGES, Group())
    short = made.train("pretrain", config, 1000, train)
    # A quarter of the time; the first two updates and the trial, three hundredths of it, come off.
    spent = 2 + 3
    assert short.updates == int(0.9 * 100) - spent
    assert made.plan == {"pretrain": {"seconds": 100, "updates": short.updates, "of": 2000}}
    assert (short.epochs, short.ce_from_epoch) == (1, 0)
    # The average forgets as much over the shorter training.
    assert short.ema_decay**short.updates == pytest.approx(config.ema_decay**2000)
    clock[0] += short.updates
    # Fine-tuning gets two thirds of what is left, and no more than the whole training needs.
    assert made.train("finetune", replace(config, epochs=1, ce_from_epoch=0), 100, train).updates == 10
    assert made.plan["finetune"]["seconds"] == pytest.approx((400 - spent - short.updates) * 2 / 3, abs=0.1)
    again = budget.Budget(400, clock[0], tmp_path / "plan.json", STAGES, Group())
    assert again.train("pretrain", config, 1000, lambda config: pytest.fail("it measured again")) == short
    assert again.left() == pytest.approx(400 - 100 - made.plan["finetune"]["seconds"])


def test_a_finished_stage_counts_with_the_time_that_it_took(tmp_path, clock):
    config, path = FinetuneConfig(epochs=1, updates=6, batch_size=10), tmp_path / "plan.json"
    made = budget.Budget(400, clock[0], path, STAGES, Group())
    made.train("pretrain", config, 100, lambda config: None, forecast=1.0)
    clock[0] += 6
    made.finish("pretrain")
    assert made.plan["pretrain"] == {"seconds": 6, "updates": 6, "of": 6}
    # A later process, such as one that goes on after --until, has the rest of the time; it did not begin this stage.
    again = budget.Budget(400, clock[0], path, STAGES, Group())
    again.finish("pretrain")
    assert again.left() == pytest.approx(394)


def test_a_short_time_is_not_spent_on_measuring(tmp_path, clock):
    """Four updates to measure would be more than the share of it, so that the forecast must do."""
    config = FinetuneConfig(epochs=20, batch_size=10, evaluate_every=1)
    made = budget.Budget(40, clock[0], tmp_path / "plan.json", STAGES, Group())
    short = made.train("pretrain", config, 1000, lambda config: pytest.fail("it measured"), forecast=1.0)
    assert short.updates == int(0.9 * 10)
    # Evaluations on held-out images have no time in the plan.
    assert short.evaluate_every == 0
    calls = []

    def train(config):
        calls.append(config.updates)
        clock[0] += config.updates / 100

    made.train("finetune", config, 1000, train, forecast=0.01)
    assert len(calls) == 2


def test_a_shorter_training_keeps_its_phases():
    config = FinetuneConfig(epochs=20, ce_from_epoch=4, ema_decay=0.99)
    short = budget.shorten(config, 500, 50 * config.batch_size)
    assert (short.updates, short.epochs, short.ce_from_epoch, short.ema_decay) == (500, 10, 2, 0.99**2)
    assert budget.shorten(PretrainConfig(epochs=2), 100, 50 * 64) == PretrainConfig(epochs=2, updates=100)


def test_a_budget_trains_no_longer_than_the_recipes_own_limit(tmp_path, clock):
    """Half of the 40 updates that the recipe allows, or all of them; not all that 20 epochs would have."""

    def train(config):
        clock[0] += config.updates

    config = FinetuneConfig(epochs=20, updates=40, batch_size=10, average="ema", ema_decay=0.99, ce_from_epoch=2)
    for name, seconds, expected in (("ample", 4000, 40), ("short", 27, 20)):
        made = budget.Budget(seconds, clock[0], tmp_path / name, ["finetune"], Group())
        short = made.train("finetune", config, 100, train)
        assert made.plan["finetune"] == {"seconds": seconds, "updates": expected, "of": 40}
        assert (short.updates, short.epochs) == (expected, expected // 10)
        assert short.ema_decay == pytest.approx(0.99 ** (40 / expected))


@pytest.mark.parametrize(
    ("rate", "protocol", "images"),
    [(1e6, "pgd-eot", 512), (2e3, "pgd-eot", None), (50.0, "quick", None), (0.5, "quick", 1)],
)
def test_an_evaluation_takes_what_fits(tmp_path, clock, rate, protocol, images):
    """All images; fewer; a lighter protocol; at least one image. The time is divided as the systems need it."""
    made = budget.Budget(400, clock[0], tmp_path / "plan.json", ["evaluate"], Group())
    config = EvaluationConfig("pgd-eot")
    # The rate is that of three systems together, which take turns.
    took = {"first": 100 / rate, "second": 400 / rate, "third": 500 / rate}
    planned = made.evaluate(config, 512, lambda: (1000, took))
    assert planned.protocol == protocol
    # Passes of the attack; 40 draws judge each candidate, and 20 the rounded one.
    passes = 200 * 20 + 0.4 * 100 if protocol == "pgd-eot" else 4 + 20 * 4 + 0.4 * 140
    assert planned.images == (images or int(0.8 * 400 * rate / passes))
    assert (*planned.threat, planned.draws or PROTOCOLS["pgd-eot"].draws) == ("Linf", 8 / 255, 20)
    # Each stage has its share, and the margin until another stage has used it.
    assert made.limit("first") == pytest.approx(400 - 0.8 * 360)
    clock[0] += 100
    assert made.limit("second") == pytest.approx(max(160, 300 - 0.8 * 200))
    clock[0] += 290
    assert made.limit("third") == pytest.approx(200)
    text = f"evaluation: {planned.images} of 512 images"
    assert text + (" by the protocol quick instead of pgd-eot" if protocol == "quick" else ",") in made.notes(config)[0]


def test_a_forecast_says_what_fits_and_what_would_be_enough():
    config = EvaluationConfig(steps=20, eot_iter=1, draws=20, selection_draws=20, images=200)
    trainings = {"classifier": (400, 0.1), "pretrain": (200, 0.1), "finetune": (1000, 0.1)}
    made = Forecast(trainings, config, 200, 1e-3)
    # A fifth of 100 s; a quarter of the 80 that are left; two thirds of 60; and 20 for the images.
    found = made.fits(100)
    assert {stage: n for stage, (n, _) in found.items() if stage != "evaluate"} == {
        "classifier": 180, "pretrain": 180, "finetune": 360
    }  # fmt: skip
    passes = 4 + 20 + 0.4 * (3 * 40 + 20)
    assert found["evaluate"] == (200, 200)
    assert made.fits(5)["evaluate"] == (int(0.8 / (1e-3 * passes)), 200)
    assert made.sentence(100) == (
        "About 1.67m hold: classifier 180 of 400 updates, pretrain 180 of 200 updates, finetune 360 of 1,000 updates, "
        "200 of 200 images attacked."
    )
    # A stage that needs less leaves it to the others, so that all fits in the end.
    assert made.fits(1000) == {**{stage: (n, n) for stage, (n, _) in trainings.items()}, "evaluate": (200, 200)}
    short = made.sentence(5)
    assert "finetune 18 of 1,000 updates" in short
    assert short.endswith("This resolves nothing; 1m would.")
    assert not too_little(made.fits(60))
    assert Forecast({"finetune": (10**6, 10.0)}, None, 0, 0.0).sentence(60).endswith("not even a week would be enough.")


def test_a_training_of_updates_ends_within_an_epoch():
    """With a schedule that ends there, too, and a history of its parts."""
    step = Line(epochs=3, updates=7, batch_size=3, lr=0.5)
    history = run(step)
    assert [len(ids) for ids in step.seen] == [3] * 7
    done = torch.arange(7, dtype=torch.float64) / 7
    torch.testing.assert_close(torch.tensor(step.rates, dtype=torch.float64), 0.25 * (1 + torch.cos(torch.pi * done)))
    assert len(history) == 7
    assert len(run(Line(epochs=20, updates=50, batch_size=3))) == 17
    assert len(run(Line(epochs=2, updates=50, batch_size=3))) == 8


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_run_ends_with_what_was_planned(tiny, capsys, monkeypatch):  # noqa: F811
    # A slow machine must not cut the evaluations, which would make of one plan two reports.
    monkeypatch.setattr(budget.Budget, "limit", lambda *_: 600.0)
    main(["train", "tiny.yaml", "--out=run", "--budget=1s"])
    said = capsys.readouterr().out
    assert said.index("About 1s hold: classifier ") < said.index("Accuracy of the classifier")
    assert "images attacked." in said
    plan = json.loads(Path("run/plan.json").read_text())
    assert list(plan) == ["classifier", *STAGES]
    report = json.loads(Path("run/report.json").read_text())
    assert report["budget"] == plan
    assert all(v["images"] == plan["evaluate"]["images"] for v in report["systems"]["finetuned"].values())
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for stage in ("classifier", "pretrain", "finetune"):
        assert max(line["updates"] for line in lines if line["training"] == stage) == plan[stage]["updates"]
    page = Path("run/report.html").read_text()
    assert f"pretrain: {plan['pretrain']['updates']} of {plan['pretrain']['of']} updates" in page
    # The same plan gives the same bits.
    Path("again").mkdir()
    for name in ("run.json", "plan.json"):
        shutil.copy(f"run/{name}", f"again/{name}")
    main(["train", "tiny.yaml", "--out=again", "--budget=1s"])
    assert Path("again/report.json").read_text() == Path("run/report.json").read_text()
    assert "another budget" in fail(capsys, "train", "tiny.yaml", "--out=run", "--budget=5s")
    assert "run_recipe: budget must be seconds, or text" in fail(capsys, "train", "tiny.yaml", "--budget=soon")


def test_an_evaluation_in_l1_keeps_its_protocol():
    """The attacks of "quick", which takes the place of a protocol that is too long, do not work in L1."""
    for norm, expected in (("L2", "quick"), ("L1", "paper")):
        config = EvaluationConfig(protocol="paper", norm=norm, eps=1.0)
        images, protocol = budget.evaluation_that_fits(config, 1000, 40_000.0)
        assert protocol == expected
        assert 1 <= images < 1000


def test_networks_shrink_where_that_gives_more():
    recipe = load_recipe("cifar10-native-rt2")
    half = halved(recipe)
    assert half.classifier.options == {"widths": [32, 64, 128]}
    assert half.purifier.options == {"width": 12, "blocks": 1}
    quarter = halved(half)
    # Eight channels are the fewest: the purifier stays.
    assert (quarter.classifier.options["widths"], quarter.purifier.options["width"]) == ([16, 32, 64], 12)
    given = replace(recipe, classifier=replace(recipe.classifier, path="x.pt"), purifier=quarter.purifier)
    assert halved(given) is None
    for name, options in (("vit_tiny", {}), ("wrn_28_10", {}), ("small_resnet", {"width": 12})):
        source = replace(recipe.classifier, name=name)
        assert halved(replace(given, classifier=source)) == (
            replace(given, classifier=replace(source, options=options)) if options else None
        )


@pytest.mark.parametrize(
    ("seconds", "faster", "halvings"),
    # A tenth of the updates fits as it is; half as wide is enough; a quarter is needed; halving gives too little.
    [(120, 4.0, 0), (30, 4.0, 1), (10, 4.0, 2), (10, 1.2, 0)],
)
def test_networks_are_halved_until_enough_fits(seconds, faster, halvings):
    recipe, asked = load_recipe("cifar10-native-rt2"), []

    def forecast(given):
        asked.append(given)
        return Forecast({"finetune": (1000, 1.0 / faster ** (len(asked) - 1))}, None, 0, 0.0)

    found, chosen, count = fitted(recipe, seconds, forecast, Group())
    assert count == halvings
    assert found == asked[halvings]
    assert chosen.trainings["finetune"][1] == 1.0 / faster**halvings


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_run_with_smaller_networks_resumes_and_is_repeated(tiny, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(budget.Budget, "limit", lambda *_: 600.0)
    monkeypatch.setattr("atop_fast.recipes.smaller.LEAST", 2)
    monkeypatch.setattr("atop_fast.recipes.smaller.TRIAL", 100.0)
    monkeypatch.setattr("atop_fast.recipes.smaller.ENOUGH", 2.0)
    monkeypatch.setattr("atop_fast.recipes.smaller.WORTH", 0.0)
    monkeypatch.setattr("atop_fast.recipes.smaller.MOST", 1)
    main(["train", "tiny.yaml", "--out=run", "--budget=3s", "--until=pretrain"])
    assert "are halved, but not to fewer than" in capsys.readouterr().out
    plan = json.loads(Path("run/plan.json").read_text())
    assert plan["networks"]["halvings"] == 1
    main(["train", "tiny.yaml", "--out=run", "--budget=3s"])
    report = json.loads(Path("run/report.json").read_text())
    assert "networks: channels halved;" in Path("run/report.html").read_text()
    assert load_model("run/finetuned.safetensors", "purifier").architecture[1]["width"] == 2
    main(["train", "run/recipe.yaml", "--out=again"])
    assert json.loads(Path("again/report.json").read_text())["systems"] == report["systems"]
