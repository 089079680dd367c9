"""Restarts: one loop for all attacks, held to a plain one over whole runs, and what it costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import mnist, standard_mnist

from atop_fast import RT2, Defense
from atop_fast.attacks import APGD, APGDT, FAB, MIFGSM, PGD, Square, counted_passes, draw_logits
from atop_fast.randomness import derive_seed

RESTARTS, COUNT = 4, 24
IDS = torch.arange(COUNT) * 3
ATTACKS = {
    "pgd": lambda model, **o: PGD(model, 0.08, norm="Linf", steps=3, **o),
    "pgd-l2": lambda model, **o: PGD(model, 1.0, norm="L2", steps=3, random_start=False, **o),
    "mifgsm": lambda model, **o: MIFGSM(model, 0.08, norm="Linf", steps=3, **o),
    "apgd": lambda model, **o: APGD(model, "Linf", 0.08, steps=3, eot_iter=2, **o),
    "apgdt": lambda model, **o: APGDT(model, "Linf", 0.08, steps=2, target_classes=2, eot_iter=2, **o),
    "square": lambda model, **o: Square(model, "Linf", 0.1, n_queries=8, eot_iter=2, **o),
}


@pytest.fixture(scope="module")
def digits():
    data = mnist().take(slice(0, COUNT))
    return data.images, data.labels


def plain(build, model, x, y, draws, loss):
    """Every run over every image; an image keeps what it has once no draw of the judge's is right."""
    seeds = [5, *(derive_seed(5, "restart", r) for r in range(1, RESTARTS))]
    best, best_rank = None, None
    for number, seed in enumerate(seeds):
        attack = build(model, seed=seed)
        begun = attack.restart_from(seed, x, IDS) if number else None
        candidates = attack(x, y, IDS, start=begun)
        logits = draw_logits(model, candidates, derive_seed(5, "restart", "selection"), IDS, range(draws))
        right = (logits.argmax(dim=2) == y[:, None]).sum(dim=1)
        rank = [(int(c), -float(v)) for c, v in zip(right, loss(logits, y), strict=True)]
        if best is None:
            best, best_rank = candidates, rank
            continue
        for row in range(len(x)):
            if best_rank[row][0] > 0 and rank[row] < best_rank[row]:
                best[row], best_rank[row] = candidates[row], rank[row]
    return best


def cross_entropy(logits, y):
    repeated = y[:, None].expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), repeated.flatten(), reduction="none").view_as(repeated).mean(dim=1)


def margin(logits, y):
    own = y[:, None, None].expand(-1, logits.shape[1], 1)
    return (logits.scatter(2, own, -torch.inf).amax(dim=2) - logits.gather(2, own)[..., 0]).mean(dim=1)


def dlr(logits, y):
    own = y[:, None, None].expand(-1, logits.shape[1], 1)
    ranked = logits.sort(dim=2, descending=True).values
    others = logits.scatter(2, own, -torch.inf).amax(dim=2)
    return ((others - logits.gather(2, own)[..., 0]) / (ranked[..., 0] - ranked[..., 2] + 1e-12)).mean(dim=1)


LOSSES = {"apgdt": dlr, "square": margin}


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("random", [False, True], ids=["classifier", "defense"])
def test_equals_a_plain_loop_over_whole_runs(digits, name, random):
    x, y = digits
    model = Defense(RT2(4, sigma=0.2), None, standard_mnist()) if random else standard_mnist()
    build = ATTACKS[name]
    # PGD's choice has draws of its own, the others' the number of the attack's.
    draws = 8 if isinstance(build(model), PGD) else 2
    expected = plain(build, model, x, y, draws, LOSSES.get(name, cross_entropy))
    restarted = build(model, seed=5, n_restarts=RESTARTS)(x, y, IDS)
    assert torch.equal(restarted, expected)
    assert not torch.equal(restarted, build(model, seed=5)(x, y, IDS))


def test_fab_equals_a_plain_loop_over_whole_runs(digits):
    x, y = digits
    best, options = None, {"eps": 0.05, "steps": 2, "target_classes": 1}
    for restart in range(RESTARTS):
        seed = derive_seed(5, "restart", restart) if restart else 5
        attack = FAB(standard_mnist(), seed=seed, **options)
        found = attack(x, y, IDS, start=attack.restart_from(seed, x, IDS) if restart else None)
        still = torch.ones(COUNT, dtype=torch.bool) if best is None else (best == x).flatten(1).all(dim=1)
        best = found if best is None else torch.where(still[:, None, None, None], found, best)
    assert torch.equal(FAB(standard_mnist(), seed=5, n_restarts=RESTARTS, **options)(x, y, IDS), best)


def test_fooled_images_are_not_attacked_again(digits):
    x, y = digits
    model = standard_mnist()

    def cost(restarts, eps=0.3):
        with counted_passes() as passes:
            adversarial = PGD(model, eps, steps=20, n_restarts=restarts, early_stop=True, max_batch=8)(x, y)
        return passes.forward, model(adversarial).argmax(dim=1) != y

    once, fooled = cost(1)
    assert fooled.all()
    # One pass of every image tells that nothing is left.
    assert cost(5)[0] == once + COUNT
    once, fooled = cost(1, eps=0.06)
    assert 4 <= (~fooled).sum() <= 16
    many, fooled_later = cost(5, eps=0.06)
    assert (fooled_later | ~fooled).all()
    left = -(-int((~fooled).sum()) // 8) * 8
    # Four restarts of no more than what was left, of 20 steps and one look each.
    assert many <= once + COUNT + 4 * left * 21
