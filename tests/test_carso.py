"""CARSO: its formulas, its draws, its gradient, the training of its purifier, its files and its row of the table."""

from __future__ import annotations

import json
import struct

import pytest
import torch
import torch.nn.functional as F
from small_task import places, trained_classifier
from torch import nn
from torch.distributions import Normal, kl_divergence

from atop_fast import Defense, build_classifier, judge, load_defense, save_defense
from atop_fast.classifiers import Normalized
from atop_fast.defenses import CARSO, GaussianNoise
from atop_fast.defenses.carso import vote
from atop_fast.defenses.judge import Effort, strongest
from atop_fast.defenses.own import find
from atop_fast.ops import random_normal
from atop_fast.randomness import derive_seed, seeded, watched_generators
from atop_fast.training.carso import CARSOConfig, CARSOStep, divergence, train_carso
from atop_fast.training.nfgsm import NFGSM

X, Y = places(12, seed=5)
IDS, DRAWS = torch.arange(12) + 40, torch.arange(12) % 5
SMALL = {"condition": 12, "latent": 6, "width": 4}


def classifier():
    with seeded(0):
        return build_classifier("small_cnn", channels=1, classes=4, width=4).eval()


def untrained(model, votes=3, shape=(1, 16, 16)):
    """A CARSO whose recalled images differ."""
    with seeded(1):
        carso = CARSO(model, shape, votes, **SMALL)
        # Statistics that are not those of the initialization, and images that are not all gray.
        for part in carso.purifier.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.uniform_(-0.1, 0.1)
                part.running_var.uniform_(0.05, 0.2)
    return carso.eval()


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_divergence_is_that_of_normal_distributions():
    mean, log_variance = numbers(1, 5, 7), numbers(2, 5, 7)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(divergence(mean, log_variance), expected, rtol=1e-12, atol=0)


def test_the_vote_orders_classes_as_the_papers():
    logits = 3 * numbers(3, 200, 8, 10)
    theirs = logits.exp().sum(dim=1)
    torch.testing.assert_close(vote(logits).exp(), theirs / 8, rtol=1e-12, atol=0)
    # The paper's probabilities, for logits at which they are not 0 and 1.
    small = logits / 6
    torch.testing.assert_close(
        (8 * vote(small).exp()).softmax(dim=1), small.exp().sum(dim=1).softmax(dim=1), rtol=1e-9, atol=0
    )
    assert torch.equal(vote(logits.float()).argsort(dim=1), theirs.argsort(dim=1))
    torch.testing.assert_close(vote(logits[:, :1]), logits[:, 0])


def test_a_confident_vote_has_a_gradient():
    """The doubly exponential vote has none in float32."""
    logits = torch.tensor([[[12.0, 2.0, 1.0], [11.0, 3.0, 0.0]]], requires_grad=True)
    label = torch.tensor([0])
    (saturated,) = torch.autograd.grad(F.cross_entropy(logits.exp().sum(dim=1), label), logits)
    (ours,) = torch.autograd.grad(F.cross_entropy(vote(logits), label), logits)
    assert not saturated.any()
    assert (ours != 0).all()
    assert vote(1e4 * logits).isfinite().all()


def test_the_features_are_the_outputs_of_all_convolutions():
    model, outputs = classifier(), []
    handles = [conv.register_forward_hook(lambda m, x, y: outputs.append(y)) for conv in (model.conv1, model.conv2)]
    carso = untrained(model)
    outputs.clear()
    found = carso.features(X)
    for handle in handles:
        handle.remove()
    assert [tuple(h.shape) for h in found] == [(12, *layer) for layer in carso.layers]
    assert len(found) == 3
    assert len(outputs) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=False))


def test_logits_are_those_of_the_formula():
    model = classifier().double()
    carso, x = untrained(model).double(), X[:3].double()
    ids, purifier = torch.tensor([7, 2, 9]), carso.purifier
    logits = carso(x, 5, ids, 1)
    noise = random_normal((3, 6), derive_seed(5, "carso"), ids, 1).double()
    h, features = 2 * x - 1, []
    for conv in (model.conv1, model.conv2, model.conv3):
        features.append(F.conv2d(h, conv.weight, conv.bias, 2, conv.padding))
        h = F.relu(features[-1])
    for i in range(3):
        total = torch.zeros(4, dtype=torch.float64)
        for k in range(3):
            z, c = noise[i : i + 1, k], purifier.compress([h[i : i + 1] for h in features])
            image = 1 / (1 + (-purifier.decode(z, c)).exp())
            assert image.shape == (1, 1, 16, 16)
            total += model(image)[0].exp()
        torch.testing.assert_close(logits[i], (total / 3).log(), rtol=0, atol=1e-10)


def test_draws_belong_to_the_sample():
    whole = Defense(GaussianNoise(0), None, untrained(classifier())).eval()
    with watched_generators() as generators, torch.no_grad():
        logits = whole(X, 7, IDS, DRAWS)
        alone = torch.cat([whole(X[i : i + 1], 7, IDS[i : i + 1], int(DRAWS[i])) for i in range(12)])
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        shuffled = whole(X[order], 7, IDS[order], DRAWS[order])
        other = [whole(X, 8, IDS, DRAWS), whole(X, 7, IDS + 1, DRAWS), whole(X, 7, IDS, DRAWS + 1)]
    assert not generators.drawn
    torch.testing.assert_close(alone, logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(shuffled, logits[order], rtol=0, atol=1e-6)
    assert all((logits - each).abs().amax(dim=1).min() > 1e-5 for each in other)


def test_the_latent_variables_are_not_the_numbers_of_the_noise_in_front():
    carso = untrained(classifier())
    key = (torch.tensor(7), IDS, torch.tensor(3))
    z = []
    decode = carso.purifier.decode
    carso.purifier.decode = lambda numbers, condition: (z.append(numbers), decode(numbers, condition))[1]
    with torch.no_grad():
        carso.recall(carso.features(X), key)
    latent = z[0].reshape(12, -1)
    noise = (GaussianNoise(1.0)(torch.zeros_like(X), 7, IDS, 3)).flatten(1)[:, : latent.shape[1]]
    assert abs(torch.corrcoef(torch.stack([latent.flatten(), noise.flatten()]))[0, 1]) < 0.3


def test_gradcheck():
    carso = untrained(classifier(), 2, (1, 8, 8)).double()
    x = X[:1, :, 4:12, 4:12].double().requires_grad_()
    (gradient,) = torch.autograd.grad(carso(x, 4, draw=2)[:, 0].sum(), x)
    # The gradient of this small, untrained network becomes about 1.
    scale = 1 / float(gradient.abs().max())
    assert torch.autograd.gradcheck(lambda x: scale * carso(x, 4, draw=2), x, eps=1e-7, atol=1e-3)


def test_the_loss_is_that_of_the_formula():
    """The first half of the batch is adversarial, the target is clean, and KL comes late."""
    model = classifier()
    carso, config = untrained(model), CARSOConfig(lr=0, beta=0.7, eps=0.1)
    for p in model.parameters():
        p.requires_grad_(False)
    step = CARSOStep(carso, config, 3, X[:1])
    step.prepare(2)
    key = derive_seed(derive_seed(3, "attack"), 2)
    attacked = Defense(GaussianNoise(0), None, model)
    seen = torch.cat((NFGSM(attacked, 0.1, gradient="blind", seed=key)(X[:6], Y[:6], IDS[:6]), X[6:]))
    assert 0.1 < (seen - X)[:6].abs().max() <= 0.3 + 1e-6
    noise = random_normal((6,), derive_seed(3, "latent"), IDS, 2)
    carso.purifier.train()
    with torch.no_grad():
        logits, mean, log_variance = carso.purifier(seen, carso.features(seen), noise)
        p = logits.double().sigmoid()
        bce = -(X * p.log() + (1 - X) * (1 - p).log()).sum(dim=(1, 2, 3)).mean()
        kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(dim=1).mean()
    assert kl > 1e-3
    for done, weight in ((0.0, 0.0), (1 / 8 + 1 / 48, 0.35), (0.5, 0.7)):
        step.progress.fill_(done)
        logs = step(X, Y, IDS, 2)
        assert float(logs["bce"]) == pytest.approx(float(bce), rel=1e-5)
        assert float(logs["kl"]) == pytest.approx(float(kl), rel=1e-4)
        assert float(logs["loss"]) == pytest.approx(float(bce + weight * kl), rel=1e-5)


@pytest.mark.parametrize(("share", "parts", "expected"), [(0.2, 6, 2), (0.5, 5, 6), (0.5, 1, 6), (0, 4, 0), (1, 3, 12)])
def test_the_attacked_share_is_one_of_the_whole_batch(share, parts, expected, monkeypatch):
    """However many parts accumulate; of parts of two images, a share of 0.2 rounded to none."""
    attacked = []

    def recorded(attacker, seed, x, y, ids):
        attacked.extend(ids.tolist())
        return x

    monkeypatch.setattr("atop_fast.training.carso.run_attack", recorded)
    config = CARSOConfig(lr=0, adversarial_share=share, accumulate=parts)
    step = CARSOStep(untrained(classifier()), config, 3, X[:1])
    step(X, Y, IDS, 0)
    step(X, Y, IDS, 1)
    assert len(attacked) == 2 * expected
    assert attacked[:expected] == attacked[expected:]


def test_building_leaves_the_statistics_of_a_classifier_in_training_mode():
    """An image of zeros counted in them."""
    with seeded(0):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    CARSO(model, (1, 16, 16), **SMALL)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="session")
def trained():
    """A CARSO of the small task, and the history of its training."""
    with seeded(0):
        carso = CARSO(trained_classifier(), (1, 16, 16), 4, condition=32, latent=8, width=8)
    config = CARSOConfig(epochs=12, batch_size=32, lr=3e-3, eps=0.05, evaluate_every=12)
    before = [p.clone() for p in carso.model.parameters()]
    history = train_carso(carso, *places(512, seed=1), config=config, held_out=places(128, seed=9), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(carso.model.parameters(), before, strict=True))
    assert all(p.requires_grad for p in carso.model.parameters())
    assert not carso.purifier.training
    return carso, history


@pytest.mark.slow
def test_training_learns_to_recall(trained):
    carso, history = trained
    assert history[-1]["bce"] < 0.9 * history[0]["bce"]
    assert history[-1]["held_out_accuracy"] > 0.9
    # Nearer to the images than the mean of all, and different in each draw.
    x, y = places(64, seed=10)
    with torch.no_grad():
        recalled = carso.recall(carso.features(x), carso.key(x, 0))
        assert (carso(x, 0).argmax(dim=1) == y).float().mean() > 0.9
    mean = places(512, seed=1)[0].mean(dim=0)
    # The noise of the images, half of their variance, cannot be recalled.
    assert (recalled.mean(dim=1) - x).square().mean() < 0.75 * (mean - x).square().mean()
    assert recalled.std(dim=1).mean() > 1e-5


@pytest.mark.parametrize("updates", [1, 4])
def test_a_stopped_training_resumes_to_the_same_bits(updates, tmp_path, monkeypatch):
    config = CARSOConfig(epochs=2, batch_size=5, average="ema", ema_decay=0.5)

    def run(path):
        with seeded(2):
            carso = CARSO(classifier(), (1, 16, 16), 2, **SMALL)
        history = train_carso(carso, X, Y, config=config, checkpoint=path, checkpoint_minutes=0, progress=False)
        return history, carso.purifier.state_dict()

    history, whole = run(tmp_path / "whole.pt")
    losses, seen = CARSOStep.losses, []

    def failing(self, *args):
        seen.append(1)
        if len(seen) > updates:
            raise KeyboardInterrupt
        return losses(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(CARSOStep, "losses", failing)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut.pt")
    again, resumed = run(tmp_path / "cut.pt")
    assert again == history
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_file_gives_the_defense_back(tmp_path):
    path = tmp_path / "carso.safetensors"
    model = Normalized(classifier(), [0.4], [0.3]).eval()
    given = Defense(GaussianNoise(0), None, untrained(model)).eval()
    save_defense(path, given)
    loaded = load_defense(path)
    with torch.no_grad():
        assert torch.equal(loaded(X, draw=5), given(X, draw=5))
    assert repr(loaded) == repr(given)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    for change, words in (
        ({"width": 10**9}, "no option of so few"),
        ({"layers": None}, "TypeError"),
        ({"latent": 7}, "size mismatch"),
        ({"votes": 10**6}, "votes"),
    ):
        text = json.loads(header["__metadata__"]["atop_fast"])
        text["classifier"]["options"] |= change
        changed = {**header, "__metadata__": {"atop_fast": json.dumps(text)}}
        raw = json.dumps(changed).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + size :])
        with pytest.raises(ValueError, match=f"load_defense: path_or_name must be a whole defense .*{words}"):
            load_defense(path)


@pytest.mark.slow
def test_a_trained_file_is_a_row_of_the_table(trained, tmp_path):
    model = classifier()
    save_defense(tmp_path / "carso.safetensors", Defense(GaussianNoise(0), None, untrained(model)))
    name, build = find(str(tmp_path / "carso.safetensors"))
    defense = build(model, (1, 16, 16)).eval()
    effort = Effort(eps=0.1, steps=2, n_queries=5, draws=2)
    attacks = strongest(defense, effort, random=True)
    assert set(attacks) == {"exact", "blind", "square"}
    assert attacks["blind"].model is defense.classifier.model
    row = judge(defense, X[:2], Y[:2], out=tmp_path / "row", name=name, rules=["rand"], effort=effort, progress=False)
    assert (row["defense"], row["model"]) == ("carso", "CARSO(votes=3)")
    with seeded(1):
        other = build_classifier("small_cnn", channels=1, classes=4, width=4)
    with pytest.raises(ValueError, match="whose classifier has other weights"):
        build(other, (1, 16, 16))
    with pytest.raises(ValueError, match="judge: defense must be a file that train_carso and save_defense made"):
        find("carso")


def test_another_classifier_behind_the_same_purifier_is_refused():
    carso = untrained(classifier())
    with seeded(0):
        carso.model = build_classifier("small_cnn", channels=1, classes=4, width=5).eval()
    with pytest.raises(ValueError, match=r"CARSO: model must be the classifier whose convolutions give \[\(4, 8, 8\)"):
        carso(X)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: CARSO(classifier(), (1, 12, 16)), r"CARSO: shape must be \(C, H, W\), H and W divisible by 8"),
        (lambda: CARSO(classifier(), (1, 16, 16), votes=0), "CARSO: votes must be an integer and in"),
        (lambda: CARSO(nn.Flatten(), (1, 16, 16)), "CARSO: model must be a network that calls one of conv2d"),
        (lambda: CARSO(classifier(), (1, 16, 16), layers=[]), "CARSO: layers must be some of"),
        (lambda: CARSO(classifier(), (1, 16, 16), latent=0), "ConditionalVAE: latent must be"),
        (lambda: untrained(classifier())(X[:, :, :8]), r"CARSO: x must be of shape \(B, 1, 16, 16\), got \(12, 1, 8"),
        (lambda: CARSOConfig(beta=-1), "CARSOConfig: beta must be finite and >= 0, got -1"),
        (lambda: CARSOConfig(adversarial_share=2), "CARSOConfig: adversarial_share must be"),
        (lambda: train_carso(untrained(classifier()), X), "train_carso: labels must be given"),
        (lambda: train_carso(untrained(classifier()), X, Y + 3, progress=False), "class indices in"),
        (
            lambda: train_carso(untrained(classifier()), X, Y, config=CARSOConfig(batch_size=11), progress=False),
            "fit: batch_size must be such that every pass has two images",
        ),
    ],
)
def test_bad_arguments_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_only_a_carso_is_trained():
    with pytest.raises(TypeError, match="train_carso: carso must be a CARSO, got Places"):
        train_carso(trained_classifier(), X, Y)
