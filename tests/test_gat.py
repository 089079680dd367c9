"""The training attack of GAT: its formula, its bounds, its gradient, and fine-tuning on it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_task import places, trained_classifier

from atop_fast import PGD, RT2, Defense, FinetuneConfig, build_classifier, build_purifier, finetune
from atop_fast.randomness import Tag, derive_seed, random_uniform, seeded
from atop_fast.training.gat import Semantic, changed

X, Y = places(12, seed=5)
PARTS = ("gain", "shift", "flow", "delta")


def drawn(shape, bound, seed):
    return bound * (2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)


class Recorded(Semantic):
    """Keeps the last state."""

    def step(self, estimator, state):
        super().step(estimator, state)
        self.states.append({key: value.clone() for key, value in state.items()})


def test_the_change_is_that_of_the_formula():
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gain, shift, delta = drawn((2, 3, 1, 1), 0.4, 2), drawn((2, 3, 1, 1), 0.4, 3), drawn((2, 3, 4, 5), 0.2, 4)
    # Every pixel takes its right neighbor, one pixel being 2 / 5; the last column is repeated.
    flow = torch.zeros(2, 2, 4, 5, dtype=torch.float64)
    flow[:, 0] = 2 / 5
    result = changed(x, gain, shift, flow, delta)
    for b in range(2):
        for c in range(3):
            for i in range(4):
                for j in range(5):
                    color = float((1 + gain[b, c, 0, 0]) * x[b, c, i, min(j + 1, 4)] + shift[b, c, 0, 0])
                    value = min(1.0, max(0.0, min(1.0, max(0.0, color)) + float(delta[b, c, i, j])))
                    assert float(result[b, c, i, j]) == pytest.approx(value, abs=1e-12)
    zero = [torch.zeros_like(part) for part in (gain, shift, flow, delta)]
    assert torch.equal(changed(x, *zero), x)


def test_gradcheck():
    # Away from the kinks of both clips and of the bilinear grid.
    x = 0.4 + 0.2 * torch.rand(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = [drawn((2, 2, 1, 1), 0.1, 2), drawn((2, 2, 1, 1), 0.1, 3), 0.1 + drawn((2, 2, 4, 4), 0.05, 4)]
    parts.append(drawn((2, 2, 4, 4), 0.05, 5))
    assert torch.autograd.gradcheck(changed, [x.requires_grad_(), *(part.requires_grad_() for part in parts)])


def test_every_part_stays_in_its_bound_and_makes_the_image():
    attack = Recorded(trained_classifier(), eps=0.05, color=0.2, flow=0.1, steps=4, rate=0.9)
    attack.states = []
    # The number of images is that of the rows of the attack's batch.
    x = attack(X[:8], Y[:8])
    last = attack.states[-1]
    for name, bound in zip(PARTS, (0.2, 0.2, 0.1, 0.05), strict=True):
        size = last[name].abs().amax()
        assert 0.5 * bound < size <= bound + 1e-7, name
    assert torch.equal(x, changed(last["x0"], *(last[name] for name in PARTS)))
    assert x.min() >= 0
    assert x.max() <= 1


@pytest.mark.parametrize("part", ["color", "flow", "eps", "all"])
def test_every_part_raises_the_loss(part):
    bounds = {"eps": 0.1, "color": 0.4, "flow": 0.3}
    given = bounds if part == "all" else {name: bound * (name == part) for name, bound in bounds.items()}
    model = trained_classifier()

    def loss(x):
        with torch.no_grad():
            return F.cross_entropy(model(x), Y, reduction="none")

    attack = Semantic(model, **given, steps=8)
    x = attack(X, Y)
    assert loss(x).mean() > loss(X).mean()
    if part != "all":
        assert loss(Semantic(model, **bounds, steps=8)(X, Y)).mean() > loss(x).mean()
    assert torch.equal(Semantic(model, 0.0, 0.0, 0.0, steps=2)(X, Y), X)


def test_pixels_alone_are_pgd():
    """From the same start, where no pixel is clipped."""
    model, x = trained_classifier(), 0.3 + 0.4 * X
    key, ids = derive_seed(7, "delta"), torch.arange(12)
    start = x + 0.05 * (2 * random_uniform((1, 16, 16), key, ids, 0, Tag.START) - 1)
    theirs = PGD(model, 0.05, 0.02, 3)(x, Y, start=start)
    ours = Semantic(model, 0.05, 0.0, 0.0, steps=3, rate=0.4, seed=7)(x, Y)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert (ours - x).abs().max() <= 0.05 + 1e-6


def test_an_image_has_changes_of_its_own():
    attack = Semantic(trained_classifier(), steps=2, seed=3)
    ids, order = torch.arange(12) + 40, torch.tensor([5, 0, 3])
    whole = attack(X, Y, ids)
    assert torch.allclose(attack(X[order], Y[order], ids[order]), whole[order], atol=1e-6)
    assert not torch.allclose(attack(X, Y, ids + 1), whole, atol=1e-3)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:4] = True
    inside = attack(X, Y, ids, mask=mask)
    assert torch.equal(inside[:, :, 4:], X[:, :, 4:])
    assert not torch.equal(inside[:, :, :4], X[:, :, :4])


def test_finetune_on_it_changes_the_purifier_alone():
    with seeded(0):
        classifier = build_classifier("small_cnn", channels=1, classes=4).eval()
        purifier = build_purifier("unet", channels=1, width=4)
    before = [p.clone() for p in purifier.parameters()]
    config = FinetuneConfig(
        epochs=1, batch_size=6, attack="gat", steps=2, color=0.2, flow=0.1, gan_weight=0, ce_weight=1.0
    )
    defense = Defense(RT2(4, sigma=0.1), purifier, classifier)
    history = finetune(defense, X, Y, config=config, progress=False)
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in history)
    assert any(not torch.equal(a, b) for a, b in zip(before, purifier.parameters(), strict=True))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Semantic(trained_classifier(), color=2), r"Semantic: color must be finite and in \[0, 1\], got 2"),
        (lambda: Semantic(trained_classifier(), flow=-1), "Semantic: flow must be finite and >= 0, got -1"),
        (lambda: Semantic(trained_classifier())(X, Y, start=X), "Semantic: start must be None"),
        (lambda: FinetuneConfig(attack="gat", norm="L2"), "FinetuneConfig: norm must be one of 'Linf', got 'L2'"),
        (lambda: FinetuneConfig(attack="gat", color=-1), "FinetuneConfig: color must be"),
    ],
)
def test_bad_arguments_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        build()
