"""A run folder never gives another model's or attack's results in silence; evaluate takes attacks of many kinds."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from test_wrong_numbers import COUNT, X, labels, network
from torch import nn

from atop_fast import PGD, RT2, AutoAttack, Defense, evaluate
from atop_fast.evaluation.identity import attack_identity, model_identity, probe_images, same_model
from atop_fast.evaluation.report import _note
from atop_fast.evaluation.source import InMemory

pytestmark = pytest.mark.usefixtures("no_pictures")
QUIET = {"progress": False, "diagnostics": ()}
Y = labels(network())
STEP = 1


class Scaled(nn.Module):
    """A network in places that neither a text nor a state shows."""

    def __init__(self, temperature=1.0, inner=None):
        super().__init__()
        self.temperature, self.hidden = temperature, [inner or network()]

    def forward(self, x):
        return self.hidden[0](x) / self.temperature


class Straight(nn.Module):
    """The same logits with and without a gradient."""

    def __init__(self, masked):
        super().__init__()
        self.network, self.masked = network(), masked

    def forward(self, x):
        return self.network((255 * x).round() / 255 if self.masked else x + ((255 * x).round() / 255 - x).detach())


def identity(model):
    return model_identity(model, *probe_images(InMemory(X, Y)))


def lots(first, second):
    """One of two networks at random, from a generator that is not seeded."""
    generator = torch.Generator().manual_seed(7)
    return lambda x: (first, second)[int(torch.randint(2, (1,), generator=generator))](x)


def drawn(source, weight):
    """A network with noise of a global generator."""
    inner = network()
    draw = {"python": random.random, "numpy": np.random.rand, "torch": lambda: float(torch.rand(()))}[source]
    return lambda x: weight * inner(x) + draw()


A, B = network(seed=0), network(seed=5)
# Two models of the same text and state, by how they differ.
MODELS = {
    "closure": [lambda x, n=n: n(x) for n in (A, B)],
    "partial": [functools.partial(lambda n, x: n(x), n) for n in (A, B)],
    "method": [nn.Sequential(n).forward for n in (A, B)],
    "attribute": [Scaled(t) for t in (1.0, 1.5)],
    "hidden network": [Scaled(inner=n) for n in (A, B)],
    "inside a Defense": [Defense(RT2(4), None, Scaled(t)) for t in (1.0, 1.5)],
    "gradient": [Straight(m) for m in (True, False)],
    "lots": [lots(A, network(seed=1)), lots(B, network(seed=2))],
    "python's generator": [drawn("python", w) for w in (1.0, 1.2)],
    "numpy's generator": [drawn("numpy", w) for w in (1.0, 1.2)],
    "torch's generator": [drawn("torch", w) for w in (1.0, 1.2)],
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_known_by_what_it_does(kind):
    first, second = MODELS[kind]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    one, again, other = (identity(m) for m in (first, first, second))
    assert same_model(one, again)
    assert not same_model(one, other)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))


def test_rounding_is_no_other_model_and_a_small_update_is():
    model = network()
    one = identity(lambda x: model(x))
    assert same_model(one, identity(lambda x: model(x))), "another function with the same name"
    rounded = {**one, "logits": (torch.tensor(one["logits"]) * (1 + 1e-5)).tolist()}
    assert same_model(one, rounded)
    with torch.no_grad():
        next(model.parameters()).mul_(1 + 1e-6)
    assert not same_model(one, identity(lambda x: model(x)))
    assert not same_model(one, {"logits": None})


@pytest.mark.parametrize("kind", ["closure", "attribute", "inside a Defense", "lots"])
def test_a_folder_refuses_another_model(tmp_path, kind):
    first, second = MODELS[kind]
    attacks = {"none": lambda x, y, ids: x}

    def judged(model, **options):
        return evaluate(model, X, Y, draws=2, selection_draws=2, attacks=attacks, out=tmp_path, **options, **QUIET)

    report = judged(first)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "report" not in p.name}
    with pytest.raises(ValueError, match=r"belongs to a run with another model$"):
        judged(second)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "report" not in p.name}
    assert judged(first, batch_size=5).samples == report.samples


class Own:
    """An attack of a user's."""

    def __init__(self, step, options=None):
        self.step, self.options = step, options

    def __call__(self, x, y, ids):
        return (x + self.step).clamp(0, 1)


def by_code(step):
    if step == 1:
        return lambda x, y, ids: (x + 0.01).clamp(0, 1)
    return lambda x, y, ids: (x + 0.02).clamp(0, 1)


def calling(inner):
    return lambda x, y, ids: inner(x, y, ids)


def by_global(step):
    global STEP
    STEP = step
    return lambda x, y, ids: (x + STEP / 100).clamp(0, 1)


CHANGES = {
    "code": by_code,
    "closure": lambda step: lambda x, y, ids: (x + step / 100).clamp(0, 1),
    "default": lambda step: lambda x, y, ids, step=step: x,
    "partial": lambda step: functools.partial(lambda step, x, y, ids: x, step),
    "attribute": Own,
    "options": lambda step: Own(1, {"steps": [step]}),
    "helper": lambda step: calling(by_code(step)),
    "another network": lambda step: PGD(network(seed=step), steps=1),
    "substitute": lambda step: PGD(Defense(RT2(4), None, network()), substitute=lambda x: step * x, gradient="bpda"),
    "tensor": lambda step: Own(torch.tensor(float(step))),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_attack_that_changed_under_its_name_is_another_one(kind):
    model, make = network(), CHANGES[kind]
    assert attack_identity(make(1), model) == attack_identity(make(1), model)
    one = attack_identity(make(1), model)
    assert one != attack_identity(make(2), model)


def test_a_global_that_an_attack_reads_is_part_of_it():
    one = attack_identity(by_global(1), None)
    assert one == attack_identity(by_global(1), None) != attack_identity(by_global(2), None)


def test_a_folder_refuses_a_changed_attack_by_name(tmp_path):
    model = network()
    evaluate(model, X, Y, eps=0.1, attacks={"mine": Own(0.01), "other": Own(0.0)}, out=tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"belongs to a run with another attacks\['mine'\]$"):
        evaluate(model, X, Y, eps=0.1, attacks={"mine": Own(0.02), "other": Own(0.0)}, out=tmp_path, **QUIET)


def test_a_folder_takes_an_autoattack_that_has_run(tmp_path):
    """Its results are no part of its identity."""
    attack = AutoAttack(network(), eps=0.1, version="custom", attacks_to_run=["apgd-ce"], steps=2)
    first = evaluate(attack.model, X, Y, eps=0.1, attacks={"aa": attack}, out=tmp_path, **QUIET)
    assert attack.accuracy
    assert evaluate(attack.model, X, Y, eps=0.1, attacks={"aa": attack}, out=tmp_path, **QUIET).samples == first.samples


def test_attacks_of_images_and_labels_and_numpy_results_are_taken():
    model, seen = network(), []

    def two(x, y):
        seen.append(len(y))
        return x.numpy().astype("float64")

    report = evaluate(model, X, Y, attacks={"two": two, "keyed": lambda x, y, ids=None: x}, **QUIET)
    assert seen == [COUNT]
    assert report.robust == report.clean


@pytest.mark.filterwarnings("ignore")
def test_attacks_of_torchattacks_and_art_are_taken_as_they_are():
    torchattacks, evasion = pytest.importorskip("torchattacks"), pytest.importorskip("art.attacks.evasion")
    from art.estimators.classification import PyTorchClassifier

    model, state = network(), torch.get_rng_state()
    held = PyTorchClassifier(model, nn.CrossEntropyLoss(), X.shape[1:], 10, clip_values=(0, 1), device_type="cpu")
    attacks = {
        "ta": torchattacks.PGD(model, eps=0.3, alpha=0.1, steps=5),
        "art": evasion.FastGradientMethod(held, eps=0.3),
        "ours": PGD(model, eps=0.3, steps=5),
    }
    report = evaluate(model, X, Y, eps=0.3, attacks=attacks, **QUIET)
    assert report.attacks["ta"].mean <= report.clean.mean - 0.2
    assert report.attacks["art"].mean < report.clean.mean
    assert report.diagnostics == []
    torch.set_rng_state(state)
    attacks["ta"].set_mode_targeted_by_label(quiet=True)
    with pytest.raises(TypeError, match=r"evaluate: attacks\['ta'\] must be untargeted"):
        evaluate(model, X, Y, attacks={"ta": attacks["ta"]}, **QUIET)
    attacks["ta"].set_mode_targeted_least_likely(quiet=True)
    evaluate(model, X, Y, eps=0.3, attacks={"ta": attacks["ta"]}, **QUIET)
    attacks["ta"].set_normalization_used(mean=[0.5], std=[0.5])
    with pytest.raises(TypeError, match=r"evaluate: attacks\['ta'\] must be without set_normalization_used"):
        evaluate(model, X, Y, attacks={"ta": attacks["ta"]}, **QUIET)


def foolbox_attack():
    return pytest.importorskip("foolbox").attacks.LinfPGD(steps=2)


@pytest.mark.parametrize(
    ("attacks", "words"),
    [
        (
            lambda m: {"a": PGD},
            r"attacks\['a'\] must be an attack, not its class: \{'a': PGD\(.*got the class",
        ),
        (
            lambda m: {"a": foolbox_attack()},
            r"attacks\['a'\] must be called .*foolbox.PyTorchModel\(.*got foolbox",
        ),
        (
            lambda m: {"a": None},
            r"attacks\['a'\] must be a callable attack\(images, .*\): .* got NoneType",
        ),
        (lambda m: {"a": lambda x: x}, r"attacks\['a'\] must be called attack\(images, labels, sample_ids\): "),
        (lambda m: {"a": lambda x, y: [x]}, r"attacks\['a'\] must be an attack that returns images, got list"),
        (lambda m: {1: PGD(m)}, r"attacks must be a mapping from names to attacks.*got the name 1"),
        (
            lambda m: [PGD(m)],
            r"attacks must be a mapping from names to attacks, such as \{'pgd': PGD\(.*got list",
        ),
        (lambda m: PGD(m), r"attacks must be a mapping from names to attacks.*got atop_fast.attacks.pgd.PGD"),
        (lambda m: PGD, r"attacks must be a mapping from names to attacks.*got the class atop_fast"),
    ],
    ids=["class", "foolbox", "nothing", "one argument", "list returned", "number", "list", "attack", "a class"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_attack_is_refused_by_name(attacks, words):
    model = network()
    with pytest.raises(TypeError, match=f"evaluate: {words}"):
        evaluate(model, X, Y, attacks=attacks(model), **QUIET)


@pytest.mark.parametrize("name", ["clean", "robust", "eight_bit", "total", "pgd@8bit", "curve@0.1"])
def test_names_of_the_reports_own_columns_are_refused(name):
    """An attack "robust" would stand in the place of the verdict on all attacks in a printed report."""
    with pytest.raises(ValueError, match=f"named otherwise than clean, robust, eight_bit, total, .*got '{name}'"):
        evaluate(network(), X, Y, attacks={name: lambda x, y: x}, **QUIET)


def test_a_report_says_which_systems_have_how_many_draws():
    one, many = ({"clean": {"images": 200, "draws": k}} for k in (1, 20))
    assert _note({"a": many, "b": many}) == "200 images, K = 20 draws of each."
    both = _note({"classifier": one, "rt_only": many, "finetuned": many})
    assert both == "200 images, K draws of each: K = 1 for classifier; K = 20 for rt_only, finetuned."


def test_only_a_third_parameter_for_ids_gets_them():
    """One with a default is the caller's own: targets, a radius, a start."""
    seen = {}

    def noted(name, images, third):
        seen[name] = third
        return images

    attacks = {
        "targets": lambda images, labels, targets=None: noted("targets", images, targets),
        "radius": lambda images, labels, eps=0.5: noted("radius", images, eps),
        "ids": lambda images, labels, sample_ids=None: noted("ids", images, sample_ids),
        "required": lambda images, labels, i: noted("required", images, i),
        "any": lambda *args: noted("any", args[0], args[2]),
    }
    evaluate(network(), X, Y, attacks=attacks, **QUIET)
    assert (seen["targets"], seen["radius"]) == (None, 0.5)
    assert all(torch.is_tensor(seen[name]) for name in ("ids", "required", "any"))
