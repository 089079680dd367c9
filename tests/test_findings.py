"""Findings on an evaluation: draws, radius and model of its attacks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from atop_fast import APGD, BPDA, FGSM, PGD, RT2, Defense, Square, StAdv, evaluate
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


def test_attacks_of_a_smaller_radius_than_the_threat_model_are_a_finding():
    x, y = torch.rand(4, 1, 2, 2), torch.arange(4)
    model = nn.Flatten()
    options = {"progress": False, "diagnostics": False, "eps": 0.3}
    small = {"one": PGD(model, steps=2), "two": FGSM(model, 0.2)}
    with pytest.warns(UserWarning, match=r"evaluate: .* within eps 0\.0313725 \(one\), 0\.2 \(two\), and"):
        (finding,) = evaluate(model, x, y, attacks=small, **options).diagnostics
    assert (finding["name"], finding["status"], finding["numbers"]["two"]) == ("radius", "fail", 0.2)
    # One that reaches the radius, or whose radius is unknown, may be the one that counts.
    for further in (FGSM(model, 0.3), lambda x, y: x, StAdv(model, steps=1), PGD(model, 0.1, norm="L2", steps=1)):
        assert evaluate(model, x, y, attacks={**small, "further": further}, **options).diagnostics == []
    for protocol in ("quick", "fast"):
        assert evaluate(model, x, y, protocol=protocol, curve=(0.1,), **options).diagnostics == []


def test_the_radius_of_an_attack_of_torchattacks_counts():
    torchattacks = pytest.importorskip("torchattacks")
    x, y, model = torch.rand(4, 1, 2, 2), torch.arange(4), nn.Flatten()
    attacks = {"pgd": torchattacks.PGD(model, eps=8 / 255, steps=1)}
    with pytest.warns(UserWarning, match=r"within eps 0\.0313725 \(pgd\)"):
        evaluate(model, x, y, attacks=attacks, eps=0.3, progress=False, diagnostics=False)


def test_attacks_on_another_model_are_a_finding():
    x, y = torch.rand(4, 1, 4, 4), torch.arange(4)
    options = {"progress": False, "diagnostics": False, "eps": 0.1, "draws": 2, "selection_draws": 2}
    classifier, surrogate = (nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).eval() for _ in range(2))
    defense = Defense(RT2(4, sigma=0.1), None, classifier)

    def names(model, *attacked):
        attacks = {str(i): PGD(other, 0.1, steps=1) for i, other in enumerate(attacked)}
        found = evaluate(model, x, y, attacks=attacks, **options).diagnostics
        return [f["name"] for f in found if f["name"] != "constant"]

    for model, other in ((defense, classifier), (classifier, nn.Flatten()), (classifier, surrogate)):
        with pytest.warns(UserWarning, match=r"evaluate: The attacks \(0\) were built for another model"):
            assert names(model, other) == ["transfer"]
        assert names(model, model) == names(model, other, model) == []
    # The same function in another form, and a substitute whose forward pass is the evaluated model's.
    noisy = lambda z: classifier(z + 0.1 * torch.randn_like(z))  # noqa: E731
    for model, other in (
        (classifier, lambda z: classifier(z)),
        (classifier, copy.deepcopy(classifier)),
        (lambda z: classifier(z), classifier),
        (defense, copy.deepcopy(defense)),
        (noisy, lambda z: noisy(z)),
        (classifier, BPDA(classifier, torch.round)),
    ):
        assert names(model, other) == []
    with pytest.warns(UserWarning, match="another model"):
        evaluate(defense, x, y, attacks=lambda _: {"pgd": PGD(defense, 0.1, steps=1)}, randomness="fixed", **options)


def test_an_attack_that_writes_into_its_images_is_measured_from_the_originals():
    x, y = torch.rand(4, 1, 2, 2), torch.arange(4)

    def erase(images, labels):
        labels.zero_()
        return images.zero_()

    options = {"progress": False, "diagnostics": False, "eps": 0.01}
    with pytest.warns(UserWarning, match=r"attacks\['own'\]: 4 of 4 candidates lie outside of the Linf ball"):
        report = evaluate(nn.Flatten(), x, y, attacks={"own": erase}, **options)
    assert report.samples[1]["distance"] == pytest.approx(float(x[1].max()))
    copies = {"own": lambda images, labels: torch.zeros_like(images)}
    with pytest.warns(UserWarning, match="outside"):
        assert evaluate(nn.Flatten(), x, y, attacks=copies, **options).samples == report.samples


def test_attacks_that_change_nothing_are_a_finding():
    x, y = torch.rand(4, 1, 2, 2), torch.arange(4)
    model, nothing = nn.Flatten(), {"own": lambda images, labels: images}
    options = {"progress": False, "diagnostics": False}
    report = evaluate(model, x, y, attacks=nothing, **options)
    (finding,) = report.diagnostics
    assert (finding["name"], finding["status"], finding["numbers"]) == ("unchanged", "warn", {"own": 4})
    assert repr(report).endswith("\nwarn  unchanged: " + finding["reason"])
    moving = {**nothing, "fgsm": FGSM(model)}
    assert evaluate(model, x, y, attacks=moving, **options).diagnostics == []
    # A ball of one point has no other candidates, and an attack that met no image changed none.
    assert evaluate(model, x, y, attacks=nothing, eps=0, **options).diagnostics == []
    names = [f["name"] for f in evaluate(model, x, y, attacks=moving, budget=0, **options).diagnostics]
    assert names == ["budget"]
    with pytest.raises(ValueError, match=r"evaluate: attacks must be a mapping .*, got none, and so no accuracy"):
        evaluate(model, x, y, attacks={}, **options)


def test_dropout_that_evaluation_mode_turns_off_is_said():
    x, y = torch.rand(4, 1, 4, 4), torch.arange(4)
    options = {"protocol": "quick", "progress": False, "diagnostics": False, "eps": 0.1, "draws": 2}
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 4))
    with pytest.warns(UserWarning, match=r"evaluate: The model is in training mode, .* dropout \(1\) draws nothing"):
        evaluate(model, x, y, **options)
    assert model.training
    # Warnings are errors here.
    evaluate(model.eval(), x, y, **options)
    # As the warning says: dropout that draws makes the model a random one.
    model[1].train()
    with pytest.warns(RuntimeWarning, match="are in training mode, and stay so"):
        report = evaluate(model, x, y, **options)
    assert report.clean.draws == 2
