"""PGD and APGD against the originals, iterate for iterate from the same start, on digits and on CIFAR-10."""

from __future__ import annotations

import contextlib

import models
import pytest
import torch
from torch import nn

from atop_fast.attacks import APGD, APGDT, PGD, network

pytestmark = pytest.mark.filterwarnings("ignore:.*zero gradient")

COUNT = 8
STEPS = {"mnist": 25, "cifar": 5}
EPS = {"mnist": {"Linf": 0.05, "L2": 0.7}, "cifar": {"Linf": 8 / 255, "L2": 0.2}}
# How many of the images must be followed: in a ResNet-18 rounding decides, now and then, on which side of a kink an
# iterate lies, and the image goes another way.
SHARE = {"mnist": 1, "cifar": 0.75}
MODELS = {"mnist": models.standard_mnist, "cifar": models.standard_cifar}


class Wide(nn.Module):
    """Logits in float64 for the originals, whose cross-entropy has the gradient p_y - 1: in float32 few of its digits
    are right where a network is sure."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).double()


@pytest.fixture(params=["mnist", "cifar"])
def task(request):
    """The name of a data set, its classifier, and images that the classifier gets right."""
    data = {"mnist": models.mnist, "cifar": models.cifar}[request.param]()
    model = MODELS[request.param]()
    x, y = data.images[: 4 * COUNT], data.labels[: 4 * COUNT]
    chosen = right(model, x, y).nonzero()[:COUNT, 0]
    return request.param, model, x[chosen], y[chosen]


@contextlib.contextmanager
def iterates(model):
    """Collects the inputs at which the model is differentiated. A network with hooks is attacked unchanged."""
    seen = []

    def note(module, args):
        if args[0].requires_grad:
            seen.append(args[0].detach().clone())

    handle = model.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def right(model, x, y):
    with torch.no_grad():
        return model(x).argmax(dim=1) == y


def differences(ours, theirs):
    """The largest difference in every iterate and image, (iterates, B)."""
    assert len(ours) == len(theirs)
    return torch.stack([(a - b).flatten(1).abs().amax(dim=1) for a, b in zip(ours, theirs, strict=True)])


def third(model, x, y):
    """Whether the label ranks third: then DLR is 1, and its gradient and the next iterate are rounding errors."""
    with torch.no_grad():
        return model(x).argsort(dim=1, descending=True)[:, 2] == y


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_pgd_is_that_of_torchattacks(task, norm):
    torchattacks = pytest.importorskip("torchattacks")
    name, model, x, y = task
    eps, steps = EPS[name][norm], STEPS[name]
    options = {"eps": eps, "alpha": eps / 4, "steps": steps}
    original = torchattacks.PGD if norm == "Linf" else torchattacks.PGDL2
    with iterates(model) as theirs:
        expected = original(Wide(model).eval(), **options)(x, y)
    with iterates(model) as ours:
        adversarial = PGD(model, **options, norm=norm, max_batch=COUNT)(x, y, start=theirs[0])
    assert len(ours) == steps
    close = (differences([*ours, adversarial], [*theirs, expected]) <= 1e-5).all(dim=0)
    assert close.float().mean() >= SHARE[name]
    assert torch.equal(right(model, adversarial, y), right(model, expected, y))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted"])
def test_apgd_is_that_of_pyautoattack(task, loss, norm):
    base = pytest.importorskip("pyautoattack.autopgd_base")
    name, model, x, y = task
    options = {"eps": EPS[name][norm], "norm": norm}
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) - 0.5
    size = noise.abs().amax() if norm == "Linf" else noise.flatten(1).norm(dim=1).amax()
    start = (x + options["eps"] / size * noise).clamp(0, 1)
    if loss == "targeted":
        original = base.APGDAttack_targeted(Wide(model).eval(), n_iter=STEPS[name], **options)
        with torch.no_grad():
            original.y_target = model(x).argsort(dim=1)[:, -2]
        attack = APGDT(model, **options, steps=STEPS[name], target_classes=1, max_batch=COUNT)
    else:
        original = base.APGDAttack(Wide(model).eval(), n_iter=STEPS[name], loss=loss, **options)
        attack = APGD(model, **options, steps=STEPS[name], loss=loss, max_batch=COUNT)
    original.init_hyperparam(x)
    with iterates(model) as theirs, torch.random.fork_rng():
        best, robust, *_ = original.attack_single_run(x, y, start.clone())
    with iterates(model) as ours:
        adversarial = attack(x, y, start=start)
    assert len(ours) == STEPS[name] + 1
    lost = torch.stack([third(model, x, y) for x in theirs]) & (loss == "dlr")
    # An image is lost from the iterate after the one with no gradient on.
    followed = torch.cat((torch.ones(1, COUNT), 1 - lost.cummax(dim=0).values[:-1].float())).bool()
    assert followed.float().mean() > 0.4
    close = ((differences(ours, theirs) <= 1e-5) | ~followed).all(dim=0)
    assert close.float().mean() >= SHARE[name]
    still = right(model, adversarial, y)
    assert torch.equal(still, robust.bool())
    # The originals' `best` has the largest loss; ours the largest among misclassified iterates, if there are any.
    same = close & (still if loss == "ce" else followed.all(dim=0))
    torch.testing.assert_close(adversarial[same], best[same], rtol=0, atol=1e-5)


def test_folding_turns_few_signs(monkeypatch):
    """Batch norm folded into Winograd convolutions rounds differently, which turns the sign of gradients near 0: of
    1 in 16,000 in a step. After ten steps, 1 pixel in 10 is another; the original against itself, with its
    cross-entropy in float32 and in float64, 1 in 6."""
    torchattacks = pytest.importorskip("torchattacks")
    monkeypatch.setattr(network, "WORTHWHILE", 1)
    data, model = models.cifar(), models.standard_cifar()
    x, y = data.images[:16], data.labels[:16]
    for steps, share in ((1, 1e-3), (10, 0.2)):
        options = {"eps": 8 / 255, "alpha": 2 / 255, "steps": steps, "random_start": False}
        theirs = torchattacks.PGD(Wide(model).eval(), **options)(x, y)
        ours = PGD(model, **options)(x, y)
        assert 0 < ((ours - theirs).abs() > 1e-5).float().mean() < share
        assert torch.equal(right(model, ours, y), right(model, theirs, y))
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model(x), y).item() for x in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_standard_classifier_of_cifar():
    """83 % of the clean images (stored as JPEG), none under PGD-10."""
    data, model = models.cifar(), models.standard_cifar()
    x, y = data.images[:128], data.labels[:128]
    assert 0.79 < right(model, x, y).float().mean() < 0.87
    adversarial = PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, early_stop=True)(x, y)
    assert not right(model, adversarial, y).any()
