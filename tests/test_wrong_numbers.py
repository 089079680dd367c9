"""Inputs and arguments that could silently give wrong numbers: taken as they are meant, or refused by name."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn

from atop_fast import PGD, RT1, RT2, RT3, Defense, build_purifier, evaluate
from atop_fast.attacks import APGD, APGDT, CW, FAB, FGSM, MIFGSM, PMA, AutoAttack, Square, StAdv
from atop_fast.doctor import check_contract, diagnose
from atop_fast.evaluation import PROTOCOLS
from atop_fast.randomness import seeded
from atop_fast.recipes.evaluation import EvaluationConfig

COUNT = 12
X = torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(1))
QUIET = {"progress": False, "diagnostics": ()}
# Attack and the norms that it has.
ATTACKS = {
    "FGSM": (FGSM, ("Linf", "L2"), {}),
    "PGD": (PGD, ("Linf", "L2"), {"steps": 3, "n_restarts": 2}),
    "PGD-momentum": (PGD, ("Linf", "L2"), {"steps": 3, "momentum": 0.9, "schedule": "cosine"}),
    "MIFGSM": (MIFGSM, ("Linf",), {"steps": 3}),
    "PMA": (PMA, ("Linf", "L2", "L1"), {"steps": 4, "n_restarts": 2}),
    "APGD": (APGD, ("Linf", "L2", "L1"), {"steps": 3, "n_restarts": 2}),
    # Two steps: once the label ranks third, the gradient of dlr is a rounding error, and L2 gives it full length.
    "APGD-dlr": (APGD, ("Linf", "L2", "L1"), {"steps": 2, "loss": "dlr"}),
    "APGDT": (APGDT, ("Linf", "L2", "L1"), {"steps": 3}),
    "FAB": (FAB, ("Linf", "L2", "L1"), {"steps": 3, "n_restarts": 2}),
    "Square": (Square, ("Linf", "L2", "L1"), {"n_queries": 9}),
    "CW": (CW, ("L2",), {"steps": 30, "lr": 0.1, "c": 100.0}),
    "StAdv": (StAdv, (None,), {"steps": 3}),
    "AutoAttack": (AutoAttack, ("Linf", "L2", "L1"), {"steps": 3, "n_queries": 9}),
    "AutoAttack-fast": (AutoAttack, ("Linf", "L2", "L1"), {"version": "fast", "steps": 4, "n_queries": 9}),
}
CASES = [(name, norm) for name, (_, norms, _) in ATTACKS.items() for norm in norms]
EPS = {"Linf": 0.1, "L2": 0.8, "L1": 4.0}


def network(classes: int = 10, seed: int = 0) -> nn.Module:
    """Untrained, but with small margins: attacks fool it."""
    with seeded(seed):
        layers = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, classes))
        return nn.Sequential(*layers).eval()


def labels(model) -> torch.Tensor:
    with torch.no_grad():
        return model(X).argmax(dim=1)


def attack(name, norm, model):
    kind, _, options = ATTACKS[name]
    return kind(model, **options, **({} if norm is None else {"norm": norm, "eps": EPS[norm]}))


def entry_points(model, x, y):
    """Calls of everything that takes a model, by name."""
    calls = {name: partial(attack(name, norms[0], model), x, y) for name, (_, norms, _) in ATTACKS.items()}
    calls["evaluate"] = lambda: evaluate(model, x, y, **QUIET)
    calls["diagnose"] = lambda: diagnose(model, x, y)
    calls["check_contract"] = lambda: check_contract(model, x, y)
    return calls


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (
            lambda net, x: net(x)[:, :1],
            ValueError,
            r"model must be .* torch.cat\(\(-z, z\), 1\)\), got \(\d+, 1\)",
        ),
        (lambda net, x: net(x)[:, 0], ValueError, r"model must be .*for one logit z\[:, None\] .*, got \(\d+,\)"),
        (
            lambda net, x: x,
            ValueError,
            r"model must be .* logits of shape \(B, classes\), got \(\d+, 1, 8",
        ),
        (lambda net, x: net(x)[:1], ValueError, r"model must be .* got \(1, 10\) for|model must be .* for \d+ images"),
        (lambda net, x: (net(x), None), TypeError, r"model must return logits .* got tuple of 2; wrap it: .*\[0\]"),
        (
            lambda net, x: {"logits": net(x)},
            TypeError,
            r"model must return logits .* got dict with .*; wrap it",
        ),
        (lambda net, x: net(x).numpy(force=True), TypeError, r"model must return logits .* got ndarray; wrap it"),
    ],
    ids=["one logit", "no classes", "images", "fewer rows", "tuple", "dict", "numpy"],
)
def test_what_is_no_logits_is_refused_by_every_entry_point(model, error, words):
    net = network()
    for name, call in entry_points(lambda x: model(net, x), X, labels(net)).items():
        with pytest.raises(error, match=words) as raised:
            call()
        assert str(raised.value).startswith(name.partition("-")[0])


def test_labels_beyond_the_classes_are_refused_by_every_entry_point():
    net = network()
    for module in (net, lambda x: net(x)):
        for call in entry_points(module, X, torch.full((COUNT,), 10)).values():
            with pytest.raises(ValueError, match=r": (y|labels) must be class indices below .* 10 logits, got 10"):
                call()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_few_classes_work_in_every_protocol(classes, protocol, monkeypatch):
    plan = PROTOCOLS[protocol]
    for entry in plan.attacks.values():
        for key, most in (("steps", 2), ("n_queries", 4), ("eot_iter", 2)):
            if key in entry.options:
                monkeypatch.setitem(entry.options, key, min(most, entry.options[key]))
    model = network(classes)
    defense = Defense(RT2(4, sigma=0.1), None, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "APGD: loss is 'margin'")
        for subject in (defense, model) if protocol != "bpda-eot" else (defense,):
            report = evaluate(subject, X, labels(model), protocol=protocol, **QUIET)
            assert report.complete
            assert set(report.attacks) == set(plan.attacks)


def test_apgd_on_two_classes_says_that_it_takes_the_margin():
    model = network(2)
    options = {"eps": 0.1, "steps": 4, "seed": 3}
    with pytest.warns(UserWarning, match="APGD: loss is 'margin', as 'dlr' needs 3 classes, got 2"):
        found = APGD(model, loss="dlr", **options)(X, labels(model))
    assert torch.equal(found, APGD(model, loss="margin", **options)(X, labels(model)))


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_every_attack_takes_double_precision(name, norm):
    single = network()
    double, x, y = network().double(), X.double(), labels(single)
    found = attack(name, norm, double)(x, y)
    assert found.dtype == torch.float64
    assert (found != x).any()
    if norm is not None:
        distance = torch.linalg.vector_norm((found - x).flatten(1), {"Linf": torch.inf, "L2": 2, "L1": 1}[norm], dim=1)
        assert distance.max() <= EPS[norm] * (1 + 1e-9)
    # Single precision finds the same, except for signs of gradients near 0.
    other = attack(name, norm, single)(X, y)
    assert ((found - other).abs() > 1e-3).double().mean() < 0.05


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_an_offset_that_hides_margins_from_single_precision_changes_no_attack(name, norm):
    double, x = network().double(), X.double()
    y = labels(network())
    expected = attack(name, norm, double)(x, y)
    found = attack(name, norm, lambda x: double(x) + 1e8)(x, y)
    assert ((found - expected).abs() > 1e-3).double().mean() < 0.05


INSIDE = [(kind, norm) for kind in (PGD, PMA, APGD, APGDT) for norm in EPS if norm in kind.norms]


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize(("kind", "norm"), INSIDE)
def test_a_start_outside_of_the_ball_is_taken_into_it(kind, norm, early_stop):
    model = network()
    # The start is fooled, so that it would be a candidate.
    start = 1 - X
    y = (labels(model).where(labels(model) != model(start).argmax(dim=1), labels(model) + 1)) % 10
    found = kind(model, norm=norm, eps=EPS[norm], steps=4, early_stop=early_stop)(X, y, start=start)
    distance = torch.linalg.vector_norm((found - X).flatten(1), {"Linf": torch.inf, "L2": 2, "L1": 1}[norm], dim=1)
    assert distance.max() <= EPS[norm] * (1 + 1e-5)


transforms = pytest.mark.parametrize("transform", [RT1(2), RT2(2), RT3(2)], ids=["RT1", "RT2", "RT3"])


@pytest.mark.parametrize("gradient", ["exact", "checkpointed", "bpda", "blind"])
@transforms
def test_a_defense_in_double_precision_is_attacked(transform, gradient):
    defense = Defense(transform, build_purifier("unet", channels=1, width=4), network()).double()
    found = PGD(defense, steps=2, eot_iter=2, gradient=gradient)(X.double(), labels(network()))
    assert found.dtype == torch.float64


@transforms
def test_a_defense_in_double_precision_is_evaluated(transform):
    defense = Defense(transform, build_purifier("unet", channels=1, width=4), network()).double()
    report = evaluate(defense, X.double(), labels(network()), draws=2, selection_draws=2, **QUIET)
    assert report.robust.images == COUNT


def test_evaluate_judges_double_precision_in_it():
    """Logits that single precision cannot tell apart."""

    def model(x):
        z = 1 + 1e-12 * (x.flatten(1) - 0.5)
        return torch.stack((z[:, 0], z.new_ones(len(z))), dim=1)

    x = torch.full((4, 1, 1, 1), 0.7, dtype=torch.float64)
    report = evaluate(model, x, torch.zeros(4, dtype=torch.int64), eps=0.1, attacks={"none": lambda x, y: x}, **QUIET)
    assert report.clean.mean == 1
    x[:2] = 0.3
    report = evaluate(model, x, torch.zeros(4, dtype=torch.int64), eps=0.1, attacks={"none": lambda x, y: x}, **QUIET)
    assert (report.clean.mean, report.eight_bit.mean) == (0.5, 0.5)


def test_images_of_another_dtype_than_the_model_are_named():
    single, double, y = network(), network().double(), labels(network())
    for model, x in ((single, X.double()), (double, X), (lambda x: double(x), X)):
        for name, call in entry_points(model, x, y).items():
            with pytest.raises(TypeError, match=r": (x|images) must be of the dtype in which the model computes .*got"):
                call()
            assert name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_16_bits_are_refused_by_every_attack(dtype):
    model, y = network().to(dtype), labels(network())
    way = {torch.float16: "half", torch.bfloat16: "bfloat16"}[dtype]
    for name, norm in CASES:
        with pytest.raises(TypeError, match=rf": images must be float32 or float64 .*\(x\.{way}\(\)\)\), got {dtype}"):
            attack(name, norm, model)(X.to(dtype), y)


def test_a_start_of_another_dtype_than_the_images_is_named():
    model = network()
    for kind in (PGD, APGD, CW):
        with pytest.raises(
            TypeError, match=f"{kind.__name__}: start must be of the dtype of images torch.float32, got"
        ):
            kind(model, steps=2)(X, labels(model), start=X.double())


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: PGD(network(), 1.0, 0.2, 10, "L2"), "random_start"),
        (lambda: FGSM(network(), early_stop="false"), "early_stop"),
        (lambda: APGD(network(), "L1", 12.0, shrink_eps="no"), "shrink_eps"),
        (lambda: Square(network(), resc_schedule="no"), "resc_schedule"),
    ],
)
def test_text_is_no_bool(call, argument):
    with pytest.raises(TypeError, match=f": {argument} must be True or False, got '"):
        call()


@pytest.mark.parametrize(("kind", "options"), [(APGDT, {}), (PMA, {"target_classes": 1})], ids=["APGDT", "PMA"])
def test_a_misclassified_image_stays_so(kind, options):
    model = network(2)
    with torch.no_grad():
        model[3].bias[1] -= model(X).diff(dim=1).median()
        y = 1 - labels(model)
        assert (model(kind(model, eps=0.05, steps=3, **options)(X, y)).argmax(dim=1) != y).all()


def test_rounding_outside_of_the_range_is_clamped_and_the_caller_keeps_the_images():
    x = X.clone()
    x[:, :, :2], x[:, :, 2:4] = 1.0000005, -5e-7
    kept, y, model = x.clone(), labels(network()), network()
    for name, norm in CASES:
        found = attack(name, norm, model)(x, y)
        assert 0 <= found.min() <= found.max() <= 1, name
    evaluate(model, x, y, **QUIET)
    assert {f.name for f in check_contract(model, x, y) if f.status == "fail"} <= {"normalization"}
    assert torch.equal(x, kept)
    with pytest.raises(ValueError, match=r"evaluate: images must be in \[0, 1\], got values in \[.*, 1.000010\d+\]"):
        evaluate(model, x + 1e-5, y, **QUIET)


def test_a_radius_of_more_than_every_image_is_said():
    model, y = network(), labels(network())
    for call in (
        lambda: PGD(model, eps=8),
        lambda: AutoAttack(model, eps=8),
        lambda: evaluate(model, X, y, eps=8, attacks={"none": lambda x, y: x}, **QUIET),
        lambda: diagnose(model, X, y, eps=8, checks=["logits"]),
    ):
        with pytest.warns(UserWarning, match="eps 8 is above 1, the whole range of pixels"):
            call()
    PGD(model, norm="L2", eps=8)
    APGD(model, "L1", eps=8)


def test_the_default_radius_of_linf_is_said_in_other_norms():
    model, y = network(), labels(network())
    for call in (
        lambda: PGD(model, norm="L2"),
        lambda: APGD(model, "L1"),
        lambda: AutoAttack(model, "L2"),
        lambda: evaluate(model, X, y, norm="L2", eps=8 / 255, attacks={"none": lambda x, y: x}, **QUIET),
        lambda: diagnose(model, X, y, norm="L2", checks=["logits"]),
    ):
        with pytest.warns(UserWarning, match=r"eps 0.0313725 is the default, for Linf; .* papers take 0.5 in L2"):
            call()
    PGD(model, norm="L2", eps=0.03)


def test_another_norm_than_the_protocols_needs_a_radius():
    """8/255, a radius in Linf, is next to no attack in L2: the robust accuracy was nearly that on clean images."""
    model, y = network(), labels(network())
    for norm, protocol, pattern in (
        ("L2", "quick", "evaluate: eps must be given with the norm L2, as the protocol's 0.03137 is a radius in Linf"),
        ("L1", "pgd-eot", "eps must be given with the norm L1"),
        ("Linf", "unseen", "eps must be given with the norm Linf, as the protocol's 0.5 is a radius in L2"),
    ):
        with pytest.raises(ValueError, match=pattern):
            evaluate(model, X, y, norm=norm, protocol=protocol, **QUIET)
        with pytest.raises(ValueError, match=pattern):
            EvaluationConfig(norm=norm, protocol=protocol)
    assert EvaluationConfig(norm="L2", eps=0.3).threat == ("L2", 0.3)
    assert EvaluationConfig(norm="L2", protocol="unseen").threat == ("L2", 0.5)
    assert EvaluationConfig(eps=0.3).threat == ("Linf", 0.3)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_candidates_outside_of_the_ball_are_said(norm):
    model, y = network(), labels(network())
    far = {"mine": lambda x, y, ids: (x + torch.where(ids < 5, 0.5, 0.0)[:, None, None, None]).clamp(0, 1)}
    with pytest.warns(UserWarning, match=rf"attacks\['mine'\]: 5 of 12 candidates lie outside of the {norm} ball"):
        report = evaluate(model, X, y, norm=norm, eps=1 / 255, attacks=far, **QUIET)
    (finding,) = report.diagnostics
    assert (finding["name"], finding["status"]) == ("ball", "fail")
    assert finding["numbers"]["mine"]["outside"] == 5
    # Those of this library do not leave their balls, and another threat model can be declared.
    kinds = [name for name, case in CASES if case == norm and name != "CW"]
    inside = {name: attack(name, norm, model) for name in kinds}
    flow = StAdv(model, bound=0.2, steps=2)
    assert evaluate(model, X, y, norm=norm, eps=EPS[norm], attacks={**inside, "flow": flow}, **QUIET).diagnostics == []


class Normalized(nn.Module):
    """Logits of what comes before a normalization that was forgotten, or not."""

    def __init__(self, forgotten):
        super().__init__()
        self.forgotten = forgotten

    def forward(self, x):
        z = (x if self.forgotten else (x - 0.5) / 0.5).flatten(1)[:, :10]
        return z.abs()


def test_the_contract_is_checked_without_a_folder_and_can_be_left_out():
    """A model that wants images in [-1, 1] and gets [0, 1] is right on fewer of them."""
    x = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = (2 * x - 1).flatten(1)[:, :10].abs().argmax(dim=1)
    with pytest.warns(UserWarning, match="evaluate: the check 'normalization' fails: .* it normalizes twice, or not"):
        report = evaluate(Normalized(True), x, y, eps=0.01, progress=False)
    found = {finding["name"]: finding["status"] for finding in report.diagnostics}
    assert found["normalization"] == "fail"
    assert {"finite", "logits", "determinism", "batch_coupling", "accuracy", "zero_gradient"} <= set(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(Normalized(True), x, y, eps=0.01, **QUIET).diagnostics == []


@pytest.mark.parametrize(
    "wrapper", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["dp", "compiled"]
)
def test_a_wrapped_defense_is_refused(wrapper):
    wrapped = wrapper(Defense(RT2(4), None, network()))
    refused(wrapped, r"model must be a Defense itself .*, got a (DataParallel|OptimizedModule)")


def refused(model, pattern):
    """Attacks, evaluation and doctor do not take the model."""
    y = labels(network())
    for call in (
        lambda: PGD(model),
        lambda: AutoAttack(model),
        lambda: evaluate(model, X, y, **QUIET),
        lambda: diagnose(model, X, y),
    ):
        with pytest.raises(TypeError, match=pattern):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_16_bits_is_refused_with_the_way_to_judge_it(dtype):
    model, y = network().to(dtype), labels(network())
    way = {torch.bfloat16: "bfloat16", torch.float16: "half"}[dtype]
    for images in (X, X.to(dtype)):
        with pytest.raises(TypeError, match=rf"\(take model\.float\(\), or lambda x: model\(x\.{way}\(\)\)\)"):
            evaluate(model, images, y, **QUIET)
    assert evaluate(lambda x: model(x.to(dtype)), X, y, **QUIET).clean.mean > 0.5


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        (None, "model must be a callable from images to logits, got NoneType"),
        ("resnet18", "model must be a callable from images to logits, got str"),
        (nn.Flatten, r"model must be an instance, Flatten\(...\), got the class Flatten"),
    ],
    ids=["none", "name", "class"],
)
def test_what_is_no_model_is_refused(given, pattern):
    refused(given, pattern)


@pytest.mark.parametrize("kept", [False, True])
def test_a_contract_that_cannot_be_checked_is_said_and_the_evaluation_goes_on(tmp_path, kept):
    class Undifferentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no gradient here")

    net = network()
    with pytest.warns(UserWarning, match="the check 'contract' warns: The contract could not be checked: RuntimeError"):
        report = evaluate(
            lambda x: net(Undifferentiable.apply(x)),
            X,
            labels(net),
            eps=0.1,
            attacks=lambda m: {"square": Square(m, eps=0.1, n_queries=8)},
            out=tmp_path / "run" if kept else None,
            progress=False,
        )
    assert report.complete


def test_points_of_a_curve_that_a_budget_left_out_have_no_accuracy():
    model = network()
    report = evaluate(model, X, labels(model), eps=0.1, curve=(0.0, 0.1), budget=0, **QUIET)
    assert report.curve == [{"eps": 0.0, "attacked": 0}, {"eps": 0.1, "attacked": 0}]
