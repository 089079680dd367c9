"""MI-FGSM and FGSM: oracles, and the edges of the ball and of [0, 1]."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small_task import places, trained_classifier

from atop_fast.attacks import FGSM, MIFGSM, PGD, counted_passes

X, Y = places(12, seed=999)


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_mifgsm_equals_torchattacks(steps, decay):
    torchattacks = pytest.importorskip("torchattacks")
    expected = torchattacks.MIFGSM(trained_classifier(), eps=0.1, alpha=0.02, steps=steps, decay=decay)(X, Y)
    ours = MIFGSM(trained_classifier(), eps=0.1, alpha=0.02, steps=steps, decay=decay)(X, Y)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_mifgsm_without_momentum_is_pgd():
    pgd = PGD(trained_classifier(), eps=0.1, alpha=0.02, steps=5, random_start=False)(X, Y)
    assert torch.equal(MIFGSM(trained_classifier(), eps=0.1, alpha=0.02, steps=5, decay=0.0)(X, Y), pgd)
    assert not torch.equal(MIFGSM(trained_classifier(), eps=0.1, alpha=0.02, steps=5)(X, Y), pgd)


def test_mifgsm_of_one_step_is_fgsm():
    """Its step is eps / steps by default."""
    assert torch.equal(MIFGSM(trained_classifier(), eps=0.1, steps=1)(X, Y), FGSM(trained_classifier(), eps=0.1)(X, Y))


def test_mifgsm_where_the_gradient_is_zero_goes_on_along_its_momentum():
    """A gradient that is zero from the second step on: 0 / mean|0| must not become NaN."""
    turned_off = iter([1.0, 0.0, 0.0])

    def model(x):
        # A class 0 that grows with every pixel, in the first step only.
        return torch.stack((x.sum(dim=(1, 2, 3)), 0 * x.sum(dim=(1, 2, 3))), dim=1) * next(turned_off)

    attack = MIFGSM(model, eps=0.3, alpha=0.1, steps=2, max_batch=1024)
    adversarial = attack(torch.full((8, 1, 4, 4), 0.5), torch.ones(8, dtype=torch.int64))
    torch.testing.assert_close(adversarial, torch.full((8, 1, 4, 4), 0.7))


def test_mifgsm_early_stop_saves_passes_and_loses_nothing():
    def accuracy(images):
        return (trained_classifier()(images).argmax(dim=1) == Y).float().mean()

    with counted_passes() as all_steps:
        patient = MIFGSM(trained_classifier(), eps=0.3, steps=20)(X, Y)
    with counted_passes() as fewer_steps:
        stopped = MIFGSM(trained_classifier(), eps=0.3, steps=20, early_stop=True)(X, Y)
    assert accuracy(patient) == accuracy(stopped) == 0
    assert fewer_steps.backward < all_steps.backward


def test_fgsm_moves_every_pixel_by_eps_where_the_image_allows_it():
    x = 0.2 + 0.5 * X
    adversarial = FGSM(trained_classifier(), eps=0.1)(x, Y)
    moved = (adversarial - x).abs()
    assert ((moved < 1e-6) | ((moved - 0.1).abs() < 1e-6)).all()
    assert (moved > 0.05).float().mean() > 0.9


def test_fgsm_at_the_edges_of_the_range():
    """Linf steps out of [0, 1] are cut off; in L2 as well, so the move is at most eps."""
    x = X.round()
    for norm, eps in (("Linf", 0.1), ("L2", 1.0)):
        adversarial = FGSM(trained_classifier(), eps, norm=norm)(x, Y)
        delta = (adversarial - x).flatten(1)
        size = delta.abs().amax(dim=1) if norm == "Linf" else delta.norm(dim=1)
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        assert (size <= eps + 1e-6).all()
        assert (size > 0).all()


def test_fgsm_l2_is_one_normalized_step():
    x = 0.3 + 0.3 * X
    leaf = x.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(trained_classifier()(leaf), Y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = x + 0.2 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    adversarial = FGSM(trained_classifier(), 0.2, norm="L2")(x, Y)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-5)


def test_fgsm_takes_one_pass_and_is_exact_with_a_gradient_of_zero():
    def flat(x):
        return 0 * x.flatten(1)

    for norm in ("Linf", "L2"):
        assert torch.equal(FGSM(flat, 0.1, norm=norm)(X, Y), X)
    with counted_passes() as passes:
        FGSM(trained_classifier())(X[:8], Y[:8])
    assert passes.backward == 8


def test_large_eps_reaches_the_corners():
    adversarial = FGSM(trained_classifier(), eps=1.0)(X, Y)
    assert ((adversarial == 0) | (adversarial == 1) | (adversarial == X)).all()


@pytest.mark.parametrize(
    ("options", "error", "pattern"),
    [
        ({"norm": "L2"}, ValueError, "MIFGSM: norm must be one of 'Linf', got 'L2'"),
        ({"decay": -1.0}, ValueError, "MIFGSM: decay must be finite and >= 0, got -1.0"),
        ({"alpha": float("nan")}, ValueError, "MIFGSM: alpha must be finite"),
    ],
)
def test_wrong_input_is_named(options, error, pattern):
    with pytest.raises(error, match=pattern):
        MIFGSM(trained_classifier(), **options)


@pytest.mark.parametrize("steps", [0, 1.5, "3"])
def test_mifgsm_names_wrong_steps(steps):
    with pytest.raises((TypeError, ValueError), match="MIFGSM: steps must be an integer"):
        MIFGSM(trained_classifier(), steps=steps)


def test_the_examples_of_the_docs_run(capsys):
    page = (Path(__file__).parent.parent / "docs" / "attacks.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 3
    for code in examples:
        exec(code, {})
    assert "rows went backward through the classifier" in capsys.readouterr().out
