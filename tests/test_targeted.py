"""Targeted attacks, masks and BPDA: against torchattacks, plain loops, and what must hold of every attack."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import mnist, standard_mnist
from torch import nn

from atop_fast import RT2, Defense, evaluate
from atop_fast.attacks import APGD, APGDT, BPDA, CW, FAB, FGSM, MIFGSM, PGD, PMA, Square, StAdv
from atop_fast.attacks.queue import Batch
from atop_fast.randomness import derive_seed

COUNT = 12
TARGETED = {
    "fgsm": lambda m, **o: FGSM(m, 0.1, **o),
    "pgd": lambda m, **o: PGD(m, 0.2, steps=10, **o),
    "pgd-l2": lambda m, **o: PGD(m, 2.0, steps=10, norm="L2", momentum=0.5, **o),
    "mifgsm": lambda m, **o: MIFGSM(m, 0.2, steps=10, **o),
    "apgd": lambda m, **o: APGD(m, "Linf", 0.2, 10, **o),
    "apgd-l1": lambda m, **o: APGD(m, "L1", 12.0, 10, **o),
    "cw": lambda m, **o: CW(m, 10, 0, 20, 0.1, **o),
    "square": lambda m, **o: Square(m, "Linf", 0.3, 80, **o),
    "square-l2": lambda m, **o: Square(m, "L2", 4.0, 80, **o),
    "stadv": lambda m, **o: StAdv(m, 0.2, 10, **o),
}
OTHERS = {
    "apgdt": lambda m, **o: APGDT(m, "Linf", 0.1, 3, target_classes=2, **o),
    "fab": lambda m, **o: FAB(m, "L2", 2.0, 4, target_classes=2, **o),
    "pma": lambda m, **o: PMA(m, "Linf", 0.1, 4, **o),
}


class Pair(nn.Module):
    """Two classes of the standard network, 3 and 8 of MNIST's."""

    def __init__(self):
        super().__init__()
        self.model = standard_mnist()

    def forward(self, x):
        return self.model(x)[:, [3, 8]]


class Lifted(nn.Module):
    """The standard network with logits above 0: for CW, torchattacks takes the larger of 0 and the target's logit."""

    def __init__(self):
        super().__init__()
        self.model = standard_mnist()

    def forward(self, x):
        return self.model(x) + 64


@pytest.fixture(scope="module")
def digits():
    data = mnist().take(slice(0, COUNT))
    with torch.no_grad():
        labels = standard_mnist()(data.images).argmax(dim=1)
    return data.images, labels, (labels + 1 + torch.arange(COUNT) % 9) % 10


@pytest.mark.parametrize(
    "build",
    [
        lambda package, m: package.FGSM(m, 0.1),
        lambda package, m: package.PGD(m, 0.2, 0.03, 8, False),
        lambda package, m: package.MIFGSM(m, 0.2, 0.03, 8, 0.9),
        lambda package, m: package.CW(m, 10, 0, 20, 0.05),
    ],
)
def test_equals_torchattacks_targeted_mode(build, digits):
    torchattacks = pytest.importorskip("torchattacks")
    from atop_fast import attacks

    images, labels, targets = digits
    attack = build(torchattacks, Lifted().eval())
    attack.set_mode_targeted_by_label(quiet=True)
    theirs = attack(images, targets)
    ours = build(attacks, Lifted().eval())(images, labels, targets=targets)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.equal(ours, images)


@pytest.mark.parametrize("name", ["apgd", "apgd-l1", "square", "square-l2", "pgd", "cw"])
def test_with_two_classes_the_target_is_the_other_one(name):
    images = mnist().take(slice(0, COUNT)).images
    model = Pair().eval()
    labels = model(images).argmax(dim=1)
    # The margins of the two are equal; cross-entropies have gradients of other lengths.
    attack = TARGETED[name](model, **({"loss": "margin"} if name.startswith("apgd") else {}))
    assert torch.equal(attack(images, labels, targets=1 - labels), attack(images, labels))


def test_square_equals_a_plain_loop(digits):
    images, labels, targets = digits
    model, attack = standard_mnist(), Square(standard_mnist(), "Linf", 0.3, 16, early_stop=False)

    def loss(x):
        logits = model(x)
        other = logits.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
        return logits.gather(1, targets[:, None])[:, 0] - other

    state = attack.begin(attack.estimator(model), Batch(images, labels, torch.arange(COUNT)))
    x, best = state["x"], loss(state["x"])
    for t in (0, 8):
        for _, _, square in attack._squares(attack.seed, state | {"x": x, "t": torch.full((COUNT,), t)}):
            candidate = attack._changed(x, images, square)
            better = loss(candidate) > best
            x, best = torch.where(better[:, None, None, None], candidate, x), torch.where(better, loss(candidate), best)
    assert torch.equal(attack(images, labels, targets=targets), x)


@pytest.mark.parametrize("name", ["pgd", "pgd-l2", "apgd", "mifgsm", "cw", "stadv", "square"])
def test_targets_are_reached_more_often_than_by_chance(name, digits):
    images, labels, targets = digits
    model = standard_mnist()
    attack = TARGETED[name](model)
    reached = [(model(x).argmax(dim=1) == targets).sum() for x in (
        attack(images, labels), attack(images, labels, targets=targets))]  # fmt: skip
    assert reached[1] >= reached[0] + 2

    def loss(x):
        return F.cross_entropy(model(x), targets)

    assert loss(attack(images, labels, targets=targets)) < loss(images)


def test_a_class_that_ranks_third_is_reached(digits):
    """Its difference-of-logits ratio is 1 wherever it ranks third."""
    images, labels, _ = digits
    model = standard_mnist()
    targets = model(images).argsort(dim=1, descending=True)[:, 2]
    hits = [(model(APGD(model, eps=0.2, steps=10, loss=loss)(images, labels, targets=targets)).argmax(dim=1) == targets)
            for loss in ("margin", "dlr")]  # fmt: skip
    assert hits[0].sum() > COUNT / 2
    assert torch.equal(*hits)


def test_restarts_and_early_stop_look_for_the_target(digits):
    images, labels, targets = digits
    model, options = standard_mnist(), {"steps": 4, "early_stop": True}
    attack = PGD(model, 0.12, n_restarts=5, **options)
    runs = [PGD(model, 0.12, **options)(images, labels, targets=targets)]
    for restart in range(1, 5):
        seed = derive_seed(0, "restart", restart)
        start = attack.restart_from(seed, images, torch.arange(COUNT))
        runs.append(PGD(model, 0.12, seed=seed, **options)(images, labels, targets=targets, start=start))
    hits = torch.stack([model(x).argmax(dim=1) == targets for x in runs])
    found = model(attack(images, labels, targets=targets)).argmax(dim=1)
    assert torch.equal(found == targets, hits.any(dim=0))
    assert 0 < hits.any(dim=0).sum() < COUNT
    # An image that is misclassified as another class is attacked on.
    assert ((found != labels) & (found != targets)).any()


@pytest.mark.parametrize("name", [*TARGETED, *OTHERS])
def test_nothing_changes_outside_of_the_mask(name, digits):
    images, labels, _ = digits
    attack = {**TARGETED, **OTHERS}[name](standard_mnist(), **({} if name[:6] in ("stadv", "cw", "fgsm") else {
        "n_restarts": 2}))  # fmt: skip
    mask = torch.zeros(COUNT, 1, *images.shape[2:], dtype=torch.bool)
    for row in range(COUNT):
        mask[row, :, row : row + 16, 8:24] = True
    confined = attack(images, labels, mask=mask)
    assert torch.equal(torch.where(mask, images, confined), images)
    assert not torch.equal(confined, images)
    whole = attack(images, labels)
    assert not torch.equal(confined, whole)
    assert torch.equal(attack(images, labels, mask=torch.ones(32, 32)), whole)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    shuffled = attack(images[order], labels[order], order, mask=mask[order].float())
    torch.testing.assert_close(shuffled, confined[order], rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_mask_equals_a_plain_loop(norm, digits):
    images, labels, _ = digits
    model, mask, eps, alpha = standard_mnist(), torch.zeros(32, 32), 0.3, 0.1
    mask[10:20, 10:20] = 1
    x = images
    for _ in range(4):
        leaf = x.clone().requires_grad_()
        g = torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)[0] * mask
        if norm == "Linf":
            x = torch.minimum(torch.maximum(x + alpha * g.sign(), images - eps), images + eps)
        else:
            delta = x + alpha * g / g.flatten(1).norm(dim=1)[:, None, None, None] - images
            x = images + delta * (eps / delta.flatten(1).norm(dim=1)).clamp_max(1)[:, None, None, None]
        x = x.clamp(0, 1)
    ours = PGD(model, eps, alpha, 4, False, norm=norm)(images, labels, mask=mask)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


def quantized(x):
    return (x * 4).round() / 4


def test_bpda_equals_a_plain_straight_through_loop(digits):
    images, labels, _ = digits
    model = standard_mnist()
    attacked = BPDA(model, quantized)
    assert torch.equal(attacked(images), model(quantized(images)))
    x = images
    for _ in range(3):
        leaf = quantized(x).requires_grad_()
        g = torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)[0]
        x = torch.minimum(torch.maximum(x + 0.05 * g.sign(), images - 0.2), images + 0.2).clamp(0, 1)
    ours = PGD(attacked, 0.2, 0.05, 3, False)(images, labels)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)
    # The gradient of the rounding itself is 0.
    assert torch.equal(PGD(lambda x: model(quantized(x)), 0.2, 0.05, 3, False)(images, labels), images)


def test_bpda_takes_the_derivative_of_backward():
    leaf = torch.rand(2, 1, 4, 4, requires_grad=True)
    attacked = BPDA(nn.Flatten(), lambda x: F.avg_pool2d(quantized(x), 2), lambda x: 3 * F.max_pool2d(x, 2))
    attacked(leaf).sum().backward()
    twin = leaf.detach().clone().requires_grad_()
    (3 * F.max_pool2d(twin, 2)).sum().backward()
    assert torch.equal(leaf.grad, twin.grad)
    broken = BPDA(nn.Flatten(), quantized, lambda x: x / 0)
    assert torch.equal(broken(leaf), quantized(leaf.detach()).flatten(1))


def test_bpda_is_attacked_as_it_is(digits):
    """A copy of the model would call a copy of the function."""
    images, labels, _ = digits

    class Counted:
        calls = 0

        def __call__(self, x):
            self.calls += 1
            return quantized(x)

    process, model = Counted(), standard_mnist()
    found = PGD(BPDA(model, process), 0.2, 0.05, 10, False)(images, labels)
    assert process.calls >= 10
    x = images
    for _ in range(10):
        leaf = quantized(x).requires_grad_()
        g = torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)[0]
        x = torch.minimum(torch.maximum(x + 0.05 * g.sign(), images - 0.2), images + 0.2).clamp(0, 1)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


def test_a_verdict_on_bpda_is_one_on_what_it_computes(digits):
    images, labels, _ = digits
    attacked = BPDA(standard_mnist(), quantized)
    options = {"eps": 0.2, "diagnostics": (), "progress": False}
    attacks = {"pgd": PGD(attacked, 0.2, steps=3)}
    report = evaluate(attacked, images, labels, attacks=attacks, **options)
    plain = evaluate(lambda x: standard_mnist()(quantized(x)), images, labels, attacks=attacks, **options)
    assert report.robust == plain.robust
    assert report.robust.mean < 1


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda x, y: FAB(standard_mnist())(x, y, targets=(y + 1) % 10), ValueError, "FAB: targets must be None"),
        (lambda x, y: APGDT(standard_mnist())(x, y, targets=(y + 1) % 10), ValueError, "APGDT: targets must be None"),
        (lambda x, y: PMA(standard_mnist())(x, y, targets=(y + 1) % 10), ValueError, "PMA: targets must be None"),
        (lambda x, y: PGD(standard_mnist())(x, y, targets=y), ValueError, "PGD: targets must be other classes than"),
        (
            lambda x, y: PGD(standard_mnist())(x, y, targets=3),
            TypeError,
            "PGD: targets must be a torch.Tensor",
        ),
        (
            lambda x, y: PGD(standard_mnist())(x, y, targets=y + 10),
            ValueError,
            "PGD: targets must be class indices",
        ),
        (
            lambda x, y: PGD(standard_mnist())(x, y, mask=torch.full((32, 32), 0.5)),
            ValueError,
            "mask must be bool, or",
        ),
        (
            lambda x, y: PGD(standard_mnist())(x, y, mask=torch.ones(3, 5)),
            ValueError,
            "PGD: mask must be of a shape",
        ),
        (
            lambda x, y: BPDA(Defense(RT2(4), None, standard_mnist()), quantized),
            TypeError,
            "BPDA: model must be",
        ),
        (lambda x, y: BPDA(standard_mnist(), 3), TypeError, "BPDA: forward must be a callable, got int"),
        (
            lambda x, y: PGD(BPDA(standard_mnist(), quantized, lambda x: x[:, :, ::2]))(x, y),
            ValueError,
            r"BPDA: backward must be a map to images of the shape \(\d+, 1, 32, 32\) of forward's, got",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, pattern, digits):
    images, labels, _ = digits
    with pytest.raises(error, match=pattern):
        call(images, labels)
