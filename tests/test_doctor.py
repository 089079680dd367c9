"""Diagnostics: plain models pass, every defect is found by the check that is named after it, nothing is changed."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atop_fast import PGD, RT1, RT2, Defense, build_classifier, evaluate, save_model
from atop_fast.defenses import GaussianNoise
from atop_fast.doctor import CHECKS, TRAINING_CHECKS, check_contract, conclude, diagnose, format_findings
from atop_fast.doctor._order import find_order
from atop_fast.doctor._probe import Probe, excess
from atop_fast.doctor.command import doctor
from atop_fast.doctor.contract import PASSES
from atop_fast.doctor.overfitting import auc_below, difference_errors
from atop_fast.randomness import Tag, derive_seed, permutation, random_uniform, seeded

EPS = 0.15
DEFENSE_CHECKS = {"gradient_modes", "fixed_randomness", "useless_transform"}


@pytest.fixture(scope="module")
def digits():
    """Digits on which the networks were trained, and 128 others."""
    return models.all_digits().split(4000, seed=0)[0], models.mnist().take(slice(0, 128))


@pytest.fixture(scope="module")
def standard():
    """An undefended classifier."""
    # A copy: some of these tests put it in training mode, and other files have the same one.
    return copy.deepcopy(models.standard_mnist())


@pytest.fixture(scope="module")
def robust():
    """An adversarially trained one."""
    return models.robust_mnist()


class Changed(nn.Module):
    """A classifier whose input, output or both are changed."""

    def __init__(self, model, before=None, after=None):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        z = self.model(x if self.before is None else self.before(x))
        return z if self.after is None else self.after(z)


def found(findings):
    """Names of the findings that are no pass, with their status."""
    return {f.name: f.status for f in findings if f.status != "pass"}


def run(model, data, **options):
    return found(diagnose(model, data.images, data.labels, eps=EPS, **options))


@pytest.mark.parametrize("kind", ["standard", "robust"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_plain_models_pass(request, digits, kind, norm):
    model, data = request.getfixturevalue(kind), digits[1]
    findings = diagnose(model, data.images, data.labels, norm=norm, eps=EPS if norm == "Linf" else 1.0)
    assert [f.name for f in findings] == [name for name in CHECKS if name not in DEFENSE_CHECKS]
    assert found(findings) == {}, format_findings(findings)


def test_the_trained_model_is_robust(digits, standard, robust):
    """Else the test above would say little."""
    x, y = digits[1].images, digits[1].labels
    left = []
    for model in (standard, robust):
        with torch.no_grad():
            left.append(float((model(PGD(model, eps=EPS, steps=20)(x, y)).argmax(dim=1) == y).float().mean()))
    assert left[1] > left[0] + 0.2


def test_shattered_gradient_fails(digits, robust):
    bad = run(Changed(robust, lambda x: (4 * x).round() / 4), digits[1])
    assert bad["zero_gradient"] == bad["finite_difference"] == "fail"


def test_gradient_of_another_function_fails(digits, standard):
    """Not zero, so that only the finite difference can tell."""
    bad = run(Changed(standard, lambda x: (15 * x).round() / 15 + 1e-3 * x), digits[1])
    assert bad["finite_difference"] == "fail"
    assert "zero_gradient" not in bad


@pytest.mark.parametrize("kind", ["standard", pytest.param("robust", marks=pytest.mark.slow)])
def test_useless_random_transform_fails(request, digits, kind):
    defense = Defense(RT2(4, 0.0, 0.02), None, request.getfixturevalue(kind)).eval()
    bad = run(defense, digits[1], max_images=32)
    assert bad["useless_transform"] == "fail"


class Binarize(nn.Module):
    """A purifier that takes images close to black and white: robust on digits, with or without a gradient."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, corrupted):
        return torch.tanh(self.slope * corrupted[:, :-2])


def test_a_defense_that_works_passes(digits, standard):
    assert run(Defense(RT1(2, 0.05), Binarize(4), standard).eval(), digits[1], max_images=32) == {}


def test_purifier_that_masks_its_gradient_is_found(digits, standard):
    # A tanh this steep is 1 in float32, and its gradient 0, wherever the image is not mid-gray.
    defense = Defense(RT1(2, 0.05), Binarize(400), standard).eval()
    findings = diagnose(defense, digits[1].images, digits[1].labels, eps=EPS, checks=["finite_difference"])
    assert found(findings) == {"finite_difference": "fail"}


def test_gradient_only_at_the_images_is_weaker_in_many_steps(digits, standard):
    def before(x):
        # Images are multiples of 1 / 255; PGD's random start is not.
        grid = ((255 * x).round() / 255 - x).abs().amax(dim=(1, 2, 3), keepdim=True) < 1e-6
        return torch.where(grid, x, x.detach())

    assert run(Changed(standard, before), digits[1], checks=["iterations"]) == {"iterations": "fail"}


class WrongBackward(torch.autograd.Function):
    """The identity, with the gradient's sign turned."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def test_misleading_gradient_fails(digits, standard):
    bad = run(Changed(standard, WrongBackward.apply), digits[1])
    assert bad["finite_difference"] == bad["black_box"] == "fail"


def test_misleading_purifier_is_weaker_than_bpda(digits, standard):
    class Turned(nn.Module):
        def forward(self, corrupted):
            return WrongBackward.apply(corrupted[:, :-2])

    defense = Defense(RT2(4, 0.0, 0.02), Turned(), standard).eval()
    bad = run(defense, digits[1], checks=["gradient_modes", "iterations"])
    assert bad["gradient_modes"] == "fail"


def test_accuracy_that_does_not_fall_fails(digits):
    """An input that is ignored: 90 % right by the image's identity, which is no robustness that an attack can test."""
    labels = digits[1].labels

    def oracle(x):
        right = F.one_hot(labels[permutation(len(labels), derive_seed(0, "doctor"), 0)[:64].sort()[0]], 10).float()
        return right[: len(x)] + 0 * x.sum(dim=(1, 2, 3))[:, None]

    bad = run(oracle, digits[1], checks=["eps_sweep"])
    assert bad == {"eps_sweep": "fail"}


CONTRACT = {
    "softmax": ("logits", "fail", lambda m: Changed(m, after=lambda z: z.softmax(1))),
    "log-softmax": ("logits", "warn", lambda m: Changed(m, after=lambda z: z.log_softmax(1))),
    "sigmoid": ("logits", "warn", lambda m: Changed(m, after=torch.sigmoid)),
    "NaN": ("finite", "fail", lambda m: Changed(m, after=lambda z: torch.where(z[:, :1] > 0, z, torch.nan))),
    "detached": ("finite", "fail", lambda m: Changed(m, torch.Tensor.detach)),
    "saturated": ("zero_gradient", "fail", lambda m: Changed(m, after=lambda z: 1e4 * z)),
    "constant": ("accuracy", "warn", lambda m: Changed(m, lambda x: 0 * x)),
    "dropout": ("mode", "fail", lambda m: Changed(m, nn.Dropout(0.5)).train()),
    "functional dropout": ("determinism", "warn", lambda m: Changed(m, lambda x: F.dropout(x, 0.2))),
    "batch norm": ("batch_coupling", "fail", lambda m: Changed(m, nn.BatchNorm2d(1)).train()),
    "batch statistics": ("batch_coupling", "fail", lambda m: Changed(m, nn.BatchNorm2d(1, track_running_stats=False))),
}


@pytest.mark.parametrize("defect", CONTRACT)
def test_contract(digits, standard, defect):
    name, status, build = CONTRACT[defect]
    findings = check_contract(build(standard), digits[1].images, digits[1].labels)
    assert found(findings).get(name) == status, format_findings(findings)
    reason = {f.name: f.reason for f in findings}[name]
    told = {"saturated": "saturate the softmax", "detached": "cut off", "dropout": "Dropout", "batch norm": "eval()"}
    assert told.get(defect, "") in reason


class Centroids(nn.Module):
    """The nearest mean image of a class, which shift and scale of the images lead astray."""

    def __init__(self, data):
        super().__init__()
        self.register_buffer("means", torch.stack([data.images[data.labels == k].mean(dim=0) for k in range(10)]))

    def forward(self, x):
        c = normalized(self.means).flatten(1)
        return 2 * x.flatten(1) @ c.T - c.square().sum(dim=1)


def normalized(x):
    return (x - 0.1307) / 0.3081


def test_normalization_that_costs_accuracy_fails(digits):
    centroids = Centroids(digits[0])
    for before, status in ((normalized, None), (None, "fail")):
        findings = check_contract(Changed(centroids, before), digits[1].images, digits[1].labels)
        assert found(findings).get("normalization") == status, format_findings(findings)


class Drawn(nn.Module):
    """A classifier that stretches the contrast of its images, and adds keyed noise to its logits."""

    keyed = True

    def __init__(self, model, sigma):
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x, seed, sample_ids, draw):
        low, high = (end(x, dim=(1, 2, 3), keepdim=True) for end in (torch.amin, torch.amax))
        noise = random_uniform((10,), seed, sample_ids, draw, Tag.NOISE)
        return self.model((x - low) / (high - low)) + self.sigma * noise


@pytest.mark.slow
def test_a_classifier_that_draws_is_asked_with_its_key(digits, standard):
    """Under one draw, no normalization matters to it; draws of their own would make one look better by chance."""
    data = digits[1].take(slice(0, 64))
    defense = Defense(GaussianNoise(0), None, Drawn(standard, 20.0)).eval()
    for seed in range(5):
        (finding,) = check_contract(defense, data.images, data.labels, seed=seed, checks=["normalization"])
        assert finding.status == "pass"
        accuracies = {value for name, value in finding.numbers.items() if name != "first_layer_largest"}
        assert min(accuracies) > 0.3
        assert max(accuracies) < min(accuracies) + 0.05
    (finding,) = diagnose(defense, data.images, data.labels, eps=EPS, steps=5, checks=["useless_transform"])
    # Behind a transform that does nothing, each attack meets the same model.
    assert (finding.status, abs(finding.numbers["gain"]) < 0.1) == ("fail", True)


@pytest.mark.parametrize("known", [10, 4])
def test_classes_in_another_order_are_found(digits, standard, known):
    """Also where some classes have no image; the normalization is not accused for it."""
    data = digits[1].take(digits[1].labels < known)
    order = torch.tensor([3, 2, 1, 0, *range(4, 10)])
    findings = {f.name: f for f in check_contract(standard, data.images, order[data.labels])}
    found = findings["accuracy"]
    assert (found.status, findings["normalization"].status) == ("fail" if known == 4 else "warn", "pass")
    assert found.numbers["order"][:4] == [3, 2, 1, 0]
    assert found.numbers["accuracy_in_order"] > 0.8
    assert "0 for 3, 1 for 2, 2 for 1, 3 for 0" in found.reason


def test_an_order_is_not_found_where_there_is_none():
    """Guesses of 64 images, in few and many classes and with frequent ones, and a classifier that confuses two."""
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 3, 10, 100):
        for _ in range(100):
            labels = torch.randint(classes, (64,), generator=generator)
            labels[:: 3 if classes > 2 else 64] = 0
            predicted = torch.randint(classes, (64,), generator=generator)
            assert find_order(predicted, labels, classes) is None
            assert find_order(torch.zeros_like(labels), labels, classes) is None
            assert find_order(labels, labels, classes) is None
    labels = torch.arange(64) % 4
    assert find_order(labels.clamp(min=1), labels, 4) is None
    for _ in range(20):
        order = torch.randperm(4, generator=generator)
        if not torch.equal(order, torch.arange(4)):
            found = find_order(labels, order[labels], 4)
            assert found is not None
            assert torch.equal(found[0], order)
            assert found[1] == 1


def test_double_normalization_is_found_at_the_first_layer(digits, standard):
    x, y = digits[1].images, digits[1].labels
    for before, status in ((normalized, None), (lambda x: normalized(normalized(x)), "warn")):
        model = Changed(standard, before)
        assert found(check_contract(model, x, y, checks=["normalization"])).get("normalization") == status
        assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: 255 * x, "divide by 255"),
        (lambda x: 2 * x - 1, r"looks like [-1, 1]"),
        (lambda x: (x - 0.1307) / 0.3081, "normalization"),
        (lambda x: torch.where(x > 0.9, torch.nan, x), "NaN"),
    ],
)
def test_images_outside_0_1(digits, standard, change, said):
    (finding,) = diagnose(standard, change(digits[1].images), digits[1].labels)
    assert (finding.name, finding.status) == ("images", "fail")
    assert said in finding.reason


def test_whose_randomness(digits, standard):
    generator = torch.Generator()

    def noisy(x):
        return standard(x + 0.05 * torch.randn(x.shape, generator=generator))

    def by_numpy(x):
        return x + 0.05 * torch.from_numpy(np.random.randn(*x.shape)).float()

    models = (
        ("none", standard),
        ("keys", Defense(RT2(4, 0.25, 0.1), None, standard)),
        ("global generators", Changed(standard, lambda x: x + 0.05 * torch.randn_like(x))),
        ("global generators", Changed(standard, by_numpy)),
        ("other", noisy),
        ("other", nn.Sequential(Defense(RT2(4, 0.25, 0.1), None, standard))),
    )
    for source, model in models:
        (finding,) = check_contract(model, digits[1].images, digits[1].labels, checks=["determinism"])
        assert finding.numbers["source"] == source
    assert finding.status == "fail"
    assert "a Defense inside another module" in finding.reason


def test_a_seldom_choice_of_a_call_is_found():
    """A call that picks one of two networks for all images: most pairs of draws are equal."""

    class Mixture(nn.Module):
        def forward(self, x):
            z = x.flatten(1)
            return z if torch.rand(()) < 0.9 else z.flip(1)

    x, y = torch.rand(16, 1, 2, 2), torch.arange(16) % 4
    for seed in range(10):
        (finding,) = check_contract(Mixture(), x, y, seed=seed, checks=["determinism"])
        assert (finding.status, finding.numbers["source"]) == ("warn", "global generators")
        assert finding.numbers["one_draw_for_a_batch"]
        assert "One draw decides for a whole batch" in finding.reason
    noisy = Changed(nn.Flatten(), lambda x: x + torch.randn_like(x))
    (finding,) = check_contract(noisy, x, y, checks=["determinism"])
    assert not finding.numbers["one_draw_for_a_batch"]


@pytest.mark.parametrize(("count", "more"), [(1, True), (8, False)])
def test_too_few_images_for_any_accuracy_above_chance_are_said(count, more):
    """One image that is right of ten classes is no evidence, and eight are."""
    x, y = torch.rand(count, 1, 4, 4), torch.zeros(count, dtype=torch.int64)
    (finding,) = check_contract(lambda z: 1 + z.flatten(1)[:, :10], x, y, checks=["accuracy"])
    assert ("give more images" in finding.reason) is more


def test_cost_counts_what_autograd_keeps(digits):
    """Twice exp keeps both results, float32; a frozen linear layer keeps its weight, which is no image's."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    x, y = digits[1].images, digits[1].labels
    (plain,) = check_contract(model, x, y, checks=["cost"])
    (twice,) = check_contract(Changed(model, lambda x: x.exp().exp()), x, y, checks=["cost"])
    assert twice.numbers["saved_bytes"] - plain.numbers["saved_bytes"] == 2 * 4 * 1024
    seconds = plain.numbers["protocol_seconds"]
    assert 0 < seconds["quick"] < seconds["pgd-200"] < seconds["autoattack"]


@pytest.mark.parametrize("protocol", ["quick", "eot-fast"])
def test_cost_counts_the_passes_of_evaluate(protocol):
    model = Defense(RT2(2, sigma=0.1), None, nn.Flatten())
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8)
    passes = evaluate(model, x, y, protocol=protocol, diagnostics=False, progress=False).passes.values()
    forward, backward = (sum(p[way] for p in passes) / 8 for way in ("forward", "backward"))
    gradients, further = PASSES["random"][protocol]
    # Attacks compare their copy of a network with it in up to two passes.
    assert (backward, forward - backward) == (gradients, pytest.approx(further, abs=3))


def test_a_few_equal_differences_are_no_proof_that_a_transform_is_useless():
    """The attack breaks the defense and its classifier on all images: 12 equal differences leave gains above 0.1."""
    x = torch.rand(40, 1, 4, 4)
    y = x.flatten(1).argmax(1)
    model = Defense(GaussianNoise(1e-4), None, nn.Flatten())
    for count, status in ((12, "warn"), (40, "fail")):
        checks = ["useless_transform"]
        (finding,) = diagnose(model, x[:count], y[:count], eps=1.0, checks=checks)
        assert (finding.status, finding.numbers["gain"]) == (status, 0)


def test_a_gain_at_half_the_radius_alone_is_useless():
    """Means of 0.5 +- 0.15 decide; the classifier weighs a difference of two pixels, and the purifier removes it."""

    def logits(pixels):
        z = pixels.mean(dim=1) - 0.5 + 10 * (pixels[:, 0] - pixels[:, 1])
        return torch.stack((-z, z), dim=1)

    def without_difference(corrupted):
        pixels = corrupted[:, :-2].flatten(1)
        pair = pixels[:, :2].mean(dim=1, keepdim=True).expand(-1, 2)
        return torch.cat((pair, pixels[:, 2:]), dim=1).view_as(corrupted[:, :-2])

    y = torch.arange(64) % 2
    x = (0.35 + 0.3 * y.float()).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    model = Defense(GaussianNoise(0), Changed(nn.Identity(), without_difference), Changed(nn.Flatten(), after=logits))
    for eps, status in ((0.1, "pass"), (0.2, "fail")):
        (finding,) = diagnose(model, x, y, eps=eps, checks=["useless_transform"])
        assert finding.status == status, finding
        assert finding.numbers["gain"] > 0.3
    assert finding.numbers["gain_at_eps"] == 0
    assert "or a smaller radius" in finding.reason


def test_gradient_noise_follows_its_law(digits):
    """Gradients 0.5 + 1.5 n in every pixel: SNR(n) = n / 9, and the cosine is sqrt(1 / (1 + 9 / n))."""
    x, y = torch.full((8, 1, 16, 16), 0.5), torch.zeros(8, dtype=torch.int64)

    def model(images):
        # The cross-entropy of two equal logits has the gradient (-1/2, 1/2) in them, whatever the noise.
        z = (images + 1.5 * torch.randn_like(images)).detach() * images
        z = z.sum(dim=(1, 2, 3)) - z.sum(dim=(1, 2, 3)).detach()
        return torch.stack((-z, z), dim=1) + torch.randn(1)

    options = {"norm": "Linf", "eps": EPS, "seed": 0, "steps": 1, "eot_iter": None, "total": 8}
    cosines = Probe(model, x, y, torch.arange(8), **options).cosines
    for n, cosine in cosines.items():
        assert cosine == pytest.approx(math.sqrt(1 / (1 + 9 / n)), abs=0.02)
    (finding,) = diagnose(model, x, y, checks=["gradient_noise"])
    # 1 / (1 + 9 / n) >= 0.81 from n = 38.4.
    assert finding.numbers["recommended_eot_iter"] == 64


def test_excess_is_mcnemar():
    a, b = torch.zeros(100), torch.zeros(100)
    a[:9], b[9:10] = 1, 1
    assert excess(a, b) == pytest.approx((9 - 1) / math.sqrt(9 + 1))
    assert excess(a, a) == 0


def test_nothing_is_changed(digits, standard):
    x, y = digits[1].images, digits[1].labels
    norm = nn.BatchNorm2d(1)
    model = Changed(standard, norm).train()
    norm.weight.requires_grad_(False)

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.calls = model, 0

        def forward(self, images):
            self.calls += 1
            # While another tensor stands in a buffer's place.
            norm.running_mean = norm.running_mean + 1
            if self.calls > 20:
                raise KeyError("stop")
            return self.model(images)

    def state():
        flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
        values = [v.clone() for v in model.state_dict().values()]
        return flags, [id(b) for b in model.buffers()], values, torch.get_rng_state()

    before = state()
    diagnose(model, x, y, eps=EPS, max_images=8, steps=1)
    wrapped = Fails().train()
    with pytest.raises(KeyError):
        diagnose(wrapped, x, y, eps=EPS, max_images=8, steps=1)
    after = state()
    assert before[:2] == after[:2]
    assert all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    assert torch.equal(before[3], after[3])
    assert all(p.grad is None or not p.grad.any() for p in norm.parameters())


def test_repeats_and_is_json(digits, standard):
    defense = Defense(RT2(4, 0.25, 0.1), None, standard)
    checks = [name for name in CHECKS if name != "cost"]
    options = {"eps": EPS, "max_images": 8, "steps": 2, "checks": checks}
    first, second = (diagnose(defense, digits[1].images, digits[1].labels, **options) for _ in range(2))
    assert first == second
    assert [f["name"] for f in json.loads(json.dumps([asdict(f) for f in first]))] == checks
    table = format_findings(first)
    assert max(map(len, table.splitlines())) <= 120
    assert all(name in table for name in checks)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": 3}, "model must be a callable"),
        ({"model": lambda x: x}, "model must be a callable with logits of shape"),
        ({"model": nn.Conv2d(3, 3, 1)}, "images must be images that the networks take"),
        ({"images": torch.zeros(4, 8)}, "images must be images of shape"),
        (
            {"images": torch.zeros(0, 1, 16, 16), "labels": torch.zeros(0, dtype=torch.int64)},
            "images must be at least one",
        ),
        ({"labels": torch.full((4,), 10)}, "labels must be class indices below the model's 10 logits"),
        ({"norm": "L0"}, "norm must be one of"),
        ({"eps": 0.0}, "eps must be > 0"),
        ({"eps": -1.0}, "eps must be finite"),
        ({"steps": 0}, "steps must be an integer"),
        ({"eot_iter": 0}, "eot_iter must be an integer"),
        ({"max_images": 0}, "max_images must be an integer"),
        ({"checks": ["everything"]}, "checks must be one of"),
    ],
)
def test_bad_arguments(change, expected):
    given = {"model": build_classifier("small_cnn"), "images": torch.zeros(4, 1, 16, 16)}
    given |= {"labels": torch.zeros(4, dtype=torch.int64), **change}
    with pytest.raises((TypeError, ValueError), match=f"diagnose: {expected}"):
        diagnose(**given)


@pytest.fixture(scope="module")
def memory():
    """Images of noise with labels of chance, half of which a linear classifier has learned by heart; and the others."""
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(80, 1, 8, 8, generator=generator)
    y = torch.randint(3, (80,), generator=generator)
    with seeded(0):
        fresh = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    learned = copy.deepcopy(fresh)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(learned(x[:40] - 0.5), y[:40]).backward()
        optimizer.step()
    with torch.no_grad():
        for model in (fresh, learned):
            model[1].bias.sub_(0.5 * model[1].weight.sum(dim=1))
    return fresh, learned, x, y


@pytest.mark.parametrize("random", [False, True])
def test_gauges_of_overfitting(memory, random):
    fresh, learned, x, y = memory
    results = []
    for model in (fresh, learned):
        given = Defense(RT2(2, 0.0, 0.01), None, model).eval() if random else model
        options = {"eps": 0.02, "training": (x[:40], y[:40]), "checks": TRAINING_CHECKS, "max_images": 30}
        findings = diagnose(given, x[40:], y[40:], **options)
        assert [f.name for f in findings] == list(TRAINING_CHECKS)
        results.append(findings)
    assert [f.status for f in results[0]] == ["pass", "pass"]
    assert [f.status for f in results[1]] == ["warn", "warn"]
    gap, member = (f.numbers for f in results[1])
    assert gap["clean"]["training"] == pytest.approx(1, abs=0.05)
    assert gap["clean"]["gap"] == pytest.approx(gap["clean"]["training"] - gap["clean"]["held_out"])
    assert gap["attacked"]["gap"] > 0.1
    assert member["auc"] > 0.8
    assert member["loss_training"] < member["loss_held_out"]


def test_membership_counts_pairs(memory):
    """AUC and loss by plain formulas, on all images; ties count half."""
    _, learned, x, y = memory
    options = {"training": (x[:40], y[:40]), "checks": ["membership"], "max_images": 40}
    (finding,) = diagnose(learned, x[40:], y[40:], **options)
    with torch.no_grad():
        p = learned(x).double().softmax(dim=1)
    loss = [-math.log(float(p[i, y[i]])) for i in range(80)]
    pairs = [(a < b) + (a == b) / 2 for a in loss[:40] for b in loss[40:]]
    assert finding.numbers["auc"] == pytest.approx(sum(pairs) / 1600, abs=1e-3)
    assert finding.numbers["loss_held_out"] == pytest.approx(sum(loss[40:]) / 40, rel=1e-4)
    assert auc_below(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])) == 3.5 / 4
    # (9/12 - 5/12) / sqrt(9/12 3/12 / 12 + 5/12 7/12 / 12)
    shares = torch.cat((torch.ones(8), torch.zeros(2))), torch.cat((torch.ones(4), torch.zeros(6)))
    assert difference_errors(*shares) == pytest.approx((9 / 12 - 5 / 12) / math.sqrt((27 / 144 + 35 / 144) / 12))


def test_training_images_must_be_others(memory):
    fresh, _, x, y = memory
    for training, expected in (
        ((x[40:], y[40:]), "training must be images that are not among `images`, got 40 that are"),
        ((x[:40, :, :4], y[:40]), "training must be images like `images`"),
    ):
        with pytest.raises(ValueError, match=expected):
            diagnose(fresh, x[40:], y[40:], training=training)
    with pytest.raises(ValueError, match="checks must be one of"):
        diagnose(fresh, x, y, checks=["membership"])


@pytest.mark.slow
def test_command(digits, standard, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for i, (x, y) in enumerate(zip(digits[1].images, digits[1].labels, strict=True)):
        (tmp_path / "images" / str(int(y))).mkdir(parents=True, exist_ok=True)
        image.fromarray((255 * x[0]).byte().numpy()).save(tmp_path / "images" / str(int(y)) / f"{i}.png")
    options = {"channels": 1, "classes": 10}
    save_model(tmp_path / "classifier.safetensors", standard, "classifier", "small_cnn", **options)
    from atop_fast.recipes.options import DataConfig, GivenTransform

    given = {"out": str(tmp_path / "doctor.json"), "data": DataConfig(str(tmp_path / "images"), None, True, 0)}
    given |= {"images": 16, "steps": 2, "eps": EPS}
    doctor(str(tmp_path / "classifier.safetensors"), **given)
    shown = capsys.readouterr()
    assert "pass  eps_sweep" in shown.out
    assert shown.out.splitlines()[-1].startswith("No objection from")
    assert "doctor:" in shown.err
    with pytest.raises(SystemExit) as stop:
        doctor(str(tmp_path / "classifier.safetensors"), **{**given, "images": 4})
    assert stop.value.code == 1
    assert "fail  evidence" in capsys.readouterr().out
    noise = GivenTransform("rt2", mask_ratio=0.0, sigma=0.02)
    with pytest.raises(SystemExit) as stop:
        doctor(str(tmp_path / "classifier.safetensors"), transform=noise, **{**given, "images": 40})
    assert stop.value.code == 1
    status = {f["name"]: f["status"] for f in json.loads((tmp_path / "doctor.json").read_text())}
    assert status["useless_transform"] == "fail"
    # All images train and are held out.
    with pytest.raises(ValueError, match="images that are not among `images`, got 16 that are"):
        doctor(str(tmp_path / "classifier.safetensors"), training=True, **given)
    given["data"] = DataConfig(str(tmp_path / "images"), None, True, 64)
    doctor(str(tmp_path / "classifier.safetensors"), training=True, **given)
    assert "pass  membership" in capsys.readouterr().out


def test_too_few_images_end_with_a_failure(digits, standard, tmp_path, capsys):
    """All other checks pass on them, since none of the comparisons can fail."""
    x, y = digits[1].images, digits[1].labels
    findings = diagnose(standard, x, y, eps=EPS, max_images=8, steps=2)
    assert found(findings) == {"evidence": "fail"}
    reason = {f.name: f.reason for f in findings}["evidence"]
    assert "too few to conclude" in reason
    needed = int(reason.split("at least ")[1].split()[0])
    assert found(diagnose(standard, x, y, max_images=needed, checks=["evidence"])) == {}
    # Ten images on which one attack alone succeeds are the fewest on which a comparison fails.
    assert 3 < excess(torch.ones(10), torch.zeros(10)) < excess(torch.ones(11), torch.zeros(11))
    assert excess(torch.ones(9), torch.zeros(9)) <= 3
    status, sentence = conclude({f.name: f.status for f in findings})
    assert (status, "the check evidence failed" in sentence) == ("fail", True)


def test_a_guess_is_no_evidence(digits):
    """Two classes, of which a constant answer has half."""
    images, labels = torch.rand(64, 1, 8, 8), torch.arange(64) % 2

    def constant(x):
        return torch.stack((x.mean(dim=(1, 2, 3)), -x.mean(dim=(1, 2, 3))), dim=1)

    (finding,) = diagnose(constant, images, labels, checks=["evidence"])
    assert finding.status == "fail"
    assert "not above chance" in finding.reason


def test_conclusions():
    assert conclude({"a": "pass", "b": "pass"})[0] == "pass"
    assert conclude({"a": "warn", "b": "pass"}) == ("warn", "A robust accuracy is open to doubt: the check a warned.")
    status, sentence = conclude({"a": "fail", "b": "warn", "c": "fail"})
    assert status == "fail"
    assert "the checks a, c failed" in sentence


def test_progress_names_the_checks(digits, standard, capsys):
    options = {"checks": ["logits", "determinism"], "max_images": 8}
    diagnose(standard, digits[1].images, digits[1].labels, **options)
    assert capsys.readouterr().err == ""
    diagnose(standard, digits[1].images, digits[1].labels, progress=True, **options)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "determinism" in shown


def test_a_model_that_normalizes_in_place_gets_the_findings_of_one_that_does_not(digits, standard):
    images, labels = digits[1].images[:32].clone(), digits[1].labels[:32]
    names = ["finite", "logits", "determinism", "batch_coupling", "accuracy", "normalization", "zero_gradient"]
    expected = check_contract(lambda x: standard((x - 0.1) * 2), images, labels, checks=names)
    given = check_contract(lambda x: standard(x.sub_(0.1).mul_(2)), images, labels, checks=names)
    assert given == expected
    assert torch.equal(images, digits[1].images[:32])


def test_statistics_of_a_network_in_training_mode_inside_a_function_are_kept():
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 2
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    findings = check_contract(lambda x: model(x), images, labels, checks=["batch_coupling"])
    assert findings[0].status == "fail"
    assert "evaluation mode" not in findings[0].reason
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
