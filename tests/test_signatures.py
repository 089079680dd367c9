"""The attacks' signatures: torchattacks' positional order, calls as users type them, and no hidden options."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from models import mnist, standard_mnist

from atop_fast import attacks
from atop_fast.attacks import APGD, APGDT, CW, FAB, FGSM, MIFGSM, PGD, PMA, AutoAttack, Square, StAdv
from atop_fast.training.nfgsm import NFGSM

KINDS = (FGSM, PGD, MIFGSM, CW, APGD, APGDT, FAB, PMA, Square, StAdv)
# The first arguments of the original, which the package pyautoattack changed.
AUTOATTACK = (
    "model",
    "norm",
    "eps",
    "seed",
    "verbose",
    "attacks_to_run",
    "version",
    "is_tf_model",
    "device",
    "log_path",
)


@pytest.fixture(scope="module")
def digits():
    data = mnist().take(slice(0, 4))
    return data.images, data.labels


def parameters(kind, *which):
    found = inspect.signature(kind).parameters.values()
    return [p.name for p in found if p.kind in (which or (p.kind,))]


@pytest.mark.parametrize("name", ["FGSM", "PGD", "MIFGSM", "CW", "APGD", "APGDT", "FAB", "Square", "AutoAttack"])
def test_positional_order_is_that_of_torchattacks(name):
    torchattacks = pytest.importorskip("torchattacks")
    theirs = parameters(getattr(torchattacks, name))
    ours = parameters(getattr(attacks, name), inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert ours == theirs[: len(ours)]
    assert len(ours) >= min(len(theirs), 3 if name == "AutoAttack" else 6)


def test_autoattack_has_the_originals_arguments():
    assert parameters(AutoAttack, inspect.Parameter.POSITIONAL_OR_KEYWORD) == list(AUTOATTACK[:3])
    assert {*AUTOATTACK, "device", "log_path"} - {"is_tf_model"} <= set(parameters(AutoAttack))
    # An empty list is the original's default.
    assert repr(AutoAttack(standard_mnist(), attacks_to_run=[])) == repr(AutoAttack(standard_mnist()))
    for run in (AutoAttack.run_standard_evaluation, AutoAttack.run_standard_evaluation_individual):
        assert parameters(run) == ["self", "images", "labels", "bs", "return_labels"]


@pytest.mark.parametrize("kind", [*KINDS, NFGSM, AutoAttack])
def test_every_option_is_in_the_signature_and_in_the_docstring(kind):
    assert not parameters(kind, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    text = kind.__doc__.partition("Args:")[2].partition("\n\n")[0]
    described = re.findall(r"^        ((?:\w+, )*\w+):", text, re.MULTILINE)
    assert {name for names in described for name in names.split(", ")} == set(parameters(kind))
    assert "see Attack" not in kind.__doc__
    assert "eot_iter" in parameters(kind)


@pytest.mark.parametrize("kind", [*KINDS, AutoAttack])
def test_a_wrong_keyword_names_the_class(kind):
    with pytest.raises(TypeError, match=rf"{kind.__name__}\b.* unexpected keyword argument 'epsilon'"):
        kind(standard_mnist(), epsilon=8 / 255)
    with pytest.raises(TypeError, match=rf"{kind.__name__}\b.* positional arguments"):
        kind(standard_mnist(), *(0.1,) * 12)


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (lambda m: PGD(m, 8 / 255, 2 / 255, 10), lambda m: PGD(m, eps=8 / 255, alpha=2 / 255, steps=10)),
        (lambda m: PGD(m, 0.1, 0.02, 3, False), lambda m: PGD(m, eps=0.1, alpha=0.02, steps=3, random_start=False)),
        (lambda m: FGSM(m, 8 / 255), lambda m: FGSM(m, eps=8 / 255)),
        (lambda m: MIFGSM(m, 0.1, 0.02, 3, 0.5), lambda m: MIFGSM(m, eps=0.1, alpha=0.02, steps=3, decay=0.5)),
        (lambda m: CW(m, 1, 0, 5, 0.01), lambda m: CW(m, c=1.0, kappa=0.0, steps=5, lr=0.01)),
        (lambda m: APGD(m, "L2", 1.0, 3, 2, 7, "dlr", 2, 0.5), lambda m: APGD(
            m, norm="L2", eps=1.0, steps=3, n_restarts=2, seed=7, loss="dlr", eot_iter=2, rho=0.5)),
        (lambda m: APGDT(m, "Linf", 0.1, 2, 1, 7, 1, 0.5), lambda m: APGDT(
            m, norm="Linf", eps=0.1, steps=2, n_restarts=1, seed=7, eot_iter=1, rho=0.5)),
        (lambda m: FAB(m, "L2", 1.0, 2, 1, 0.2, 1.1, 0.8), lambda m: FAB(
            m, norm="L2", eps=1.0, steps=2, n_restarts=1, alpha_max=0.2, eta=1.1, beta=0.8)),
        (lambda m: Square(m, "Linf", 0.1, 8, 2, 0.5), lambda m: Square(
            m, norm="Linf", eps=0.1, n_queries=8, n_restarts=2, p_init=0.5)),
    ],
)  # fmt: skip
def test_positional_calls_mean_what_torchattacks_users_mean(typed, named, digits):
    model = standard_mnist()
    assert repr(typed(model)) == repr(named(model))
    assert torch.equal(typed(model)(*digits), named(model)(*digits))


@pytest.mark.parametrize(
    "call",
    [
        lambda package, m: package.FGSM(m, 0.1),
        lambda package, m: package.PGD(m, 0.1, 0.03, 4, False),
        lambda package, m: package.PGD(m, eps=0.1, alpha=0.03, steps=4, random_start=False),
        lambda package, m: package.MIFGSM(m, 0.1, 0.03, 4, 0.5),
        lambda package, m: package.CW(m, 1, 0, 5, 0.01),
    ],
)
def test_one_line_gives_the_images_of_both_packages(call, digits):
    torchattacks = pytest.importorskip("torchattacks")
    ours, theirs = (call(package, standard_mnist())(*digits) for package in (attacks, torchattacks))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_autoattack_as_its_users_type_it(digits, tmp_path, capsys):
    model, (x, y), log = standard_mnist(), digits, tmp_path / "folder" / "log.txt"
    settings = {"version": "custom", "attacks_to_run": ["apgd-ce", "square"], "steps": 2, "n_queries": 8}
    adversary = AutoAttack(model, norm="Linf", eps=0.1, device="cpu", verbose=True, log_path=str(log), **settings)
    adversarial, predicted = adversary.run_standard_evaluation(x, y, bs=2, return_labels=True)
    assert torch.equal(adversarial, AutoAttack(model, norm="Linf", eps=0.1, **settings)(x, y))
    assert torch.equal(predicted, model(adversarial).argmax(dim=1))
    lines = log.read_text().splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "initial accuracy", "robust accuracy after apgd-ce", "robust accuracy after square",
    ]  # fmt: skip
    assert f"{float((predicted == y).double().mean()):.2%}" in lines[-1]
    assert all(f"AutoAttack: {line}" in capsys.readouterr().out for line in lines[:1])


def test_individual_attacks_do_not_profit_from_each_other(digits):
    model, (x, y) = standard_mnist(), digits
    settings = {"version": "custom", "steps": 3, "n_queries": 8}
    adversary = AutoAttack(model, norm="Linf", eps=0.08, attacks_to_run=["apgd-ce", "square"], **settings)
    results = adversary.run_standard_evaluation_individual(x, y, bs=3)
    for name, adversarial in results.items():
        alone = AutoAttack(model, norm="Linf", eps=0.08, attacks_to_run=[name], **settings)
        assert torch.equal(adversarial, alone(x, y))
        assert adversary.accuracy[name] == alone.accuracy[name]
    assert list(results) == ["apgd-ce", "square"]
    assert list(adversary.accuracy) == ["clean", *results]
    labeled = adversary.run_standard_evaluation_individual(x, y, return_labels=True)
    assert torch.equal(labeled["square"][1], model(results["square"]).argmax(dim=1))


def test_a_place_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="AutoAttack: log_path must be a writable folder, got"):
        AutoAttack(standard_mnist(), log_path=tmp_path / "file" / "log.txt")
    with pytest.raises(ValueError, match="AutoAttack: device must be a device of this machine, got 'nowhere'"):
        AutoAttack(standard_mnist(), device="nowhere")
