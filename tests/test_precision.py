"""Precisions of networks, and the warning if one is slow."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from atop_fast import ClassifierConfig
from atop_fast._core import precision
from atop_fast.attacks import PGD
from atop_fast.bench import harness
from atop_fast.bench.harness import Case, Roofline, measure
from atop_fast.training.classifier import ClassifierStep

CPU = torch.device("cpu")
X, Y = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3))


@pytest.fixture
def slow(monkeypatch):
    """A CPU without 16-bit instructions."""
    for module in (precision, harness):
        monkeypatch.setattr(module, "is_fast", lambda device, name: name in ("float32", "tf32"))


def attack(name):
    PGD(network(), eps=0.1, steps=1, precision=name)(X, Y)


def train(name):
    ClassifierStep(network(), ClassifierConfig(precision=name), 0)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize(("run", "who"), [(attack, "PGD"), (train, "ClassifierStep")])
def test_slow_types_are_told(run, who, name):
    with pytest.warns(RuntimeWarning, match=f"{who}: networks in {name} are much slower than in float32 on this CPU"):
        run(name)


@pytest.mark.filterwarnings("ignore:.*much slower than in float32")
def test_restarts_are_ranked_in_the_type_of_the_networks():
    """A copy whose weights are cast runs in an autocast alone."""
    candidate = PGD(network(), eps=0.1, steps=10, n_restarts=2, precision="bfloat16")(X, Y)
    assert (candidate - X).abs().max() <= 0.1 + 1e-6


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(("run", "names"), [(attack, ["float32"]), (train, ["float32", "tf32"])])
def test_others_are_not(run, names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in names:
            run(name)


def test_what_torch_says_of_this_cpu_is_believed(monkeypatch):
    assert precision.is_fast(CPU, "float32")
    assert precision.is_fast(torch.device("cuda"), "bfloat16")
    for answer in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=answer: answer)
        assert precision.is_fast(CPU, "bfloat16") is answer
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert precision.is_fast(CPU, "bfloat16")


@pytest.mark.usefixtures("slow")
def test_benchmarks_leave_slow_types_out(capsys):
    run = {name: lambda: X for name in ("theirs", "ours", "ours bfloat16")}
    rows = measure(Case("ops", "x", "2", "float32", run, ["ours", "ours bfloat16"]), "cpu", 0.01, Roofline("cpu", 0.01))
    assert [row["variant"] for row in rows] == ["theirs", "ours"]
    assert "no ours bfloat16" in capsys.readouterr().out
