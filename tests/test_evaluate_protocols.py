"""Protocols: the settings of their sources, and what a cascade leaves out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from test_evaluate import DEFENSE, QUIET, X, Y
from torch import nn

from atop_fast import evaluate
from atop_fast.evaluation import PROTOCOLS, quick_attacks
from atop_fast.evaluation.protocols import Entry, Protocol, build_attacks
from atop_fast.evaluation.summary import whole_prefix


def test_quick_and_unknown_protocols():
    assert list(build_attacks(PROTOCOLS["quick"], DEFENSE, "Linf", 0.1, 0)) == ["fgsm", "pgd_eot"]
    assert all(plan.citation and plan.attacks for plan in PROTOCOLS.values())
    with pytest.raises(ValueError, match="evaluate: protocol must be one of 'quick', 'pgd-eot', 'autoattack-rand'"):
        evaluate(DEFENSE, X, Y, protocol="slow")


@pytest.mark.parametrize("name", ["pgd-eot", "bpda-eot"])
def test_pgd_protocols_run_with_their_settings(name, monkeypatch):
    plan = PROTOCOLS[name]
    (entry,) = plan.attacks.values()
    expected = {"pgd-eot": (200, 0.007, 20, "exact"), "bpda-eot": (50, 2 / 255, 15, "bpda")}[name]
    assert tuple(entry.options.get(k, "exact") for k in ("steps", "alpha", "eot_iter", "gradient")) == expected
    assert entry.options["random_start"] is False
    short = dataclasses.replace(plan, attacks={"short": Entry("PGD", {**entry.options, "steps": 3})})
    monkeypatch.setitem(PROTOCOLS, name, short)
    report = evaluate(DEFENSE, X[:8], Y[:8], protocol=name, progress=False)
    assert report.robust.draws == {"pgd-eot": 20, "bpda-eot": 150}[name]
    assert report.passes["short"]["backward"] == 8 * 3 * expected[2]


def test_quick_takes_80_passes_of_random_models_and_20_of_others():
    random, other = (build_attacks(PROTOCOLS["quick"], DEFENSE, "Linf", 0.1, 0, d)["pgd_eot"] for d in (False, True))
    assert (random.steps, random.eot_iter, random.momentum, random.schedule) == (80, 1, 0.9, "cosine")
    assert (other.steps, other.eot_iter, other.momentum, other.schedule) == (20, 1, 0.0, "constant")
    by_hand = quick_attacks(DEFENSE, "Linf", 0.1, 0)["pgd_eot"]
    assert torch.equal(by_hand(X[:8], Y[:8]), random(X[:8], Y[:8]))


def test_eot_fast_takes_400_passes_an_image():
    (attack,) = build_attacks(PROTOCOLS["eot-fast"], DEFENSE, "Linf", 0.1, 0).values()
    assert (attack.steps, attack.eot_iter, attack.momentum, attack.schedule) == (100, 4, 0.9, "cosine")


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_every_protocol_can_be_built(name, deterministic):
    plan = PROTOCOLS[name]
    named = build_attacks(plan, DEFENSE, plan.norm, plan.eps, 0, deterministic, max_batch=64)
    assert list(named) == list(plan.attacks)
    assert all(callable(attack) for attack in named.values())


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_runs_in_short(name, monkeypatch):
    plan, most = PROTOCOLS[name], {"steps": 3, "n_queries": 4, "eot_iter": 2}
    short = {
        key: Entry(entry.attack, {k: min(v, most[k]) if k in most else v for k, v in entry.options.items()})
        for key, entry in plan.attacks.items()
    }
    monkeypatch.setitem(PROTOCOLS, name, dataclasses.replace(plan, attacks=short))
    report = evaluate(DEFENSE, X[:8], Y[:8], protocol=name, **QUIET)
    assert report.complete
    assert report.attacks.keys() == plan.attacks.keys()
    assert (report.settings["norm"], report.settings["eps"], report.headline) == (plan.norm, plan.eps, plan.headline)
    # StAdv's candidates lie outside of the ball.
    assert all(s["distance"] <= plan.eps + 1e-5 for s in report.samples if s["attack"] != "stadv")


@pytest.mark.usefixtures("no_pictures")
def test_the_guide_lists_every_protocol_and_its_example_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlxtend")
    guide = (Path(__file__).parent.parent / "docs/evaluation.md").read_text(encoding="utf-8")
    table = guide.partition("## Protocols")[2].partition("\n\n`norm`")[0]
    rows = {row[0].strip(" `"): row for row in (line.split("|")[1:-1] for line in table.strip().splitlines()[2:])}
    assert list(rows) == list(PROTOCOLS)
    for name, plan in PROTOCOLS.items():
        assert int(rows[name][3]) == plan.draws
        assert plan.norm in rows[name][2]
        assert plan.headline is None or plan.headline in rows[name][1]
    monkeypatch.chdir(tmp_path)
    first, streamed = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    exec(first.replace("slice(0, 40)", "slice(0, 3)"), {})
    assert capsys.readouterr().out.endswith("True\n")
    exec(streamed, {})
    assert (tmp_path / "runs/mine/report.html").exists()


class Levels(nn.Module):
    """The classes are pixels in eight levels, whose gradient is 0."""

    def forward(self, x):
        return ((8 * x).round() / 8 + 0 * x).flatten(1)


@pytest.mark.parametrize(("model", "doubted"), [(Levels(), True), (nn.Flatten(), False)])
def test_fast_says_where_it_may_have_left_too_many(model, doubted, monkeypatch):
    plan = PROTOCOLS["fast"]
    short = {
        name: Entry(entry.attack, {key: 10 if key == "steps" else value for key, value in entry.options.items()})
        for name, entry in plan.attacks.items()
    }
    monkeypatch.setitem(PROTOCOLS, "fast", dataclasses.replace(plan, attacks=short))
    report = evaluate(model, X[:20], Y[:20], protocol="fast", eps=0.15, diagnostics=(), progress=False)
    left = [report.attacks[name].mean for name in ("pma", "apgd_t", "square")]
    assert (left[2] < left[1]) is doubted
    assert [finding["name"] for finding in report.diagnostics] == ["doubt"] * doubted


def test_a_cascade_attacks_only_what_still_stands(monkeypatch):
    entries = {"fgsm": Entry("FGSM"), "pgd": Entry("PGD", {"steps": 5})}
    plan = Protocol(entries, "test", eps=0.12, cascade=True)
    monkeypatch.setitem(PROTOCOLS, "paper", plan)
    # Images of many margins, so that FGSM fools some.
    x = X.clone()
    x.flatten(1)[torch.arange(100), Y] = torch.linspace(0.55, 0.85, 100)
    report = evaluate(nn.Flatten(), x, Y, protocol="paper", progress=False)
    standing = round(100 * report.attacks["fgsm"].mean)
    assert 0 < standing < 100
    assert report.passes["pgd"]["images"] == standing
    assert report.complete
    monkeypatch.setitem(PROTOCOLS, "paper", dataclasses.replace(plan, cascade=False))
    whole = evaluate(nn.Flatten(), x, Y, protocol="paper", progress=False)
    assert whole.passes["pgd"]["images"] == 100
    assert whole.robust == report.robust == report.attacks["pgd"]
    # A random defense is never done with an image.
    monkeypatch.setitem(PROTOCOLS, "paper", plan)
    assert evaluate(DEFENSE, X, Y, protocol="paper", **QUIET).passes["pgd"]["images"] == 100


def test_a_cut_cascade_does_not_count_all_that_earlier_attacks_fooled():
    """One attack fools every second of 20 images; the next one is cut after four of the others."""
    fooled = torch.arange(20) % 2 == 0
    done = torch.zeros(20, dtype=torch.bool)
    assert not whole_prefix(done, fooled).any()
    done[[1, 3, 5, 7]] = True
    assert whole_prefix(done, fooled).nonzero()[:, 0].tolist() == list(range(8))
    assert whole_prefix(~fooled, fooled).all()
    # With several processes, images beyond the first gap do not count.
    done[15] = True
    assert whole_prefix(done, fooled).nonzero()[:, 0].tolist() == list(range(8))
