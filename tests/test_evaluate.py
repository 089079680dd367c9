"""evaluate: separation of draws, choice of candidates, models with randomness of their own, options, report."""

from __future__ import annotations

import json
import re
import threading
import time
import warnings
from dataclasses import asdict

import pytest
import torch
from torch import nn

from atop_fast import RT1, RT2, Defense, build_classifier, evaluate
from atop_fast.defense import with_fixed_randomness
from atop_fast.doctor import Finding
from atop_fast.evaluation import FixedRandomness, quick_attacks
from atop_fast.evaluation.evaluate import parse_budget
from atop_fast.evaluation.judge import Judge, eight_bit, full_precision
from atop_fast.evaluation.report import _cards, format_table
from atop_fast.evaluation.source import make_source
from atop_fast.randomness import derive_seed

Y = torch.arange(100) % 10
X = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(1)) / 2
# The classes are pixels, and the right one is brighter by little more than the noise.
X.flatten(1)[torch.arange(100), Y] = 0.7
DEFENSE = Defense(RT2(4, sigma=0.1), None, nn.Flatten())
QUIET = {"progress": False, "draws": 4, "selection_draws": 4}


class Spy(RT2):
    """Records the keys of its draws by what they were for."""

    def __init__(self, *args: float, **options: float) -> None:
        super().__init__(*args, **options)
        self.keys: dict[str, set] = {k: set() for k in ("attack", "selection", "verdict", "trial")}
        self.phase = "selection"

    def forward(self, x, seed=0, sample_ids=None, draw=0):
        phase = "attack" if torch.is_grad_enabled() else self.phase
        # The comparison of an attack's copy with the model uses seed 0.
        if int(seed) in (0, derive_seed(0, "trial")):
            phase = "trial"
        each = torch.as_tensor(draw).expand(len(x))
        self.keys[phase] |= {(int(seed), int(i), int(d)) for i, d in zip(sample_ids, each, strict=True)}
        return super().forward(x, seed, sample_ids, draw)


@pytest.fixture
def spy(monkeypatch):
    """A transform that knows who asks: the judge's verdicts, its other draws, or (with gradients) an attack."""
    spy = Spy(4)
    judged = Judge.predictions

    def predictions(self, *args):
        spy.phase = "verdict"
        try:
            return judged(self, *args)
        finally:
            spy.phase = "selection"

    monkeypatch.setattr(Judge, "predictions", predictions)
    return spy


def test_attack_selection_and_verdict_draws_are_disjoint(spy):
    defense = Defense(spy, None, build_classifier("small_cnn", channels=1))
    evaluate(defense, X[:4], Y[:4], eps=0.1, draws=5, selection_draws=3, diagnostics=(), progress=False)
    attack, selection, verdict, trial = spy.keys.values()
    # PGD-20 with 4 draws a step; FGSM's coincide with those of its first step.
    assert len(attack) == 4 * 4 * 20
    # One set of selection draws for all candidates.
    assert len(selection) == 4 * 3
    # Every candidate has draws of its own; those of the 8-bit candidates are the same again.
    assert len(verdict) == 4 * 5 * 3
    assert len(trial) >= 4 * 3
    assert len(attack | selection | verdict | trial) == sum(map(len, spy.keys.values()))


def test_single_draws_are_kept_apart_too(spy):
    defense = Defense(spy, None, nn.Flatten())
    evaluate(defense, X[:4], Y[:4], draws=1, selection_draws=1, diagnostics=(), progress=False)
    assert len(spy.keys["selection"]) == 4
    assert len(spy.keys["verdict"]) == 4 * 3
    assert not spy.keys["selection"] & spy.keys["verdict"]


def test_fixed_randomness_uses_one_draw_of_every_sample(spy):
    defense = Defense(spy, None, build_classifier("small_cnn", channels=1))
    report = evaluate(defense, X[:6], Y[:6], eps=0.1, randomness="fixed", diagnostics=(), progress=False)
    attack, selection, *_ = spy.keys.values()
    assert attack == selection == {(derive_seed(derive_seed(0), "fixed"), i, 0) for i in range(6)}
    assert report.clean.draws == report.robust.draws == 1
    assert report.settings["randomness"] == "fixed"
    # Third-party attacks also call the fixed model.
    fixed = with_fixed_randomness(DEFENSE, 0)
    assert torch.equal(fixed(X), fixed(X))
    assert isinstance(fixed.transform, FixedRandomness)
    assert not torch.equal(DEFENSE(X), DEFENSE(X))
    with pytest.raises(TypeError, match="evaluate: attacks must be a function from the model to its attacks"):
        evaluate(DEFENSE, X, Y, randomness="fixed", attacks=quick_attacks(DEFENSE))
    with pytest.raises(TypeError, match="evaluate: model must be a Defense for randomness='fixed', got Flatten"):
        evaluate(nn.Flatten(), X, Y, randomness="fixed")


def test_a_known_mask_makes_attacks_stronger():
    """One of two blocks is seen. The L2 ball reaches the border along one of them, and not along both at once."""

    class Sign(nn.Module):
        def forward(self, x):
            total = (x - 0.5).flatten(1).sum(dim=1)
            return torch.stack((total, -total), dim=1)

    x, y = torch.full((20, 1, 2, 4), 0.6), torch.zeros(20, dtype=torch.int64)
    defense = Defense(RT1(2, mask_ratio=0.5), None, Sign())
    options = {"norm": "L2", "eps": 0.25, "progress": False}
    fresh, fixed = (evaluate(defense, x, y, randomness=r, **options) for r in ("fresh", "fixed"))
    assert fixed.clean.mean == fresh.clean.mean == 1
    assert fixed.robust.mean == 0
    assert fresh.robust.mean > 0.35


def test_the_choice_takes_the_worst_candidate_of_each_image():
    """One attack ruins the even images, the other the odd ones."""

    def ruin(parity):
        return lambda x, y, ids: torch.where(ids[:, None, None, None] % 2 == parity, torch.zeros_like(x), x)

    report = evaluate(nn.Flatten(), X, Y, eps=1, attacks={"even": ruin(0), "odd": ruin(1)}, progress=False)
    # The ten images of class 0 stay right: where all pixels are equal, the first one wins.
    assert (report.clean.mean, report.attacks["even"].mean, report.attacks["odd"].mean) == (1, 0.6, 0.5)
    assert report.robust.mean == pytest.approx(0.1)
    assert all(sample["attack"] == ("even", "odd")[i % 2] for i, sample in enumerate(report.samples))
    sample = report.samples[1]
    assert sample.pop("distance") == pytest.approx(float(X[1].max()))
    answers = {"clean_class": 1, "robust_class": 0}
    assert sample == {"id": 1, "label": 1, "clean": 1, "robust": 0, **answers, "attack": "odd", "attacked": True}


def test_ties_are_broken_by_the_larger_loss():
    """Both attacks leave every image wrong; the second by more."""

    def brighten(value):
        def attack(x, y, ids):
            x = x.clone()
            x.flatten(1)[torch.arange(len(x)), (y + 1) % 10] = value
            return x

        return attack

    attacks = {"strong": brighten(1.0), "weak": brighten(0.8)}
    for names in (("strong", "weak"), ("weak", "strong")):
        report = evaluate(nn.Flatten(), X, Y, eps=1, attacks={name: attacks[name] for name in names}, progress=False)
        assert {sample["attack"] for sample in report.samples} == {"strong"}


def test_report_does_not_depend_on_batches_and_repeats():
    def run(seed=0, **options):
        values = evaluate(DEFENSE, X[:30], Y[:30], eps=0.1, seed=seed, curve=(0.05,), **QUIET, **options).to_dict()
        return {k: v for k, v in values.items() if k not in ("seconds", "passes")}

    first = run()
    assert json.loads(json.dumps(first)) == first
    assert run() == first
    assert run(seed=1) != first
    # No convolution rounds differently for other batch sizes here: the reports are equal.
    assert run(batch_size=7, max_batch=5) == first


class Noisy(nn.Module):
    """Draws from torch's global generator, and counts its calls."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x.flatten(1)[:, :10] + 0.1 * torch.randn(len(x), 10)


def test_a_model_with_torchs_global_generator_is_evaluated_and_the_generator_restored():
    model, state = Noisy(), torch.get_rng_state()
    reports = [evaluate(model, X, Y, eps=0.1, **QUIET) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert reports[0].samples == reports[1].samples
    assert reports[0].robust.draws == 4
    assert reports[0].robust.mean < reports[0].clean.mean
    # The caller's own object gives the verdicts, and no copy of it.
    assert model.calls > 2 * 4 * 3

    def attack(x, y, ids):
        torch.rand(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, X, Y, attacks={"broken": attack}, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model._forward_hooks


def test_a_deterministic_model_is_judged_by_one_draw():
    report = evaluate(nn.Flatten(), X, Y, eps=0.1, progress=False)
    for verdict in (report.clean, report.robust, report.eight_bit, *report.attacks.values()):
        assert verdict.draws == 1
        assert verdict.mean == verdict.majority == verdict.worst
    assert report.robust.mean == min(v.mean for v in report.attacks.values())
    assert report.emulated["single_draw"]["accuracy"] == report.robust.mean
    assert report.emulated["single_draw"]["sound"]


class Mixture(nn.Module):
    """Every call takes one of two networks for all images, the second one seldom."""

    def forward(self, x):
        z = x.flatten(1)
        return z if torch.rand(()) < 0.9 else z.flip(1)


@pytest.mark.parametrize("count", [2, 50])
def test_a_seldom_choice_of_a_call_makes_a_model_random(count):
    source = make_source(X[:count], Y[:count], Mixture())
    assert not any(Judge(Mixture(), seed, 1, 1).is_repeatable(source) for seed in range(20))
    # A single image of a Defense, of which every second mask is equal.
    hidden = Defense(RT1(patch=4, mask_ratio=0.5), None, nn.Flatten())
    one = make_source(torch.rand(1, 1, 4, 8), Y[:1], hidden)
    assert not any(Judge(hidden, seed, 1, 1).is_repeatable(one) for seed in range(20))


def test_a_model_that_draws_in_vain_is_deterministic():
    def vain(x):
        return x.flatten(1) + 0 * torch.rand(())

    assert Judge(vain, 0, 1, 1).is_repeatable(make_source(X, Y, vain))


def test_one_draw_of_a_random_model_is_not_said_to_be_all():
    options = {"attacks": {"none": lambda x, y: x}, "diagnostics": (), "progress": False, "eps": 0}
    for model, said in ((DEFENSE, "one fresh draw of each"), (nn.Flatten(), "deterministic model")):
        report = evaluate(model, X[:4], Y[:4], draws=1, **options)
        assert report.clean.draws == 1
        assert report.emulated["single_draw"]["sound"] == (said == "deterministic model")
        assert _cards(report.to_dict())[-1] == ("images", "4", said)


def test_passes_are_counted():
    report = evaluate(DEFENSE, X[:16], Y[:16], eps=0.1, draws=5, selection_draws=3, progress=False)
    # Choice and verdict take 8 draws, FGSM 4 and PGD 80.
    expected = {"clean": (8, 0), "fgsm": (4 + 8, 4), "pgd_eot": (80 + 8, 80), "eight_bit": (5, 0)}
    assert list(report.passes) == list(expected)
    for name, (forward, backward) in expected.items():
        passes = report.passes[name]
        assert passes["images"] == 16
        assert passes["backward"] == 16 * backward
        # The rows that fill up a pass, and those by which an attack learns what fits into memory, count too.
        assert 16 * forward <= passes["forward"] <= 16 * forward + 24
    assert report.seconds["total"] == pytest.approx(sum(v for k, v in report.seconds.items() if k != "total"))
    # Passes of other libraries' attacks cannot be counted.
    other = evaluate(DEFENSE, X[:4], Y[:4], attacks={"other": lambda x, y, ids: x}, progress=False)
    assert other.passes["other"] == {"forward": None, "backward": None, "images": 4}


def test_eight_bit_images_stay_in_the_ball():
    clean = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for radius in (8 / 255, 0.6 / 255, 0.0):
        x = (clean + radius * torch.sign(torch.randn(clean.shape))).clamp(0, 1)
        levels = eight_bit(x, clean, radius).double()
        low, high = (255 * (clean.double() + s * radius) for s in (-1, 1))
        holds = low.ceil() <= high.floor()
        assert ((levels >= low - 1e-3) & (levels <= high + 1e-3))[holds].all()
        # If the ball contains no level, or there is no ball, the nearest level is taken.
        assert torch.equal(levels[~holds], (255 * x.double()).round()[~holds])
        assert torch.equal(eight_bit(x, clean, None).double(), (255 * x.double()).round())
    grid = torch.randint(0, 256, (2, 1, 4, 4)).float() / 255
    assert torch.equal(eight_bit(grid, grid, 0.0).float() / 255, grid)


def test_eight_bit_candidates_are_judged_by_the_same_draws():
    x = (255 * X).round() / 255
    report = evaluate(DEFENSE, x, Y, eps=8 / 255, **QUIET)
    # The images are levels and the radius is 8 of them: FGSM's candidates are levels, and judged alike.
    fgsm = evaluate(DEFENSE, x, Y, eps=8 / 255, attacks=lambda m: {"fgsm": quick_attacks(m)["fgsm"]}, **QUIET)
    assert fgsm.eight_bit == fgsm.robust
    assert report.eight_bit.mean == pytest.approx(report.robust.mean, abs=0.05)


def test_the_curve_falls_to_zero():
    report = evaluate(DEFENSE, X, Y, eps=0.1, curve=(0, 0.05, 0.4), **QUIET)
    means = [point["mean"] for point in report.curve]
    assert means == sorted(means, reverse=True)
    assert means[0] == pytest.approx(report.clean.mean, abs=0.1)
    assert means[2] == 0
    assert report.attacks.keys() == {"fgsm", "pgd_eot"}


def test_a_budget_gives_an_upper_bound_and_a_later_call_the_rest(tmp_path, monkeypatch):
    """The clock moves with the attacks alone; it is not part of them, so that their identity does not change."""
    state = threading.local()
    state.slow, state.now = True, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: state.now)

    def attacks(model):
        def wrap(attack):
            def run(x, y, ids):
                state.now += 0.02 * len(x) * state.slow
                return attack(x, y, ids)

            return run

        return {name: wrap(attack) for name, attack in quick_attacks(model, eps=0.1, steps=3).items()}

    def run(budget):
        options = {**QUIET, "batch_size": 50, "out": tmp_path / "run", "eps": 0.1}
        return evaluate(DEFENSE, X, Y, attacks=attacks, budget=budget, **options)

    def table():
        return format_table(json.loads((tmp_path / "run/report.json").read_text())["systems"])

    nothing = run(0)
    assert not nothing.complete
    assert nothing.robust == nothing.clean
    assert nothing.attacks == {"fgsm": None, "pgd_eot": None}
    assert table().splitlines()[2].endswith("0 of 100 attacked  0 of 100 attacked")
    assert (tmp_path / "run/report.html").read_text().count("0 of 100 attacked") >= 6
    begin = time.monotonic()
    some = run("1.2s")
    # Both attacks need 4 s on all images.
    assert time.monotonic() - begin < 3.5
    assert not some.complete
    assert some.passes["fgsm"]["images"] >= 8
    # The column covers only the attacked images, without the clean accuracy of the others.
    counts = {name: some.passes.get(name, {"images": 0})["images"] for name in some.attacks}
    assert {name: verdict.images if verdict else 0 for name, verdict in some.attacks.items()} == counts
    assert 8 <= counts["fgsm"] < 100
    assert some.attacks["fgsm"].mean < some.robust.mean < some.clean.mean
    assert some.diagnostics[-1]["name"] == "budget"
    said = [some.diagnostics[-1]["reason"], table()]
    assert all(f"{count} of 100 attacked" in text for count in counts.values() for text in said)
    html = (tmp_path / "run/report.html").read_text()
    assert "upper bound" in html
    assert all(f"{count} of 100 attacked" in html for count in counts.values())
    state.slow = False
    whole = run(None)
    assert whole.complete
    assert whole.robust.mean <= some.robust.mean <= nothing.robust.mean
    assert "upper bound" not in (tmp_path / "run/report.html").read_text()
    assert whole.samples == evaluate(DEFENSE, X, Y, eps=0.1, attacks=attacks, batch_size=50, **QUIET).samples


def test_budgets_are_read():
    assert [parse_budget(b) for b in (2, 0.5, "90s", "10m", "1.5h", "7")] == [2, 0.5, 90, 600, 5400, 7]
    for bad in ("soon", "10 days", "", "1.2.3m"):
        with pytest.raises(ValueError, match="evaluate: budget must be seconds"):
            parse_budget(bad)


def test_the_report_escapes_what_it_is_given(tmp_path):
    evil = "<script>alert(1)</script>"
    diagnostics = [{"name": evil, "status": "warn", "reason": f"a < b {evil}"}]
    attacks = {evil: lambda x, y, ids: (x + 0.01).clamp(0, 1)}
    options = {**QUIET, "curve": (0.0, 0.1), "diagnostics": diagnostics, "title": evil, "out": tmp_path / "run"}
    report = evaluate(DEFENSE, X[:12], Y[:12], attacks=attacks, **options)
    html = (tmp_path / "run/report.html").read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 5
    assert "Diagnostics" in html
    # The curves against eps and tries, and four rows of eight images in the gallery.
    assert len(re.findall(r'src="data:image/png;base64,iVBOR', html)) == 2 + 4 * 8
    assert html.count("<tr><td>11</td>") == 1
    assert "Not verdicts" in html
    data = json.loads((tmp_path / "run/report.json").read_text())
    assert data["systems"][evil].keys() == {"clean", evil}
    assert data["diagnostics"] == diagnostics
    assert {k: data[k] for k in report.to_dict()} == json.loads(json.dumps(report.to_dict()))
    keys = {
        "clean",
        "robust",
        "attacks",
        "emulated",
        "eight_bit",
        "resubmission",
        "passes",
        "seconds",
        "protocol",
        "norm",
        "eps",
        "seed",
    }
    assert keys | {"versions", "samples", "complete", "diagnostics", "curve"} <= data.keys()


def test_verdicts_are_computed_in_float32():
    """Autocast and reduced precision of the caller's do not reach the judge."""
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            logits = self.linear(x.flatten(1))
            seen.append((x.dtype, logits.dtype, torch.backends.cuda.matmul.fp32_precision))
            return logits

    with torch.autocast("cpu", torch.bfloat16):
        evaluate(Model(), X.bfloat16(), Y, attacks={"none": lambda x, y, ids: x}, progress=False)
    assert set(seen) == {(torch.float32, torch.float32, "ieee")}
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(KeyError), full_precision(torch.device("cpu")):
        raise KeyError
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("arguments", "error", "pattern"),
    [
        ({"draws": 0}, ValueError, "evaluate: draws must be an integer and >= 1, got 0"),
        ({"selection_draws": 0}, ValueError, "evaluate: selection_draws must be an integer and >= 1, got 0"),
        ({"attacks": {"clean": None}}, ValueError, "evaluate: attacks must be named otherwise than clean, robust"),
        ({"eps": -1.0}, ValueError, "evaluate: eps must be finite and >= 0"),
        ({"norm": "L7"}, ValueError, "evaluate: norm must be one of 'Linf', 'L2'"),
        ({"randomness": "none"}, ValueError, "evaluate: randomness must be one of 'fresh', 'fixed', got 'none'"),
        ({"interval": "exact"}, ValueError, "evaluate: interval must be one of 'wilson', 'bootstrap', got 'exact'"),
        ({"curve": 0.1}, TypeError, r"evaluate: curve must be a sequence of radii, such as .*, got float"),
        ({"about": "mynet"}, TypeError, "evaluate: about must be a mapping of texts, .*, got str"),
        (
            {"images": [X[0]], "labels": None},
            TypeError,
            "images must be a tensor with `labels`, .*, got list",
        ),
        ({"curve": (-0.1,)}, ValueError, "evaluate: curve must be finite and >= 0, got -0.1"),
        (
            {"model": nn.Conv2d(3, 1, 1)},
            ValueError,
            r"evaluate: images must be images that the networks take, got \(1, 8, 8\)",
        ),
        ({"images": X[:0], "labels": Y[:0]}, ValueError, "evaluate: images must be at least one, got none"),
        ({"images": X + float("nan")}, ValueError, "evaluate: images must be finite, got NaN or infinity"),
        ({"labels": Y + 60}, ValueError, "evaluate: labels must be class indices below the model's 64 logits, got 69"),
        ({"model": lambda x: x.flatten(1) / 0}, ValueError, "evaluate: model must be a callable with finite logits"),
        ({"model": lambda x: x}, ValueError, r"a callable with logits of shape \(B, classes\), got \(1, 1, 8, 8\)"),
        (
            {"attacks": {"far": lambda x, y, ids: x + 1}},
            ValueError,
            r"attacks\['far'\] must be in \[0, 1\], got values",
        ),
        ({"attacks": {"few": lambda x, y, ids: x[1:]}}, ValueError, r"attacks\['few'\] must be an attack that returns"),
        ({"diagnostics": None}, TypeError, "diagnostics must be True, False, or findings .*, got NoneType"),
        ({"diagnostics": [{"name": "mine"}]}, TypeError, 'or findings with "name", "status" and "reason", got list'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_named(arguments, error, pattern):
    call = {"model": nn.Flatten(), "images": X, "labels": Y, "progress": False, **arguments}
    with pytest.raises(error, match=pattern):
        evaluate(call.pop("model"), **call)


def test_diagnostics_are_switched_off_or_given():
    attacks, finding = {"none": lambda x, y: x}, Finding("mine", "warn", "because", {"n": 1})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reports = [
            evaluate(nn.Flatten(), X, Y, attacks=attacks, progress=False, diagnostics=given)
            for given in (False, (), [finding], [asdict(finding)])
        ]
    names = [[found["name"] for found in report.diagnostics] for report in reports]
    assert [name.count("mine") for name in names] == [0, 0, 1, 1]
    assert names[0] == names[1] == [name for name in names[2] if name != "mine"]
    assert reports[2].diagnostics == reports[3].diagnostics
