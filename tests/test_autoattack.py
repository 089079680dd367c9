"""AutoAttack: what its versions are made of, the cascade, parity with the original, its verdict on random models."""

from __future__ import annotations

import math

import models
import pytest
import torch
from small_task import places, trained_classifier
from torch import nn

from atop_fast import RT2, Defense
from atop_fast.attacks import AutoAttack, counted_passes
from atop_fast.attacks.autoattack import NAMES, VERSIONS

EPS = {"Linf": 0.07, "L2": 0.8, "L1": 4.5}
FAST = {"steps": 5, "n_queries": 30}
X, Y = places(60, seed=999)
# The classifier is right about all images; these are the ones to fool.
Y[:4] = (Y[:4] + 1) % 4


def attack(norm="Linf", **options):
    return AutoAttack(trained_classifier(), norm, EPS[norm], **{**FAST, **options})


def right(model, x, y):
    with torch.no_grad():
        return model(x).argmax(dim=1) == y


def settings(version, norm="Linf", **options):
    """(class, loss, restarts, draws, early stop) of every attack."""
    whole = attack(norm, version=version, **options)
    built = [whole.build(name) for name in whole.attacks_to_run]
    return [(type(a).__name__, a.loss, getattr(a, "n_restarts", 1), a.eot_iter, a.early_stop) for a in built]


@pytest.mark.parametrize("version", ["standard", "rand"])
def test_nan_is_not_class_0(version):
    """All of these images are of class 0, which is the argmax of NaN."""

    def model(x):
        logits = torch.stack((x.mean(dim=(1, 2, 3)), -x[:, 0, 0, 0]), dim=1)
        given = (x[:, None] == X[:4]).flatten(2).all(dim=2).any(dim=1)
        return torch.where(given[:, None], logits, torch.nan)

    whole = AutoAttack(model, "Linf", 0.1, version=version, **FAST)
    with pytest.raises(ValueError, match=r"without NaN in its logits, got NaN for 4 of 4 images"):
        whole(X[:4], torch.zeros(4, dtype=torch.int64))


def test_versions():
    ce, dlr = ("APGD", "ce", 1, 1, True), ("APGD", "dlr", 1, 1, True)
    targeted, fab, square = (
        ("APGDT", "dlr", 1, 1, True),
        ("FAB", "margin", 1, 1, True),
        ("Square", "margin", 1, 1, True),
    )
    assert settings("standard") == [ce, targeted, fab, square]
    five = [(*a[:2], 5, *a[3:]) for a in (ce, dlr, fab)]
    assert settings("plus") == [*five, square, targeted]
    assert settings("rand") == [("APGD", "ce", 1, 20, False), ("APGD", "dlr", 1, 20, False)]
    assert settings("rand", eot_iter=3) == [("APGD", "ce", 1, 3, False), ("APGD", "dlr", 1, 3, False)]
    assert settings("custom", attacks_to_run=("square", "apgd-dlr")) == [square, dlr]
    pma = ("PMA", "pm", 1, 1, True)
    assert settings("fast") == [pma, targeted, square]
    for complete in (True, 1):
        assert settings("fast", complete=complete) == [pma, targeted, square, ce, targeted, fab, square]
    fast = attack(version="fast", n_queries=500)
    assert [fast.build(name).steps for name in ("probe", "square")] == [200, 500]


def test_defaults_are_those_of_the_original():
    whole = AutoAttack(trained_classifier())
    assert (whole.norm, whole.eps, whole.version) == ("Linf", 8 / 255, "standard")
    assert [whole.build(name).steps for name in VERSIONS["standard"]] == [100, 100, 100, 5000]
    assert [whole.build(name).target_classes for name in ("apgd-t", "apgd-t3", "fab-t")] == [9, 3, 9]
    assert not whole.build("square").resc_schedule
    assert len({whole.build(name).seed for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("version", ["standard", "custom", "plus", "rand"])
def test_l1_has_the_originals_settings(version):
    whole = attack("L1", version=version, attacks_to_run=NAMES if version == "custom" else None)
    ce, targeted = whole.build("apgd-ce"), whole.build("apgd-t")
    restarts = {"rand": 1}.get(version, 5)
    sparse = version in ("standard", "custom")
    assert (ce.shrink_eps, ce.n_restarts) == (sparse, restarts)
    assert (targeted.shrink_eps, targeted.n_restarts, targeted.target_classes) == (sparse, 1, 5 if sparse else 9)


@pytest.mark.parametrize("norm", list(EPS))
def test_what_comes_back(norm):
    whole = attack(norm)
    adversarial = whole.run_standard_evaluation(X, Y)
    still = right(trained_classifier(), adversarial, Y)
    clean = right(trained_classifier(), X, Y)
    # An attack that fools all or none would show nothing.
    assert 0.1 < still.float().mean() < 0.9
    assert torch.equal(adversarial[still], X[still])
    assert torch.equal(adversarial[~clean], X[~clean])
    moved = (adversarial - X).flatten(1).norm(p={"Linf": torch.inf, "L2": 2, "L1": 1}[norm], dim=1)
    assert (moved[~still & clean] > 0).all()
    assert moved.max() <= EPS[norm] * (1 + 1e-5)
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    assert list(whole.accuracy) == ["clean", *VERSIONS["standard"]]
    falling = list(whole.accuracy.values())
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == pytest.approx(float(clean.float().mean()))
    assert falling[-1] == pytest.approx(float(still.float().mean()))


@pytest.mark.parametrize("kind", ["classifier", "defense"])
def test_result_belongs_to_the_sample(kind):
    model = trained_classifier() if kind == "classifier" else Defense(RT2(2, sigma=0.05), None, trained_classifier())
    whole = AutoAttack(model, eps=EPS["Linf"], steps=3, n_queries=8)
    x, y = X[:40], Y[:40]
    expected = whole.run_standard_evaluation(x, y)
    for bs in (7, 16):
        assert torch.equal(whole.run_standard_evaluation(x, y, bs=bs), expected)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    parts = [whole(x[part], y[part], sample_ids=part) for part in order.split(23)]
    assert torch.equal(torch.cat(parts), expected[order])
    other = AutoAttack(model, eps=EPS["Linf"], steps=3, n_queries=8, seed=1)(x, y)
    assert not torch.equal(other, expected)


def test_an_attack_sees_the_survivors_alone():
    seen = {}

    class Watched(AutoAttack):
        def build(self, attack, precision=None):
            built = super().build(attack, precision)

            def run(x, y, ids):
                seen[attack] = ids
                return built(x, y, ids)

            return run

    whole = Watched(trained_classifier(), eps=EPS["Linf"], **FAST)
    whole.run_standard_evaluation(X, Y)
    survivors = [round(share * len(X)) for share in whole.accuracy.values()]
    assert [len(ids) for ids in seen.values()] == survivors[:-1]
    assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(seen.values(), list(seen.values())[1:], strict=False))
    assert torch.equal(seen["apgd-ce"], right(trained_classifier(), X, Y).nonzero()[:, 0])
    seen.clear()
    Watched(trained_classifier(), eps=1.0, **FAST).run_standard_evaluation(X, Y)
    assert "square" not in seen, "no image is left"


class Coin(nn.Module):
    """Right, which is class 0, with the probability p in every call, whatever the image."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        lucky = (torch.rand(len(x), device=x.device) < self.p).float()
        logits = torch.stack((lucky, 1 - lucky, *(-torch.ones(3, len(x)) - torch.arange(3)[:, None])), dim=1)
        return logits + 0 * x.flatten(1).sum(dim=1, keepdim=True)


@pytest.mark.parametrize(("version", "expected"), [("rand", 0.9**3), ("standard", 0.9**5)])
def test_a_coin_of_090_gets_the_unsound_verdict_of_autoattack(version, expected):
    count = 2000
    whole = AutoAttack(Coin(0.9), version=version, steps=2, n_queries=8)
    whole.run_standard_evaluation(torch.full((count, 1, 4, 4), 0.5), torch.zeros(count, dtype=torch.int64))
    (*_, accuracy) = whole.accuracy.values()
    assert abs(accuracy - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("task", ["standard", pytest.param("robust", marks=pytest.mark.slow)])
def test_screen_in_bfloat16(task):
    """Within 0.5 points of float32; where networks are not robust, that takes all attacks in the finish."""
    if task == "standard":
        model, (x, y), eps, finish = trained_classifier(), places(400, seed=5), EPS["Linf"], ("apgd-ce", "apgd-t")
    else:
        model, data, eps, finish = models.robust_mnist(), models.mnist(), 0.2, ("apgd-ce",)
        x, y = data.images[:50], data.labels[:50]
    options = {"version": "custom", "attacks_to_run": ("apgd-ce", "apgd-t"), "steps": 10}
    wide = AutoAttack(model, eps=eps, **options)
    screen = AutoAttack(model, eps=eps, **options, precision="bfloat16", finish=finish)
    wide(x, y)
    adversarial = screen(x, y)
    finished = [f"{name} (float32)" for name in finish]
    assert list(screen.accuracy) == ["clean", "apgd-ce", "apgd-t", *finished]
    assert 0.1 < wide.accuracy["apgd-t"] < 0.9
    assert abs(screen.accuracy[finished[-1]] - wide.accuracy["apgd-t"]) <= 0.005
    # Whether an image is fooled is decided in float32.
    assert screen.accuracy[finished[-1]] == pytest.approx(float(right(model, adversarial, y).float().mean()))


def test_leaves_model_and_global_generator_alone():
    model = Defense(RT2(2, sigma=0.05), None, nn.Sequential(nn.Flatten(), nn.Linear(256, 5), nn.BatchNorm1d(5))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draw, state = int(model.draw), torch.get_rng_state()
    AutoAttack(model, steps=2, n_queries=8)(X[:12], Y[:12])
    assert torch.equal(torch.get_rng_state(), state)
    assert int(model.draw) == draw
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_images_and_verbose(capsys):
    whole = attack(verbose=True, version="custom", attacks_to_run=("apgd-ce",))
    assert whole(X[:0], Y[:0]).shape == X[:0].shape
    assert math.isnan(whole.accuracy["clean"])
    whole(X[:8], Y[:8])
    assert f"AutoAttack: robust accuracy after apgd-ce: {whole.accuracy['apgd-ce']:.2%}" in capsys.readouterr().out
    assert "version='custom'" in repr(whole)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"norm": "L0"}, "AutoAttack: norm must be one of 'Linf', 'L2', 'L1', got 'L0'"),
        ({"eps": -1.0}, "AutoAttack: eps must be finite and >= 0, got -1.0"),
        ({"version": "quick"}, "AutoAttack: version must be one of 'standard', 'plus', 'rand', 'fast', 'custom', got"),
        ({"complete": True}, "AutoAttack: complete must be False for all versions but 'fast', got True"),
        ({"version": "custom"}, "AutoAttack: attacks_to_run must be given with version 'custom', and only then, got"),
        ({"attacks_to_run": ("square",)}, "AutoAttack: attacks_to_run must be given with version 'custom'"),
        ({"version": "custom", "attacks_to_run": ("fab",)}, "attacks_to_run must be one of 'apgd-ce', .*'fab'"),
        ({"finish": ("pgd",)}, "AutoAttack: finish must be one of 'apgd-ce', .* got 'pgd'"),
        ({"precision": "int8"}, "AutoAttack: precision must be one of 'float32', .* got 'int8'"),
        ({"steps": 0}, "AutoAttack: steps must be an integer and >= 1, got 0"),
        ({"n_queries": 0}, "AutoAttack: n_queries must be an integer and >= 1, got 0"),
        ({"eot_iter": 0}, "AutoAttack: eot_iter must be an integer and >= 1, got 0"),
        ({"max_batch": 0}, "AutoAttack: max_batch must be an integer and >= 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options, pattern):
    with pytest.raises(ValueError, match=pattern):
        AutoAttack(trained_classifier(), **options)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="AutoAttack: bs must be an integer and >= 1, got 0"):
        attack().run_standard_evaluation(X, Y, bs=0)
    with pytest.raises((TypeError, ValueError), match="AutoAttack: images must"):
        attack().run_standard_evaluation(X.double().long(), Y)
    with pytest.raises((TypeError, ValueError), match="AutoAttack: labels must"):
        attack().run_standard_evaluation(X, Y[:3])
    with pytest.raises((TypeError, ValueError), match="AutoAttack: sample_ids must"):
        attack()(X, Y, sample_ids=torch.arange(3))


@pytest.mark.slow
# So short an attack may leave an image to the next one.
@pytest.mark.filterwarnings("ignore:AutoAttack. 'fast' may leave too many images")
# With so few steps PMA alone leaves too many.
@pytest.mark.filterwarnings("ignore:AutoAttack. 'fast' may leave too many:RuntimeWarning")
@pytest.mark.parametrize(
    ("loader", "norm", "eps"),
    [("robust", "Linf", 0.24), ("standard", "L2", 1.1)],
)
def test_fast_leaves_as_much_as_standard_in_fewer_passes(loader, norm, eps):
    model, data = getattr(models, f"{loader}_mnist")(), models.mnist()
    x, y = data.images[:64], data.labels[:64]
    left, passes = [], []
    for version, options in (("standard", {}), ("fast", {}), ("fast", {"complete": True})):
        whole = AutoAttack(model, norm, eps, version=version, steps=20, n_queries=200, **options)
        with counted_passes() as counted:
            adversarial = whole(x, y)
        left.append(int(right(model, adversarial, y).sum()))
        passes.append(counted.forward + counted.backward)
    assert 5 < left[0] < 60
    assert left[1] <= left[0] + 2
    assert left[2] <= left[1]
    assert passes[1] < passes[0]


class Steep(nn.Module):
    """A network behind steps, whose gradient is 0 everywhere."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((8 * x).round() / 8 + 0 * x)


def test_fast_goes_on_where_gradients_mislead():
    """Behind steps, whose gradient is 0, PMA and APGD-T find nothing; on a plain network they find it all."""
    plain, steep = trained_classifier(), Steep(trained_classifier())
    options = {"norm": "Linf", "eps": 0.3, "version": "fast", "steps": 20, "n_queries": 300}
    sure = AutoAttack(plain, complete="auto", **options)
    sure(X, Y)
    fast = ["clean", "pma", "apgd-t3", "probe"]
    assert list(sure.accuracy) == fast
    whole = [AutoAttack(steep, complete=complete, **options) for complete in (False, "auto", True)]
    with pytest.warns(RuntimeWarning, match="AutoAttack: 'fast' may leave too many images"):
        images = [attack(X, Y) for attack in whole]
    assert list(whole[0].accuracy) == fast
    assert list(whole[1].accuracy) == [*fast, "apgd-ce", "apgd-t", "fab-t", "square"]
    assert torch.equal(images[1], images[2])
    assert whole[1].accuracy["square"] <= whole[0].accuracy["probe"] < whole[0].accuracy["apgd-t3"]


def test_fast_alone_doubts_as_in_sequence():
    """Each attack by itself leaves the same doubt, as it fools the same images."""
    options = {"norm": "Linf", "eps": 0.3, "version": "fast", "steps": 20, "n_queries": 300}
    fast, rest = ["pma", "apgd-t3", "probe"], ["apgd-ce", "apgd-t", "fab-t", "square"]
    sure, doubted = AutoAttack(trained_classifier(), **options), AutoAttack(Steep(trained_classifier()), **options)
    sure.run_standard_evaluation_individual(X, Y)
    assert sure.in_doubt is False
    with pytest.warns(RuntimeWarning, match="AutoAttack: 'fast' may leave too many images") as said:
        assert list(doubted.run_standard_evaluation_individual(X, Y)) == fast
    assert doubted.in_doubt is True
    assert said[0].filename == __file__
    # A call of one model says nothing of the next.
    doubted.model = trained_classifier()
    doubted.run_standard_evaluation_individual(X, Y)
    assert doubted.in_doubt is False
    going_on = AutoAttack(Steep(trained_classifier()), complete="auto", **options)
    results = going_on.run_standard_evaluation_individual(X, Y)
    assert list(results) == [*fast, *rest]
    assert going_on.in_doubt is True
    assert list(going_on.accuracy) == ["clean", *fast, *rest]


@pytest.mark.parametrize(
    ("pma", "apgd", "probe", "doubted"),
    [(0.5, 0.499, 0.499, False), (0.5, 0.497, 0.497, True), (0.5, 0.5, 0.499, True)],
)
def test_what_raises_doubt(pma, apgd, probe, doubted):
    accuracy = {"clean": 0.9, "pma": pma, "apgd-t3": apgd, "probe": probe}
    assert attack(version="fast", complete="auto")._leaves_doubt(accuracy) is doubted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loader", "norm", "eps"),
    [("robust", "Linf", 0.24), ("robust", "L2", 2.6), ("standard", "Linf", 0.065), ("standard", "L2", 1.1)],
)
def test_as_strong_as_the_original(loader, norm, eps):
    package = pytest.importorskip("pyautoattack.autoattack")
    model, data = getattr(models, f"{loader}_mnist")(), models.mnist()
    x, y = data.images[:64], data.labels[:64]
    original = package.AutoAttack(model, norm=norm, eps=eps, seed=0)
    # Its checkpoints come from the number of steps that it was built with.
    for apgd in (original.apgd, original.apgd_targeted):
        apgd.n_iter, apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = 20, 4, 1, 1
    original.fab.n_iter, original.square.n_queries = 20, 200
    with torch.random.fork_rng():
        theirs = right(model, original.run_standard_evaluation(x, y, batch_size=64)[0], y)
    whole = AutoAttack(model, norm, eps, steps=20, n_queries=200)
    ours = right(model, whole.run_standard_evaluation(x, y, bs=64), y)
    assert 0.1 < theirs.float().mean() < 0.9
    assert abs(ours.float().mean() - theirs.float().mean()) <= 2 / 64
    assert (ours == theirs).float().mean() >= 61 / 64
