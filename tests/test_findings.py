"""Findings on an evaluation: whether its attacks take the draws that the doctor recommends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from atop_fast import APGD, FGSM, PGD, RT2, Defense, Square, evaluate
from atop_fast.evaluation import PROTOCOLS
from atop_fast.evaluation.findings import draws_finding
from atop_fast.evaluation.protocols import build_attacks

DEFENSE = Defense(RT2(4, sigma=0.1), None, nn.Flatten())


def noise(draws):
    numbers = {"recommended_eot_iter": draws}
    return [{"name": "gradient_noise", "status": "pass", "reason": "", "numbers": numbers}]


# Protocol -> draws over which its strongest attack averages, as docs/diagnostics.md says.
@pytest.mark.parametrize(("protocol", "draws"), [("quick", 10), ("eot-fast", 40), ("pgd-eot", 20), ("paper", 1)])
def test_fewer_draws_than_recommended_are_a_finding(protocol, draws):
    attacks = build_attacks(PROTOCOLS[protocol], DEFENSE, "Linf", 0.1, 0)
    assert draws_finding(noise(draws), attacks) == []
    (finding,) = draws_finding(noise(draws + 1), attacks)
    assert (finding["name"], finding["status"]) == ("draws", "warn")
    assert f"asks for {draws + 1} draws" in finding["reason"]
    assert max(value for name, value in finding["numbers"].items() if name != "recommended") == pytest.approx(draws)


def test_what_counts_as_draws():
    assert draws_finding(noise(16), {"few": PGD(DEFENSE, steps=3, momentum=0.9, eot_iter=5)})
    assert draws_finding(noise(15), {"few": PGD(DEFENSE, steps=3, momentum=0.9, eot_iter=5)}) == []
    assert draws_finding(noise(8), {"all": PGD(DEFENSE, steps=8, momentum=1.0)}) == []
    assert draws_finding(noise(2), {"one": APGD(DEFENSE)})
    # The strongest of the attacks counts, and a search without a gradient averages nothing.
    assert draws_finding(noise(8), {"one": APGD(DEFENSE), "many": FGSM(DEFENSE, eot_iter=8)}) == []
    assert draws_finding(noise(2), {"square": Square(DEFENSE), "own": lambda x, y: x}) == []
    assert draws_finding(noise(None), {"many": FGSM(DEFENSE, eot_iter=64)})[0]["reason"].startswith(
        "The gradient's noise asks for more than 64 draws"
    )
    assert draws_finding([], {"one": APGD(DEFENSE)}) == []


def test_the_finding_stands_beside_the_verdict():
    x, y = torch.rand(4, 1, 4, 4), torch.arange(4)
    options = {"draws": 2, "selection_draws": 2, "progress": False, "eps": 0.1, "diagnostics": noise(20)}
    attacks = {"pgd": PGD(DEFENSE, 0.1, steps=2)}
    names = [f["name"] for f in evaluate(DEFENSE, x, y, attacks=attacks, **options).diagnostics]
    assert names[:2] == ["gradient_noise", "draws"]
    # A deterministic model has one draw.
    attacks = {"pgd": PGD(nn.Flatten(), 0.1, steps=2)}
    names = [f["name"] for f in evaluate(nn.Flatten(), x, y, attacks=attacks, **options).diagnostics]
    assert "draws" not in names
