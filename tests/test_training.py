"""Classifier training, pretrain and finetune: what changes, what does not, the losses, and exact resumption."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from atop_fast import (
    RT2,
    RT3,
    ClassifierConfig,
    Defense,
    FinetuneConfig,
    PretrainConfig,
    build_classifier,
    build_purifier,
    finetune,
    pretrain,
    train_classifier,
)
from atop_fast.classifiers import Normalized
from atop_fast.purifiers import SNPatchDiscriminator
from atop_fast.randomness import Tag, derive_seed, random_uniform, seeded
from atop_fast.training import ClassifierStep, Feed, FinetuneStep, PretrainStep, fit
from atop_fast.training.nfgsm import NFGSM
from atop_fast.transforms import RandomTransform

X = torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 4
RT = RT2(4, sigma=0.1)
QUIET = {"progress": False}


def networks():
    with seeded(0):
        classifier = build_classifier("small_cnn", channels=1, classes=4).eval()
        return build_purifier("unet", channels=1, width=4), SNPatchDiscriminator(1, 4, 2), classifier


def weights(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_classifier_learns():
    _, _, classifier = networks()
    history = train_classifier(classifier, X, Y, config=ClassifierConfig(60, 6, 1e-2), **QUIET)
    assert history[-1]["accuracy"] == 1 > history[0]["accuracy"]
    assert not classifier.training


def test_augmentation_changes_what_a_classifier_sees_in_every_epoch():
    def losses(augment):
        _, _, classifier = networks()
        config = ClassifierConfig(epochs=2, batch_size=12, lr=0, augment=augment)
        return [epoch["loss"] for epoch in train_classifier(classifier, X, Y, config=config, **QUIET)]

    (same, again), (moved, otherwise) = losses(False), losses(True)
    assert same == pytest.approx(again, rel=1e-6)
    assert len({round(loss, 5) for loss in (same, moved, otherwise)}) == 3


@pytest.mark.parametrize(("momentum", "clip"), [(0.9, None), (0.8, 0.5)])
def test_sgd_is_torchs(momentum, clip):
    """Nesterov's momentum, smoothed labels, and no weight decay of biases and norms: a loop in plain PyTorch."""
    with seeded(0):
        ours = build_classifier("resnet9", channels=1, classes=4, widths=(16, 16, 16))
    theirs = copy.deepcopy(ours).train()
    config = ClassifierConfig(
        epochs=3, batch_size=12, lr=0.02, schedule="constant", optimizer="sgd", momentum=momentum, weight_decay=0.05,
        label_smoothing=0.1, clip=clip,
    )  # fmt: skip
    train_classifier(ours, X, Y, config=config, **QUIET)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    others = [p for p in theirs.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=0.02, momentum=momentum, nesterov=True,
    )  # fmt: skip
    for _ in range(3):
        optimizer.zero_grad()
        log_p = theirs(X).log_softmax(1)
        (-0.9 * log_p[range(12), Y].mean() - 0.1 * log_p.mean()).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        optimizer.step()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"optimizer": "adamw"}, "optimizer must be one of 'adam', 'sgd', got 'adamw'"),
        ({"optimizer": "sgd", "momentum": 1.0}, "momentum must be between 0 and 1, got 1.0"),
        ({"optimizer": "sgd", "momentum": 0.0}, "momentum must be between 0 and 1, got 0.0"),
        ({"weight_decay": 0.1}, "weight_decay must be 0 with the optimizer 'adam', got 0.1"),
        ({"label_smoothing": 1.1}, r"label_smoothing must be finite and in \[0, 1\], got 1.1"),
        ({"flip": "never"}, "flip must be one of 'random', 'alternating', got 'never'"),
        ({"shift": -1}, "shift must be an integer and >= 0, got -1"),
    ],
)
def test_wrong_options_of_a_classifiers_training_are_named(options, pattern):
    with pytest.raises(ValueError, match=f"ClassifierConfig: {pattern}"):
        ClassifierConfig(**options)


@pytest.mark.parametrize("transform", [None, RT2(4, 0.25, sigma=0.1)], ids=["plain", "rt2"])
def test_adversarial_training_of_a_classifier_is_its_formula(transform):
    """One update on the images of N-FGSM behind the transform, in plain PyTorch."""
    _, _, ours = networks()
    theirs, ids = copy.deepcopy(ours), torch.arange(12)
    config = ClassifierConfig(lr=0.1, optimizer="sgd", attack="n-fgsm", eps=0.05, noise=1.0)
    step = ClassifierStep(ours, config, 4, transform)
    logs = step(X, Y, ids, 2)

    def logits(x, seed, draw):
        return theirs(x if transform is None else Defense(transform, None, nn.Identity()).purify(x, seed, ids, draw))

    cross_entropy = torch.nn.functional.cross_entropy
    attack_seed = derive_seed(derive_seed(4, "attack"), 2)
    start = X + 0.05 * (2 * random_uniform(X.shape[1:], attack_seed, ids, 0, Tag.START) - 1)
    start = start.clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits(start, attack_seed, 0), Y), start)
    adversarial = (start + 0.05 * gradient.sign()).clamp(0, 1).detach()
    loss = cross_entropy(logits(adversarial, derive_seed(4, "transform"), 2), Y)
    loss.backward()
    assert logs["loss"].item() == pytest.approx(loss.item(), rel=1e-3)
    assert loss > cross_entropy(logits(X, derive_seed(4, "transform"), 2), Y)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        # The first step of Nesterov's momentum is 1.9 gradients long.
        torch.testing.assert_close(p, q - 0.19 * q.grad, rtol=1e-2, atol=1e-4)


def test_a_run_of_sgd_resumes_to_the_same_bits(tmp_path):
    def run(path, updates=None):
        with seeded(0):
            net = build_classifier("resnet9", channels=1, classes=4, widths=(16, 16, 16))
        config = ClassifierConfig(
            epochs=4, batch_size=5, lr=0.1, schedule="onecycle", optimizer="sgd", weight_decay=0.05, augment=True
        )
        if updates is not None:
            step, seen = ClassifierStep.losses, []

            def failing(self, *args):
                seen.append(1)
                if len(seen) > updates:
                    raise KeyboardInterrupt
                return step(self, *args)

            monkey = pytest.MonkeyPatch()
            monkey.setattr(ClassifierStep, "losses", failing)
            with pytest.raises(KeyboardInterrupt):
                train_classifier(net, X, Y, config=config, checkpoint=path, checkpoint_minutes=0, **QUIET)
            monkey.undo()
            return weights(net)
        train_classifier(net, X, Y, config=config, checkpoint=path, checkpoint_minutes=0, **QUIET)
        return weights(net)

    whole = run(tmp_path / "whole.pt")
    run(tmp_path / "cut.pt", updates=7)
    assert equal(run(tmp_path / "cut.pt"), whole)


def test_pretraining_learns_to_restore():
    purifier, discriminator, _ = networks()
    config = PretrainConfig(epochs=30, batch_size=6, lr=5e-3)
    history = pretrain(purifier, RT, X, discriminator=discriminator, config=config, **QUIET)
    assert history[-1]["l1"] < 0.9 * history[0]["l1"]
    assert history[0].keys() == {"l1", "discriminator", "gan"}


@pytest.mark.parametrize("attacked", ["pipeline", "classifier"])
@pytest.mark.parametrize("target", ["adversarial", "clean"])
def test_finetuning_changes_the_purifier_alone(attacked, target):
    purifier, discriminator, classifier = networks()
    before, frozen_before = weights(purifier), weights(classifier)
    flags = [p.requires_grad for p in classifier.parameters()]
    config = FinetuneConfig(epochs=1, batch_size=5, attacked=attacked, target=target, eps=0.1, attack="pgd", steps=2)
    history = finetune(Defense(RT, purifier, classifier), X, Y, discriminator=discriminator, config=config, **QUIET)
    assert not equal(weights(purifier), before)
    assert equal(weights(classifier), frozen_before)
    assert [p.requires_grad for p in classifier.parameters()] == flags
    assert all(p.grad is None for p in classifier.parameters())
    assert history[0].keys() == {"l1", "discriminator", "gan", "ce", "accuracy"}


def test_finetuning_lowers_the_loss_under_its_attack():
    purifier, _, classifier = networks()
    train_classifier(classifier, X, Y, config=ClassifierConfig(60, 6, 1e-2), **QUIET)
    config = FinetuneConfig(epochs=30, batch_size=6, lr=3e-3, gan_weight=0, ce_weight=2.0, eps=0.05)
    history = finetune(Defense(RT, purifier, classifier), X, Y, config=config, **QUIET)
    assert sum(h["ce"] for h in history[-5:]) < 0.9 * sum(h["ce"] for h in history[:5])


@pytest.mark.parametrize("transform", [RT, RT3(4, 4, 0.1)], ids=["rt2", "rt3"])
def test_losses_follow_the_formula(transform):
    purifier, discriminator, _ = networks()
    torch.nn.init.normal_(purifier.to_image.weight, std=0.1)
    step = PretrainStep(transform, purifier, discriminator, PretrainConfig(gan_weight=0.5), seed=3)
    ids, target = torch.arange(12), X.flip(0)
    image, loss, logs = step.restore(X, target, ids, 7)
    corrupted = transform(X, derive_seed(3, "transform"), ids, 7)
    purified = purifier(corrupted)
    l1 = (purified - (2 * target - 1).repeat_interleave(transform.copies, 0)).abs().mean()
    scores = discriminator.eval()(purified, corrupted[:, -1:])
    torch.testing.assert_close(loss, l1 - 0.5 * scores.mean())
    torch.testing.assert_close(logs["l1"], l1)
    torch.testing.assert_close(image, (transform.assemble(purified, corrupted) + 1) / 2)


def test_gan_term_has_a_gradient_for_the_purifier_and_none_for_the_discriminator():
    purifier, discriminator, _ = networks()
    torch.nn.init.normal_(purifier.to_image.weight, std=0.1)
    step = PretrainStep(RT, purifier, discriminator, PretrainConfig(gan_weight=0.5), seed=3)
    _, _, logs = step.restore(X, X, torch.arange(12), 0)
    step.optimizers["discriminator"].zero_grad()
    logs["gan"].backward()
    assert any(p.grad.abs().sum() > 0 for p in purifier.parameters())
    assert all(p.grad is None for p in discriminator.parameters())
    assert discriminator.training


class TwoStages(torch.nn.Module):
    """A purifier with a coarse and a refined output."""

    def __init__(self):
        super().__init__()
        self.coarse, self.refined = torch.nn.Conv2d(3, 1, 1), torch.nn.Conv2d(1, 1, 1)

    def stages(self, x):
        coarse = self.coarse(x)
        return coarse, self.refined(coarse)

    def forward(self, x):
        return self.stages(x)[1]


def test_every_stage_is_restored():
    step = PretrainStep(RT, TwoStages(), None, PretrainConfig(), seed=3)
    ids = torch.arange(12)
    image, loss, logs = step.restore(X, X, ids, 7)
    coarse, refined = step.purifier.stages(RT(X, derive_seed(3, "transform"), ids, 7))
    l1 = (coarse - (2 * X - 1)).abs().mean() + (refined - (2 * X - 1)).abs().mean()
    torch.testing.assert_close(loss, l1)
    torch.testing.assert_close(logs["l1"], l1)
    torch.testing.assert_close(image, (refined + 1) / 2)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains_alike(precision, tmp_path):
    """The losses are near those of float32, the weights stay float32, and a stopped run resumes, loss scale and all."""

    def run(precision, epochs=4, checkpoint=None):
        purifier, discriminator, classifier = networks()
        config = FinetuneConfig(epochs=epochs, batch_size=6, eps=0.1, precision=precision)
        options = {"discriminator": discriminator, "config": config, "checkpoint": checkpoint, **QUIET}
        history = finetune(Defense(RT, purifier, classifier), X, Y, **options)
        assert {p.dtype for p in purifier.parameters()} == {torch.float32}
        return history, weights(purifier)

    (wide, _), (narrow, trained) = run("float32"), run(precision, checkpoint=tmp_path / "run.pt")
    for a, b in zip(wide, narrow, strict=True):
        assert all(abs(a[key] - b[key]) < 0.02 * abs(a[key]) for key in ("l1", "ce", "discriminator"))
    assert wide != narrow
    again, resumed = run(precision, checkpoint=tmp_path / "run.pt")
    assert again == narrow
    assert equal(resumed, trained)


def test_classification_loss_waits_for_its_epoch():
    def run(**options):
        purifier, _, classifier = networks()
        config = FinetuneConfig(epochs=2, updates=2, batch_size=6, gan_weight=0, eps=0.1, **options)
        finetune(Defense(RT, purifier, classifier), X, Y, config=config, **QUIET)
        return weights(purifier)

    # The two updates are the first epoch.
    assert equal(run(ce_weight=1.0, ce_from_epoch=1), run(ce_weight=0.0))
    assert not equal(run(ce_weight=1.0, ce_from_epoch=0), run(ce_weight=0.0))


@pytest.mark.parametrize("attack", ["fgsm", "fgsm-rs", "pgd", "apgd"])
def test_training_attacks_stay_in_the_ball_and_raise_the_loss(attack):
    purifier, _, classifier = networks()
    config = FinetuneConfig(attack=attack, steps=3, eps=0.05, attacked="classifier", gan_weight=0)
    step = FinetuneStep(Defense(RT, purifier, classifier), None, config, seed=0)
    ids = torch.arange(12)
    adversarial = step.attack(X, Y, ids, epoch=1)
    assert 0.04 < (adversarial - X).abs().max() < 0.05 + 1e-6
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        assert loss(classifier(adversarial), Y) > loss(classifier(X), Y)
    again = step.attack(X, Y, ids, epoch=2)
    assert torch.equal(again, adversarial) == (attack == "fgsm")


def test_n_fgsm_is_its_formula():
    """Algorithm 1 of de Jorge et al. on the classifier alone, in plain PyTorch."""
    _, _, classifier = networks()
    for k, alpha in ((2.0, None), (0.5, 0.03)):
        attack = NFGSM(classifier, 0.05, alpha, noise=k, seed=5)
        ids = torch.arange(12)
        noise = 2 * random_uniform(X.shape[1:], 5, ids, 0, Tag.START) - 1
        start = (X + k * 0.05 * noise).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(classifier(start), Y), start)
        expected = (start + (0.05 if alpha is None else alpha) * gradient.sign()).clamp(0, 1).detach()
        # The sign of a gradient near 0 comes from rounding errors.
        sure = gradient.abs() > 1e-6
        result = attack(X, Y, ids)
        torch.testing.assert_close(result[sure], expected[sure])
        assert sure.float().mean() > 0.9
        assert result.min() >= 0
        assert result.max() <= 1
        assert torch.equal(attack(X[3:5], Y[3:5], ids[3:5]), result[3:5])
    assert (NFGSM(classifier, 0.05, noise=2.0)(X, Y) - X).abs().max() > 0.1


def test_tf32_is_evaluated_on_held_out_images():
    purifier, _, classifier = networks()
    step = FinetuneStep(Defense(RT, purifier, classifier), None, FinetuneConfig(precision="tf32", gan_weight=0), 0)
    assert set(step.evaluate(X, Y, torch.arange(12))) == {"clean", "robust"}


def test_n_fgsm_trains_through_the_pipeline_with_noise_of_its_own_in_every_epoch():
    purifier, _, classifier = networks()
    config = FinetuneConfig(attack="n-fgsm", eps=0.05, noise=1.5, gan_weight=0)
    step = FinetuneStep(Defense(RT, purifier, classifier), None, config, seed=0)
    ids = torch.arange(12)
    first, second = (step.attack(X, Y, ids, epoch) for epoch in (1, 2))
    assert torch.equal(first, step.attack(X, Y, ids, 1))
    assert not torch.equal(first, second)
    assert 0.05 < (first - X).abs().max() <= 2.5 * 0.05 + 1e-6
    many = FinetuneStep(Defense(RT, purifier, classifier), None, replace(config, eot_iter=3), seed=0)
    averaged = many.attack(X, Y, ids, 1)
    assert averaged.shape == X.shape
    assert not torch.equal(averaged, first)
    with pytest.raises(ValueError, match="FinetuneConfig: norm must be one of 'Linf', got 'L2'"):
        FinetuneConfig(attack="n-fgsm", norm="L2")


def test_perturbations_grow_over_the_warmup():
    """Half of the way is half of the perturbation; without a warm-up, and after it, there is all of it."""
    purifier, _, classifier = networks()
    config = FinetuneConfig(attack="fgsm", eps=0.05, gan_weight=0)
    whole, grown = (
        FinetuneStep(Defense(RT, purifier, classifier), None, replace(config, eps_warmup=w), seed=3) for w in (0, 0.5)
    )
    expected = whole.attack(X, Y, torch.arange(12), 0) - X
    assert expected.abs().max() > 0.04
    for progress, share in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)):
        grown.progress.fill_(progress)
        torch.testing.assert_close(grown.attack(X, Y, torch.arange(12), 0) - X, share * expected)


@pytest.mark.parametrize("epoch", [0, 3])
def test_an_attack_may_see_the_draw_of_the_loss(epoch):
    """One step of FGSM, and the loss that it leaves, in plain PyTorch under one key."""
    purifier, _, classifier = networks()
    config = FinetuneConfig(attack="fgsm", eps=0.05, gan_weight=0, attack_draw="loss")
    step = FinetuneStep(Defense(RT, purifier, classifier.eval()), None, config, seed=3)
    leaf = X[:4].clone().requires_grad_()
    pipeline = Defense(RT, purifier, classifier)
    loss = nn.functional.cross_entropy(pipeline(leaf, step.seed, torch.arange(4), epoch), Y[:4], reduction="sum")
    expected = (X[:4] + 0.05 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)
    seen = step.attack(X[:4], Y[:4], torch.arange(4), epoch)
    assert (seen - expected).abs().gt(1e-6).float().mean() < 0.02
    with pytest.raises(ValueError, match="attack_draw must be 'own' unless attacked='pipeline' and eot_iter=1"):
        FinetuneConfig(attack_draw="loss", eot_iter=2)


@pytest.mark.parametrize("clean_weight", [0.0, 0.7])
@pytest.mark.parametrize("target", ["clean", "adversarial"])
def test_an_update_of_fine_tuning_is_adams_on_the_formula(clean_weight, target):
    """L1 with its weight of the moment, cross-entropy on attacked and on clean images: one update in plain PyTorch."""
    purifier, _, classifier = networks()
    torch.nn.init.normal_(purifier.to_image.weight, std=0.1)
    theirs = copy.deepcopy(purifier).train()
    config = FinetuneConfig(
        attack="n-fgsm", eps=0.05, gan_weight=0, ce_weight=1.3, clean_weight=clean_weight, l1_weight=0.9, l1_final=0.1,
        target=target, lr=1e-3, attacked="classifier",
    )  # fmt: skip
    step = FinetuneStep(Defense(RT, purifier, classifier), None, config, seed=3)
    step.progress.fill_(0.25)
    ids = torch.arange(12)
    adversarial = step.attack(X, Y, ids, 7)
    logs = step(X, Y, ids, 7)

    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3, betas=(0.5, 0.999))
    seed, cross_entropy = derive_seed(3, "transform"), torch.nn.functional.cross_entropy
    l1, ce = [], []
    for x in (adversarial, X) if clean_weight else (adversarial,):
        purified = theirs(RT(x, seed, ids, 7))
        wanted = X if target == "clean" else x
        l1.append((purified - (2 * wanted - 1)).abs().mean())
        ce.append(cross_entropy(classifier((purified + 1) / 2), Y))
    loss = 0.7 * sum(l1) / len(l1) + 1.3 * ce[0] + (clean_weight * ce[1] if clean_weight else 0)
    loss.backward()
    optimizer.step()
    assert logs["l1"].item() == pytest.approx(sum(l1).item() / len(l1), rel=1e-5)
    assert logs["ce"].item() == pytest.approx(ce[0].item(), rel=1e-5)
    assert ("clean_ce" in logs) == ("clean_accuracy" in logs) == (clean_weight > 0)
    for name, value in purifier.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("betas", [(0.5, 0.999), (0.5, 0.95)])
def test_betas_say_how_long_the_update_after_a_sudden_gradient_is(betas):
    """(1 - b1) / sqrt(1 - b2) learning rates, up to Adam's correction for its zero start."""
    purifier, _, _ = networks()
    step = PretrainStep(RT, purifier, None, PretrainConfig(gan_weight=0, lr=1e-3, betas=betas), seed=3)
    weight = purifier.to_image.weight
    for gradient in [1e-4] * 200 + [1.0]:
        before = weight.detach().clone()
        step.update(gradient * sum(p.sum() for p in purifier.parameters()), "purifier")
    moved = ((weight - before).abs().max() / 1e-3).item()
    assert moved == pytest.approx((1 - betas[0]) * ((1 - betas[1] ** 201) / (1 - betas[1])) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("betas", [(0.5,), (0.5, 1.0), (-0.1, 0.9)])
def test_wrong_betas_are_named(betas):
    with pytest.raises(ValueError, match=r"PretrainConfig: betas must be two numbers in \[0, 1\)"):
        PretrainConfig(betas=betas)


def test_the_l1_weight_changes_linearly_over_the_updates():
    seen = []

    class Watched(FinetuneStep):
        def losses(self, *args):
            seen.append(float(self.l1_weight()))
            return super().losses(*args)

    purifier, _, classifier = networks()
    config = FinetuneConfig(epochs=2, batch_size=6, gan_weight=0, attacked="classifier", l1_weight=1.0, l1_final=0.2)
    fit(
        "test",
        Watched(Defense(RT, purifier, classifier), None, config, 0),
        Feed("test", X, Y, X.device),
        seed=0,
        **QUIET,
    )
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_a_share_of_the_images_is_attacked_another_one_in_every_epoch():
    purifier, _, classifier = networks()
    config = FinetuneConfig(adversarial_share=0.5, attacked="classifier", gan_weight=0)
    step = FinetuneStep(Defense(RT, purifier, classifier), None, config, seed=0)
    x, ids = X[:1].repeat(400, 1, 1, 1), torch.arange(400)
    attacked = [(step.attack(x, Y[:1].repeat(400), ids, e) != x).flatten(1).any(1) for e in (0, 1)]
    assert 160 < attacked[0].sum() < 240
    assert 140 < (attacked[0] != attacked[1]).sum() < 260
    subset = step.attack(x[5:9], Y[:1].repeat(4), ids[5:9], 0)
    assert torch.equal((subset != x[5:9]).flatten(1).any(1), attacked[0][5:9])


def test_training_does_not_touch_the_global_generator():
    purifier, discriminator, classifier = networks()
    state = torch.get_rng_state()
    config = FinetuneConfig(epochs=1, batch_size=6, attack="pgd", steps=2)
    finetune(Defense(RT, purifier, classifier), X, Y, discriminator=discriminator, config=config, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, stop_at):
    """Stopped in some step of some epoch; the second call has fresh networks and only the checkpoint."""
    config = FinetuneConfig(epochs=3, batch_size=5, eps=0.1, attack="pgd", steps=2)

    def run(checkpoint=None, fail_at=None):
        purifier, discriminator, classifier = networks()
        calls = 0

        def hook(module, args):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise KeyboardInterrupt

        discriminator.register_forward_pre_hook(hook)
        defense = Defense(RT, purifier, classifier)
        options = {"discriminator": discriminator, "config": config, "checkpoint": checkpoint, **QUIET}
        return finetune(defense, X, Y, **options), weights(purifier), weights(discriminator)

    whole = run()
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        # Two discriminator passes a step, three steps an epoch.
        run(path, fail_at=2 * stop_at + 1)
    history, purifier, discriminator = run(path)
    assert history == whole[0]
    assert equal(purifier, whole[1])
    assert equal(discriminator, whole[2])
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_seed_repeats_and_changes_the_run():
    def run(seed):
        purifier, _, _ = networks()
        pretrain(purifier, RT, X, config=PretrainConfig(epochs=1, batch_size=5), seed=seed, **QUIET)
        return weights(purifier)

    assert equal(run(0), run(0))
    assert not equal(run(0), run(1))


def test_foreign_and_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "run.pt"

    def run(epochs, images=X, transform=RT, purifier=None):
        purifier = networks()[0] if purifier is None else purifier
        config = PretrainConfig(epochs=epochs, batch_size=6, gan_weight=0)
        pretrain(purifier, transform, images, config=config, checkpoint=path, **QUIET)

    run(1)
    saved = path.read_bytes()
    purifier, _, _ = networks()
    torch.nn.init.normal_(purifier.to_image.weight)
    for call, other in (
        (lambda: run(2), "epochs"),
        (lambda: run(1, X.flip(3) ** 2), "data"),
        (lambda: run(1, transform=RT2(4, sigma=0.2)), "transform"),
        (lambda: run(1, purifier=purifier), "initial purifier"),
        (lambda: run(2, X.flip(3) ** 2), "data, epochs"),
    ):
        pattern = rf"checkpoint must be a checkpoint of this run .*belongs to a run with another {other}$"
        with pytest.raises(ValueError, match=pattern):
            call()
    path.write_bytes(saved[: len(saved) // 2])
    with pytest.raises(ValueError, match="checkpoint must be a checkpoint of this run"):
        run(1)
    assert path.read_bytes() == saved[: len(saved) // 2]


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (lambda: PretrainConfig(epochs=-1), ValueError, "PretrainConfig: epochs must be an integer and >= 0, got -1"),
        (lambda: PretrainConfig(precision="half"), ValueError, "precision must be one of 'float32', .* got 'half'"),
        (lambda: FinetuneConfig(eps=-1), ValueError, "FinetuneConfig: eps must be finite and >= 0, got -1"),
        (
            lambda: FinetuneConfig(norm="L2"),
            ValueError,
            "FinetuneConfig: eps must be given with the norm L2, as the default is a radius in Linf, got 0.03137",
        ),
        (
            lambda: FinetuneConfig(epochs=3, ce_from_epoch=3),
            ValueError,
            "FinetuneConfig: ce_from_epoch must be below epochs 3, or no update has the classification losses, got 3",
        ),
        (lambda: FinetuneConfig(target="x"), ValueError, "target must be one of 'adversarial', 'clean', got 'x'"),
        (lambda: pretrain(networks()[0], RT, X * 2), ValueError, r"pretrain: images must be in \[0, 1\]"),
        (
            lambda: finetune(Defense(RT, None, networks()[2]), X, Y),
            ValueError,
            "finetune: defense must be a Defense with a purifier, got one without",
        ),
        (
            lambda: pretrain(torch.nn.Conv2d(3, 2, 1), RT, X),
            ValueError,
            r"Conv2d: output must be of shape \(1, 1, 16, 16\), got \(1, 2, 16, 16\)",
        ),
        (
            lambda: pretrain(torch.nn.Identity(), RT, X),
            ValueError,
            "PretrainStep: purifier must be a module with parameters, got Identity",
        ),
        (
            lambda: finetune(Defense(RT, networks()[0], build_classifier("small_cnn", channels=3)), X, Y),
            ValueError,
            r"finetune: images must be images that the networks take, got \(1, 16, 16\) \(",
        ),
        (lambda: pretrain(networks()[0], RT, X[:0]), ValueError, "pretrain: images must be at least one, got none"),
        (lambda: pretrain(networks()[0], RT2(5), X), ValueError, "RT2: x must be of a height and width divisible by"),
        (lambda: train_classifier(networks()[2], X, Y[:3]), ValueError, "train_classifier: labels must be of shape"),
    ],
)
def test_wrong_input_is_named(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()


def test_images_with_a_graph_train_as_their_values():
    """The first backward pass freed it, and the second update failed."""

    def run(images):
        purifier, _, classifier = networks()
        config = FinetuneConfig(epochs=1, batch_size=6, gan_weight=0, clean_weight=1.0)
        return finetune(Defense(RT, purifier, classifier), images, Y, config=config, **QUIET)

    assert run(X.clone().requires_grad_().clamp(0, 1)) == run(X)


class Dimmed(RandomTransform):
    """A transform that says nothing about its option."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x, seed=0, sample_ids=None, draw=0):
        plane = torch.zeros_like(x[:, :1])
        return torch.cat((self.factor * (2 * x - 1), 1 + plane, plane), dim=1)

    def target(self, x, seed=0, sample_ids=None, draw=0):
        return 2 * x - 1


@pytest.mark.parametrize("other", ["normalization", "layer", "transform"])
def test_what_no_state_dict_has_is_a_part_of_a_trainings_identity(other, tmp_path):
    """A training with another normalization, or another transform, took the finished weights of the earlier one."""
    purifier, _, classifier = networks()
    given = {"classifier": Normalized(classifier, [0.5], [0.3]).eval(), "transform": Dimmed(0.5)}
    changed = (
        given
        | {
            "normalization": {"classifier": Normalized(classifier, [0.4], [0.3]).eval()},
            "layer": {"classifier": nn.Sequential(classifier, nn.Softsign()).eval()},
            "transform": {"transform": Dimmed(0.4)},
        }[other]
    )

    def run(parts):
        config = FinetuneConfig(epochs=1, batch_size=6, gan_weight=0)
        defense = Defense(parts["transform"], copy.deepcopy(purifier), parts["classifier"])
        return finetune(defense, X, Y, config=config, checkpoint=tmp_path / "run.pt", **QUIET)

    assert run(given) == run(given)
    part = "transform" if other == "transform" else "classifier"
    with pytest.raises(ValueError, match=f"belongs to a run with another {part}$"):
        run(changed)


def test_deepcopied_purifiers_train_alike():
    """Fine-tuning two copies with one seed gives one result: no hidden state in the modules."""
    purifier, _, classifier = networks()
    results = []
    for _ in range(2):
        copied = copy.deepcopy(purifier)
        config = FinetuneConfig(epochs=1, batch_size=6, gan_weight=0, eps=0.1)
        finetune(Defense(RT, copied, classifier), X, Y, config=config, **QUIET)
        results.append(weights(copied))
    assert equal(*results)


@pytest.mark.parametrize(("channels", "laid_out"), [(4, False), (8, True)])
def test_narrow_strided_convolutions_stay_contiguous(channels, laid_out):
    """oneDNN's weight gradient of them writes beyond its memory in channels_last, and the process dies later."""
    convolution = nn.Conv2d(channels, 8, 1, stride=2)
    network = nn.Sequential(nn.Conv2d(3, channels, 3), convolution, nn.Flatten(), nn.LazyLinear(2))
    network(torch.rand(1, 3, 8, 8))
    ClassifierStep(network, ClassifierConfig(), 0)
    weight = network[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == laid_out
    assert weight.is_contiguous() != laid_out
