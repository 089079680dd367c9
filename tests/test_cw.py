"""CW: step by step as torchattacks and foolbox, the smallest perturbation, the search over c, and rows of their own."""

from __future__ import annotations

import pytest
import torch
from small_task import places, trained_classifier

from atop_fast import RT2, Defense
from atop_fast.attacks import CW, counted_passes, prepared
from atop_fast.attacks.adam import adam_step
from atop_fast.attacks.queue import Batch

X, Y = places(16, seed=999)


def distances(adversarial, images=X):
    return (adversarial - images).flatten(1).norm(dim=1)


def fooled(adversarial, labels=Y):
    return trained_classifier()(adversarial).argmax(dim=1) != labels


def defense():
    return Defense(RT2(4, 1 / 16, sigma=0.1), None, trained_classifier())


def test_adam_step_is_that_of_torch():
    parameter, m, v = torch.zeros(1, 2, 3, 3, requires_grad=True), *torch.zeros(2, 1, 2, 3, 3)
    optimizer, ours = torch.optim.Adam([parameter], lr=0.1), torch.zeros(1, 2, 3, 3)
    for update in range(5):
        parameter.grad = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(update))
        optimizer.step()
        m, v, change = adam_step(m, v, parameter.grad, torch.tensor([update]), 0.1)
        ours -= change
    torch.testing.assert_close(ours, parameter.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("c", [2.0, 10.0])
def test_equals_torchattacks(c):
    torchattacks = pytest.importorskip("torchattacks")
    # It ends when the objective of the whole batch rises between two looks, which it does not here.
    expected = torchattacks.CW(trained_classifier(), c=c, steps=20, lr=0.05)(X, Y)
    ours = CW(trained_classifier(), c=c, steps=20, lr=0.05)(X, Y)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    if c == 10:
        assert fooled(ours).float().mean() > 0.9


@pytest.mark.parametrize(
    ("c", "kappa", "search_steps"), [(3.0, 0.0, 1), (0.5, 0.5, 5), (0.01, 0.0, 10)], ids=["one", "kappa", "ten"]
)
def test_equals_foolbox(c, kappa, search_steps):
    """With the binary search: the same c of every image in every run, or else the results would differ."""
    foolbox = pytest.importorskip("foolbox")
    model = foolbox.PyTorchModel(trained_classifier(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.L2CarliniWagnerAttack(search_steps, 20, 0.05, kappa, c, abort_early=False)
    expected = attack(model, X, Y, epsilons=None)[0]
    ours = CW(trained_classifier(), c=c, kappa=kappa, steps=20, lr=0.05, search_steps=search_steps)(X, Y)
    # If it finds nothing, foolbox returns zeros.
    found = fooled(expected)
    assert found.float().mean() > 0.9
    torch.testing.assert_close(ours[found], expected[found], rtol=0, atol=1e-4)
    assert torch.equal(ours[~found], X[~found])


def test_search_over_c_shortens_the_perturbation():
    one = CW(trained_classifier(), c=20, steps=30, lr=0.05)(X, Y)
    searched = CW(trained_classifier(), c=20, steps=30, lr=0.05, search_steps=5)(X, Y)
    assert fooled(one).all()
    assert fooled(searched).all()
    assert (distances(searched) <= distances(one)).all()
    assert distances(searched).median() < 0.95 * distances(one).median()


def test_kappa_is_the_margin_of_the_result():
    adversarial = CW(trained_classifier(), c=20, kappa=2.0, steps=40, lr=0.05)(X, Y)
    logits = trained_classifier()(adversarial)
    rivals = logits.scatter(1, Y[:, None], -torch.inf).amax(dim=1)
    moved = distances(adversarial) > 0
    assert moved.float().mean() > 0.9
    assert (rivals - logits.gather(1, Y[:, None])[:, 0])[moved].min() > 2 - 1e-4


def test_eps_keeps_only_what_is_near():
    free = CW(trained_classifier(), c=20, steps=30, lr=0.05)(X, Y)
    eps = float(distances(free).median())
    bounded = CW(trained_classifier(), eps=eps, c=20, steps=30, lr=0.05)(X, Y)
    near = distances(free) <= eps
    assert 0 < near.sum() < len(X)
    assert torch.equal(bounded[near], free[near])
    assert torch.equal(bounded[~near], X[~near])


def test_no_success_gives_the_image_and_a_wrong_one_stays():
    assert torch.equal(CW(trained_classifier(), c=0, steps=5)(X, Y), X)
    wrong = (Y + 1) % 4
    torch.testing.assert_close(CW(trained_classifier(), steps=5)(X, wrong), X, rtol=0, atol=1e-6)


def test_saturated_pixels_can_move():
    x = X.round()
    adversarial = CW(trained_classifier(), c=20, steps=60, lr=0.2)(x, Y)
    assert fooled(adversarial).float().mean() > 0.9
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (adversarial != x)[fooled(adversarial)].float().mean() > 0.5


def test_early_stop_saves_passes_and_hardly_changes_the_result():
    options = {"c": 10, "steps": 60, "lr": 0.02}
    with counted_passes() as all_steps:
        patient = CW(trained_classifier(), **options)(X, Y)
    with counted_passes() as fewer_steps:
        stopped = CW(trained_classifier(), early_stop=True, **options)(X, Y)
    assert fewer_steps.backward < 0.7 * all_steps.backward
    assert fooled(stopped).float().mean() >= fooled(patient).float().mean()
    assert distances(stopped).median() < 1.02 * distances(patient).median()


def test_early_stop_of_one_image_is_that_of_torchattacks():
    """It stops whole batches, which for one image is the same."""
    torchattacks = pytest.importorskip("torchattacks")
    theirs = torchattacks.CW(trained_classifier(), c=4, steps=60, lr=0.05)
    expected = torch.cat([theirs(X[i : i + 1], Y[i : i + 1]) for i in range(4)])
    ours = CW(trained_classifier(), c=4, steps=60, lr=0.05, early_stop=True)(X[:4], Y[:4])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert not torch.equal(ours, CW(trained_classifier(), c=4, steps=60, lr=0.05)(X[:4], Y[:4]))


@pytest.mark.parametrize("random", [False, True])
def test_result_belongs_to_the_sample(random):
    """Bitwise, in another order, alone, and with more images than the queue has slots."""
    model = defense() if random else trained_classifier()
    options = {"eot_iter": 3} if random else {"early_stop": True}
    attack, count = CW(model, c=10, steps=6, lr=0.1, search_steps=2, **options), 70
    x, y = places(count, seed=5)
    ids = torch.arange(count) + 100
    whole = attack(x, y, ids)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:20]
    assert torch.equal(attack(x[order], y[order], ids[order]), whole[order])
    for i in (0, 69):
        assert torch.equal(attack(x[i : i + 1], y[i : i + 1], ids[i : i + 1]), whole[i : i + 1])


def test_rows_that_are_done_do_not_change():
    attack = CW(trained_classifier(), c=10, steps=4, lr=0.1, search_steps=2)
    with prepared(trained_classifier()) as network, torch.no_grad():
        estimator = attack.estimator(network)
        state = attack.begin(estimator, Batch(X[:8], Y[:8], torch.arange(8)))
        attack.step(estimator, state)
        state["done"][::2] = True
        state["t"][::2] = 8
        before = {key: value.clone() for key, value in state.items()}
        for _ in range(7):
            attack.step(estimator, state)
    assert state["done"].all()
    for key, value in state.items():
        assert torch.equal(value[::2], before[key][::2]), key
    assert not torch.equal(state["best"][1::2], before["best"][1::2])


def test_a_defense_is_fooled_in_most_draws():
    model = defense()
    adversarial = CW(model, c=20, kappa=1.0, steps=40, lr=0.1, eot_iter=4)(X, Y)
    correct = [(model(adversarial, 77, None, draw).argmax(dim=1) == Y).float().mean() for draw in range(10)]
    clean = [(model(X, 77, None, draw).argmax(dim=1) == Y).float().mean() for draw in range(10)]
    assert sum(clean) / 10 > 0.8
    assert sum(correct) / 10 < 0.3


def test_start_takes_the_place_of_the_image():
    start = X.roll(6, dims=3)
    adversarial = CW(trained_classifier(), c=20, steps=1)(X, Y, start=start)
    torch.testing.assert_close(adversarial[fooled(start)], start[fooled(start)], rtol=0, atol=1e-6)


def test_model_inputs_and_global_generator_are_untouched():
    model, x, state = defense().train(), X.clone(), torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    CW(model, steps=2, search_steps=2)(x, Y)
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()


def test_nan_gradients_leave_the_images():
    assert torch.equal(CW(lambda x: x.flatten(1) * float("nan"), steps=3)(X, Y), X)


def test_empty_batch():
    assert CW(trained_classifier())(X[:0], Y[:0]).shape == (0, 1, 16, 16)


@pytest.mark.parametrize(
    ("options", "error", "pattern"),
    [
        ({"norm": "Linf"}, ValueError, "CW: norm must be one of 'L2', got 'Linf'"),
        ({"eps": -1.0}, ValueError, r"CW: eps must be finite and in \[0, 1e\+06\], got -1.0"),
        ({"c": -1.0}, ValueError, "CW: c must be finite and in"),
        ({"kappa": "1"}, TypeError, "CW: kappa must be a number, got str"),
        ({"lr": float("nan")}, ValueError, "CW: lr must be finite"),
        ({"steps": 0}, ValueError, "CW: steps must be an integer and >= 1, got 0"),
        ({"search_steps": 1.5}, TypeError, "CW: search_steps must be an integer, got float"),
    ],
)
def test_wrong_input_is_named(options, error, pattern):
    with pytest.raises(error, match=pattern):
        CW(trained_classifier(), **options)


def test_early_stop_refuses_a_defense():
    with pytest.raises(ValueError, match="CW: early_stop must be False for a Defense"):
        CW(defense(), early_stop=True)
