"""attack_loss: the harness, and what is special to it."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import _harness as harness
import pytest
import torch
import torch.nn.functional as F
from _harness import DEVICE, cases

from atop_fast import ops
from atop_fast.ops import _registry

# The package exports the function under the name of its module.
spec_module = importlib.import_module("atop_fast.ops.attack_loss")
NAMES = ("attack_loss",)
# Few classes and many, whole vectors and one more, a batch of more than 16, and none.
SHAPES = ((0, 10), (2, 4), (37, 10), (17, 64), (3, 1000), (2, 1001))
# More than one program, the last not full, at three widths of a block.
FEWER = ((0, 10), (17, 10), (5, 64), (2, 1001))
WIDE, HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
DTYPES = (*WIDE, *HALF)


@pytest.fixture
def one_program(monkeypatch):
    """All rows in one program of Triton's interpreter, where the time does not depend on the rows of a block."""
    if DEVICE == "cpu" and "triton" in harness.backends():
        monkeypatch.setattr(importlib.import_module("atop_fast.kernels.attack_loss"), "MIN_BLOCK", 16384)


def call(logits, labels, targets, kind):
    targets = None if targets is None else targets.long()
    return ops.attack_loss(logits, labels.long(), spec_module.LOSSES[kind], targets).losses


def sample(shape, dtype):
    z = (3 * torch.randn(shape, device=DEVICE)).to(dtype)
    labels = torch.randint(shape[1], shape[:1], device=DEVICE)
    return z, torch.where(torch.arange(shape[0], device=DEVICE) % 2 == 0, labels, z.argmax(dim=1))


def sample_with_targets(shape, dtype):
    z, labels = sample(shape, dtype)
    return z, labels, (labels + torch.randint(1, shape[1], shape[:1], device=DEVICE)) % shape[1]


def sample_with_likely_targets(shape, dtype):
    """Neither y nor t is so unlikely that pm is a small difference of large logarithms in its plain formula."""
    z, labels, targets = sample_with_targets(shape, dtype)
    likely = torch.zeros_like(z).scatter(1, labels[:, None], 3.0).scatter(1, targets[:, None], 2.0)
    return z / 2 + likely, labels, targets


def spec(kind, has_targets=False):
    return harness.Spec(
        name="attack_loss",
        call=call if has_targets else lambda z, labels, kind: call(z, labels, None, kind),
        formula=spec_module.formula if has_targets else lambda z, y, kind: spec_module.formula(z, y, None, kind),
        sample=(sample_with_likely_targets if kind == spec_module.PM else sample_with_targets)
        if has_targets
        else sample,
        dtypes=DTYPES,
        shapes=SHAPES,
        exact=False,
        numbers=(kind,),
    )


SPECS = {
    "ce": spec(spec_module.CE),
    "margin": spec(spec_module.MARGIN),
    "dlr": spec(spec_module.DLR),
    "margin_targets": spec(spec_module.MARGIN, has_targets=True),
    "dlr_targets": spec(spec_module.DLR, has_targets=True),
    "pm": spec(spec_module.PM),
    "pm-label": spec(spec_module.PM_LABEL),
    "pm-other": spec(spec_module.PM_OTHER),
    "pm_targets": spec(spec_module.PM, has_targets=True),
    "pm-other_targets": spec(spec_module.PM_OTHER, has_targets=True),
}


def run(backend, name, tensors):
    """All outputs of the public function."""
    loss, _, has_targets = name.partition("_")
    with harness.owned_by(backend, NAMES):
        return ops.attack_loss(*tensors[:2], loss, tensors[2] if has_targets else None)


def arguments(name, tensors):
    """Those of the op."""
    return (*tensors[:2], tensors[2] if "targets" in name else None, *SPECS[name].numbers)


def check(backend, name, dtype, shape):
    """Losses, gradients as outputs and by autograd, and correct predictions."""
    tensors = SPECS[name].sample(shape, dtype)
    harness.check_gradients(SPECS[name], backend, tensors)
    result = run(backend, name, tensors)
    numbers = SPECS[name].numbers
    expected = SPECS[name].formula(tensors[0].double(), *tensors[1:], *numbers)
    harness.close(SPECS[name], result.losses, expected, SPECS[name].formula(*tensors, *numbers))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = tensors[0].to(wide)
    ones = torch.ones(shape[0], dtype=torch.float64, device=DEVICE)
    eager = harness.gradients(SPECS[name].formula, SPECS[name], (z, *tensors[1:]), ones.to(wide))
    exact = harness.gradients(SPECS[name].formula, SPECS[name], (z.double(), *tensors[1:]), ones)
    harness.close(SPECS[name], result.gradient, exact[0], eager[0])
    assert torch.equal(result.correct, tensors[0].argmax(dim=1) == tensors[1])


@pytest.mark.usefixtures("poisoned_memory")
@cases(name=tuple(SPECS), dtype=WIDE, shape=SHAPES, interpreted={"shape": FEWER})
def test_matches_formula(backend, name, dtype, shape):
    check(backend, name, dtype, shape)


@pytest.mark.usefixtures("poisoned_memory", "one_program")
@cases(name=tuple(SPECS), dtype=HALF, shape=((37, 10), (2, 1001)), interpreted={"shape": ((4, 10), (2, 1001))})
def test_matches_formula_for_16_bits(backend, name, dtype, shape):
    """Many of 1001 such logits are equal."""
    check(backend, name, dtype, shape)


@cases(name=("ce", "margin", "dlr", "pm", "pm-label", "pm-other"))
def test_fewest_classes(backend, name):
    fewest = {"ce": 1, "dlr": 3}.get(name, 2)
    harness.check_forward(SPECS[name], backend, SPECS[name].sample((20, fewest), torch.float32))


@pytest.mark.usefixtures("one_program")
@cases(name=("ce", "dlr_targets", "pm_targets"), layout=harness.LAYOUTS)
def test_layouts(backend, name, layout):
    z, labels, targets = sample_with_targets((33, 10), torch.float32)
    tensors = harness.in_layout(z, layout), *(t[:, None].expand(-1, 2)[:, 0] for t in (labels, targets))
    for actual, expected in zip(run(backend, name, tensors), run(backend, name, (z, labels, targets)), strict=True):
        assert torch.equal(actual, expected)
        assert actual.is_contiguous()


@pytest.mark.usefixtures("one_program")
@cases(name=("dlr", "dlr_targets"))
def test_is_that_of_autoattack(backend, name):
    base = pytest.importorskip("pyautoattack.autopgd_base")
    z, labels, targets = sample_with_targets((64, 10), torch.float32)
    leaf = z.clone().requires_grad_()
    if name == "dlr":
        expected = base.APGDAttack.dlr_loss(None, leaf, labels)
    else:
        expected = base.APGDAttack_targeted.dlr_loss_targeted(SimpleNamespace(y_target=targets), leaf, labels)
    (dz,) = torch.autograd.grad(expected.sum(), leaf)
    result = run(backend, name, (z, labels, targets))
    torch.testing.assert_close(result.losses, expected)
    torch.testing.assert_close(result.gradient, dz)


@pytest.mark.usefixtures("one_program")
@cases(dtype=(torch.float32, torch.float64))
def test_cross_entropy_is_relatively_accurate_for_confident_predictions(backend, dtype):
    """Margins of 0 to 80: nothing underflows, and nothing is the difference of nearly equal numbers."""
    margins = torch.arange(0, 80.5, 4 if harness.is_interpreted(backend) else 0.5, dtype=dtype, device=DEVICE)
    for classes in (2, 10, 100):
        z = torch.zeros(len(margins), classes, dtype=dtype, device=DEVICE)
        z[:, 1] = margins
        for label in (0, 1):
            labels = torch.full((len(z),), label, device=DEVICE)
            losses, gradient, _ = run(backend, "ce", (z, labels))
            # From the other probabilities, as float64 itself loses those of margins beyond 36.
            e = (z.double() - margins.double()[:, None]).exp()
            others = e.sum(dim=1) - e[:, label] if label == 0 else e[:, [0]].sum(dim=1) * (classes - 1)
            total = e[:, 0] * (classes - 1) + 1
            expected = e / total[:, None]
            expected[:, label] = -others / total
            rest = (e[:, 0] * (classes - 1)).log1p() + (margins.double() if label == 0 else 0)
            for actual, wanted in ((losses, rest), (gradient, expected)):
                error = ((actual.double() - wanted) / wanted).abs().max().item()
                assert error <= 16 * torch.finfo(dtype).eps


def probability_margins(z, labels, others, loss):
    """P and its parts, whose log-odds pm and its parts are, and their gradients, from a plain softmax in float64."""
    p = z.softmax(dim=1)
    p_y, p_o = (p.gather(1, classes[:, None])[:, 0] for classes in (labels, others))
    values = {"pm": p_o - p_y, "pm-label": -p_y, "pm-other": p_o}[loss]
    (gradient,) = torch.autograd.grad(values.sum(), z)
    odds = {"pm": ((1 + values) / (1 - values)).log(), "pm-label": -(-values).logit(), "pm-other": values.logit()}
    return odds[loss].detach(), gradient


def greatest_other(z, labels):
    return z.detach().scatter(1, labels[:, None], -math.inf).argmax(dim=1)


@pytest.mark.usefixtures("one_program")
@cases(name=("pm", "pm-label", "pm-other", "pm_targets", "pm-other_targets"), classes=(2, 10, 100))
def test_pm_is_the_log_odds_of_the_probability_margin(backend, name, classes):
    """The value is its log-odds, and the gradient has the direction of its own."""
    z, labels, targets = sample_with_targets((6 if harness.is_interpreted(backend) else 50, classes), torch.float64)
    loss, _, has_targets = name.partition("_")
    others = targets if has_targets else greatest_other(z, labels)
    losses, gradient, _ = run(backend, name, (z, labels, targets))
    expected, wanted = probability_margins(z.requires_grad_(), labels, others, loss)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    if loss == "pm":
        p = z.detach().softmax(dim=1)
        margin = (p.gather(1, others[:, None]) - p.gather(1, labels[:, None]))[:, 0]
        torch.testing.assert_close((losses / 2).tanh(), margin)
    unit = [g / g.abs().amax(dim=1, keepdim=True) for g in (gradient, wanted)]
    torch.testing.assert_close(*unit, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("one_program")
@cases(name=("pm", "pm-label", "pm-other", "pm_targets", "pm-other_targets"), dtype=(torch.float32, torch.float64))
def test_pm_keeps_its_direction_at_any_margin(backend, name, dtype):
    """Logits of up to a million, where no softmax has a gradient, and those of a twentieth of a unit."""
    loss, _, has_targets = name.partition("_")
    count = 16 if harness.is_interpreted(backend) else 40
    spread = torch.randn(count, 10, dtype=torch.float64, device=DEVICE).sort(dim=1)[0]
    size = torch.logspace(-1.3, 6, count, dtype=torch.float64, device=DEVICE)
    z = (spread * size[:, None]).float().double()
    for label, target in ((9, 8), (8, 9), (9, 7), (0, 5)):
        labels, targets = (torch.full((count,), value, device=DEVICE) for value in (label, target))
        others = targets if has_targets else greatest_other(z, labels)
        losses, gradient, _ = run(backend, name, (z.to(dtype), labels, targets))
        rows = torch.arange(count)
        # Log A and log B of the derivation, each from its own greatest logit.
        sets = {"pm": (2.0, True, True), "pm-label": (1.0, True, False), "pm-other": (1.0, False, True)}
        weight, in_a, in_b = sets[loss]
        sums = []
        for member, has_rest in ((others, in_a), (labels, in_b)):
            factors = torch.full_like(z, float(has_rest))
            factors[rows, labels] = factors[rows, others] = 0
            factors[rows, member] = weight
            sums.append(torch.where(factors > 0, z + factors.log(), -math.inf))
        expected = sums[0].softmax(dim=1) - sums[1].softmax(dim=1)
        tolerance = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)
        wanted = sums[0].logsumexp(dim=1) - sums[1].logsumexp(dim=1)
        torch.testing.assert_close(losses.double(), wanted, rtol=tolerance, atol=tolerance)
        if not has_targets:
            assert (gradient.abs().amax(dim=1) > 0.19).all()


@pytest.mark.usefixtures("one_program")
@cases(classes=(3, 10, 1001))
def test_pm_is_relatively_accurate_where_both_classes_are_unlikely(backend, classes):
    """P is the difference of nearly equal numbers beside 1, and so is every gradient but two."""
    small = -torch.arange(0, 30, 7 if harness.is_interpreted(backend) else 1, device=DEVICE) / 4
    z = torch.zeros(len(small), classes, device=DEVICE)
    z[:, 2], z[:, 0], z[:, 1] = 6, small, 1e-3 + small
    labels = torch.zeros(len(small), dtype=torch.int64, device=DEVICE)
    targets = torch.ones_like(labels)
    for y, t, sign in ((labels, targets, 1), (targets, labels, -1)):
        losses, gradient, _ = run(backend, "pm_targets", (z, y, t))
        e = (z.double() - 6).exp()
        total, a, b = e.sum(dim=1), (e.sum(dim=1) + e[:, 1] - e[:, 0]), (e.sum(dim=1) + e[:, 0] - e[:, 1])
        difference = e[:, 0] * (z[:, 1].double() - z[:, 0].double()).expm1()
        wanted = e * (-2 * sign * difference / (a * b))[:, None]
        wanted[:, 0], wanted[:, 1] = -2 * sign * e[:, 0] / b, 2 * sign * e[:, 1] / a
        if sign < 0:
            wanted[:, 0], wanted[:, 1] = 2 * e[:, 0] / b, -2 * e[:, 1] / a
        for actual, expected in ((losses, 2 * sign * (difference / total).atanh()), (gradient, wanted)):
            assert ((actual.double() - expected) / expected).abs().max().item() <= 32 * torch.finfo(torch.float32).eps


@pytest.mark.usefixtures("one_program")
@cases(name=tuple(SPECS))
def test_ties_go_to_the_lowest_class(backend, name):
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0, 2.0], device=DEVICE)] * 5)
    # Each row with every label.
    z, labels = every.repeat(5, 1), torch.arange(5, device=DEVICE).repeat_interleave(len(every))
    tensors = z, labels, (labels + 2) % 5
    expected = _registry.OPS["attack_loss"].reference(*arguments(name, tensors))
    result = run(backend, name, tensors)
    for actual, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert torch.equal(result.correct, z.argmax(dim=1) == labels)
    result = run(backend, "margin", (torch.ones(1, 4, device=DEVICE), torch.tensor([1], device=DEVICE)))
    assert result.gradient.tolist() == [[1.0, -1.0, 0.0, 0.0]]
    assert result.correct.tolist() == [False]


@pytest.mark.usefixtures("one_program")
@cases(name=tuple(SPECS), dtype=DTYPES)
def test_nan_and_infinity(backend, name, dtype):
    """As documented: equal to the reference, and NaN counts as the greatest."""
    odd = torch.tensor([0.5, math.nan, math.inf, -math.inf, 1.0], dtype=dtype, device=DEVICE)
    every = torch.cartesian_prod(odd, odd, odd, odd)
    # Each row with every label.
    z, labels = every.repeat(4, 1), torch.arange(4, device=DEVICE).repeat_interleave(len(every))
    tensors = z, labels, (labels + 1) % 4
    losses, gradient, correct = run(backend, name, tensors)
    expected = _registry.OPS["attack_loss"].reference(*arguments(name, tensors))
    torch.testing.assert_close(losses, expected[0], equal_nan=True)
    torch.testing.assert_close(gradient, expected[1], equal_nan=True)
    assert torch.equal(correct, z.argmax(dim=1) == labels)
    assert losses[z.isnan().any(dim=1)].isnan().all()
    assert gradient[losses.isnan()].isnan().all()
    if name == "ce":
        own = F.cross_entropy(z.to(losses.dtype), labels, reduction="none")
        torch.testing.assert_close(losses, own, equal_nan=True)
    else:
        assert gradient[losses.isinf()].isnan().all()


@pytest.mark.usefixtures("one_program")
@cases(name=tuple(SPECS))
def test_what_is_no_class_gives_nan_in_the_op(backend, name):
    """No value is read outside of the row; the public function refuses them where it can look at them."""
    for classes in (10, 100):
        z, labels, targets = sample_with_targets((20, classes), torch.float32)
        wrong = targets if "targets" in name else labels
        wrong[3], wrong[4], wrong[5] = -1, classes, 2**62
        with harness.owned_by(backend, NAMES):
            losses, gradient, correct = spec_module.OP(*arguments(name, (z, labels, targets)))
        assert losses.isnan().nonzero().flatten().tolist() == [3, 4, 5]
        assert gradient.isnan().all(dim=1).nonzero().flatten().tolist() == [3, 4, 5]
        assert gradient.isnan().sum() == 3 * classes
        assert not correct[3:6].any()
        if DEVICE == "cpu":
            argument = "targets" if "targets" in name else "labels"
            words = rf"attack_loss: {argument} must be classes in \[0, {classes}\), got values in \[-1, {2**62}\]"
            with pytest.raises(ValueError, match=words):
                run(backend, name, (z, labels, targets))


@cases(name=tuple(SPECS))
def test_gradcheck(backend, name):
    harness.check_gradcheck(SPECS[name], backend, SPECS[name].sample((3, 5), torch.float64))


@cases()
def test_gradcheck_of_many_classes(backend):
    classes = 17 if harness.is_interpreted(backend) else 70
    harness.check_gradcheck(SPECS["ce"], backend, SPECS["ce"].sample((1, classes), torch.float64))


@cases(name=tuple(SPECS))
def test_second_backward_same(backend, name):
    harness.check_second_backward_same(SPECS[name], backend, SPECS[name].sample((5, 10), torch.float32))


@cases()
def test_double_backward_raises(backend):
    z, labels = sample((3, 4), torch.float32)
    z.requires_grad_()
    with harness.owned_by(backend, NAMES):
        (dz,) = torch.autograd.grad(ops.attack_loss(z, labels).losses.sum(), z, create_graph=True)
        with pytest.raises(RuntimeError, match="attack_loss: double backward is not supported"):
            dz.sum().backward()


@cases()
def test_gradient_is_a_constant(backend):
    z, labels = sample((3, 4), torch.float32)
    with harness.owned_by(backend, NAMES):
        losses, gradient, correct = ops.attack_loss(z.requires_grad_(), labels)
    assert (losses.requires_grad, gradient.requires_grad, correct.requires_grad) == (True, False, False)


@cases(
    name=("ce", "margin", "dlr_targets", "pm"), layout=("contiguous", "sliced"), requires_grad=(False, True),
    traced={"name": ["dlr_targets"], "layout": ["sliced"], "requires_grad": [True]},
)  # fmt: skip
def test_opcheck(backend, name, layout, requires_grad, parts):
    z, *rest = SPECS[name].sample((4, 5), torch.bfloat16 if layout == "sliced" else torch.float32)
    leaf = harness.in_layout(z, layout).detach().requires_grad_(requires_grad)
    with harness.owned_by(backend, NAMES):
        harness.opcheck(spec_module.OP, arguments(name, (leaf, *rest)), parts)


@pytest.mark.parametrize("name", ["ce", "dlr_targets"])
def test_compiles(name):
    samples = [SPECS[name].sample((n, 10), torch.float32) for n in (2, 5, 7)]
    harness.check_compiled(SPECS[name], harness.backends(), samples)


Z, Y = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
BAD = [
    ({"logits": Z.int()}, TypeError, "logits must be a float32, float64, bfloat16 or float16 tensor, got torch.int32"),
    ({"logits": Z[0]}, ValueError, r"logits must be of shape \(B, K\) with 1 <= K < 2\*\*31, got \(5,\)"),
    ({"logits": Z[:, :1], "loss": "margin"}, ValueError, r"with 2 <= K < 2\*\*31, got \(2, 1\)"),
    ({"logits": Z[:, :2], "loss": "dlr"}, ValueError, r"with 3 <= K < 2\*\*31, got \(2, 2\)"),
    ({"logits": Z[:, :3], "loss": "dlr", "targets": Y}, ValueError, r"with 4 <= K < 2\*\*31, got \(2, 3\)"),
    ({"labels": Y.int()}, TypeError, "labels must be an int64 tensor, got torch.int32"),
    ({"labels": Y[:1]}, ValueError, r"labels must be of shape \(2,\), got \(1,\)"),
    ({"targets": Y[None], "loss": "margin"}, ValueError, r"targets must be of shape \(2,\), got \(1, 2\)"),
    ({"targets": Y}, ValueError, "targets must be None for a loss of the label alone, got a tensor"),
    ({"targets": Y, "loss": "pm-label"}, ValueError, "targets must be None for a loss of the label alone, got a ten"),
    ({"logits": Z[:, :1], "loss": "pm"}, ValueError, r"with 2 <= K < 2\*\*31, got \(2, 1\)"),
]


@cases(bad=range(len(BAD)))
@pytest.mark.skipif(DEVICE != "cpu", reason="the same words on every device")
def test_bad_input(backend, bad):
    change, error, words = BAD[bad]
    given = {"logits": Z, "labels": Y, "loss": "ce", "targets": None, **change}
    with harness.owned_by(backend, NAMES):
        with pytest.raises(error, match="attack_loss: .*" + words):
            ops.attack_loss(**given)
        kind = spec_module.LOSSES.index(given.pop("loss"))
        with pytest.raises(RuntimeError if backend == "cpp" else error, match="attack_loss: .*" + words):
            spec_module.OP(**given, kind=kind)


def test_wrong_loss():
    losses = "'ce', 'margin', 'dlr', 'pm', 'pm-label', 'pm-other'"
    with pytest.raises(ValueError, match=f"attack_loss: loss must be one of {losses}, got 'cw'"):
        ops.attack_loss(Z, Y, "cw")
    with pytest.raises(TypeError, match=r"attack_loss: labels must be a torch.Tensor, got list"):
        ops.attack_loss(Z, [0, 0])
