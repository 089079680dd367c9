"""The attacks of torchattacks, foolbox, pyautoattack and ART on our models, and ours on models that they hold."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atop_fast import FGSM, PGD, RT2, Defense, build_classifier, build_purifier
from atop_fast.attacks import APGD, APGDT, CW, FAB, MIFGSM, PMA, AutoAttack, Square, StAdv
from atop_fast.randomness import seeded

# The other packages emit warnings of their own on import and in use.
pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (Path(__file__).parent.parent / "docs" / "interoperability.md").read_text(encoding="utf-8")
SETUP, *SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
EPS, COUNT = 0.2, 12
MEAN, STD = 0.1, 0.3


def torchattacks_pgd(model, images, labels):
    torchattacks = pytest.importorskip("torchattacks")
    return torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=8)(images, labels)


def torchattacks_eotpgd(model, images, labels):
    torchattacks = pytest.importorskip("torchattacks")
    return torchattacks.EOTPGD(model, eps=EPS, alpha=EPS / 4, steps=8, eot_iter=2)(images, labels)


def foolbox_pgd(model, images, labels):
    foolbox = pytest.importorskip("foolbox")
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=images.device)
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=EPS / 4, steps=8)
    return attack(wrapped, images, labels, epsilons=EPS)[1]


def pyautoattack_apgd(model, images, labels):
    pyautoattack = pytest.importorskip("pyautoattack")
    attack = pyautoattack.AutoAttack(model.eval(), norm="Linf", eps=EPS, version="custom", attacks=["apgd-ce"])
    attack.apgd.n_iter, attack.apgd.eot_iter = 8, 2
    return attack.run_standard_evaluation(images, labels, batch_size=len(images))[0]


def art_pgd(model, images, labels):
    estimator = art_classifier(model, images)
    evasion = pytest.importorskip("art.attacks.evasion")
    attack = evasion.ProjectedGradientDescent(estimator, eps=EPS, eps_step=EPS / 4, max_iter=8, verbose=False)
    return torch.from_numpy(attack.generate(images.numpy(), y=labels.numpy()))


def art_classifier(model, images, **options):
    """A model as ART holds it."""
    pytorch = pytest.importorskip("art.estimators.classification.pytorch")
    loss = nn.CrossEntropyLoss()
    shape = tuple(images.shape[1:])
    return pytorch.PyTorchClassifier(
        model, loss, shape, nb_classes=10, clip_values=(0, 1), device_type="cpu", **options
    )


THEIRS = [torchattacks_pgd, torchattacks_eotpgd, foolbox_pgd, pyautoattack_apgd, art_pgd]


def by_keywords(attack):
    """An attack whose norm is a keyword, as attack(model, norm, eps)."""
    return lambda model, norm, eps: attack(model, norm=norm, eps=eps)


# Our attacks (model, norm, eps) with their norms, and how many of the images they must fool.
OURS = {
    "FGSM": (by_keywords(FGSM), ("Linf", "L2"), 0.4),
    "PGD": (by_keywords(partial(PGD, steps=8)), ("Linf", "L2"), 0.9),
    "MIFGSM": (by_keywords(partial(MIFGSM, steps=8)), ("Linf",), 0.9),
    "PMA": (partial(PMA, steps=8), ("Linf", "L2"), 0.9),
    "APGD": (partial(APGD, steps=8), ("Linf", "L2"), 0.9),
    "APGDT": (partial(APGDT, steps=8, target_classes=2), ("Linf", "L2"), 0.9),
    "FAB": (partial(FAB, steps=8, target_classes=2), ("Linf", "L2"), 0.9),
    "Square": (partial(Square, n_queries=40), ("Linf", "L2"), 0.4),
    "AutoAttack": (partial(AutoAttack, steps=4, n_queries=16), ("Linf", "L2"), 0.9),
    "CW": (by_keywords(partial(CW, c=100, steps=40, lr=0.1)), ("L2",), 0.7),
    "StAdv": (lambda model, norm, eps: StAdv(model, bound=0.1, steps=8), ("flow",), 0.4),
}
EPS_OF = {"Linf": EPS, "L2": 3.0, "flow": None}


@pytest.fixture(autouse=True)
def _global_generator():
    """The other packages seed torch's global generator."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.fixture(scope="module")
def digits():
    """Digits that the standard network classifies correctly."""
    data = models.mnist()
    with torch.no_grad():
        right = models.standard_mnist()(data.images).argmax(dim=1) == data.labels
    return data.take(right.nonzero()[:COUNT, 0])


@pytest.fixture
def defense():
    with seeded(0):
        purifier = build_purifier("unet", channels=1, width=4).eval()
    return Defense(RT2(8, 0.1, sigma=0.1), purifier, models.standard_mnist()).eval()


def fooled(model, images, labels):
    with torch.no_grad():
        return (model(images).argmax(dim=1) != labels).float().mean()


def check_ball(adversarial, images):
    assert adversarial.shape == images.shape
    assert (adversarial - images).abs().max() <= EPS + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@pytest.mark.parametrize("attack", THEIRS, ids=lambda attack: attack.__name__)
def test_their_attacks_fool_our_classifier(attack, digits):
    adversarial = attack(models.standard_mnist(), digits.images, digits.labels)
    check_ball(adversarial, digits.images)
    assert fooled(models.standard_mnist(), adversarial, digits.labels) > 0.9


@pytest.mark.parametrize("attack", THEIRS, ids=lambda attack: attack.__name__)
def test_their_attacks_take_a_defense(attack, digits, defense):
    def loss(images):
        key = (9, torch.arange(COUNT).repeat(8), torch.arange(8).repeat_interleave(COUNT))
        with torch.no_grad():
            return F.cross_entropy(defense(images.repeat(8, 1, 1, 1), *key), digits.labels.repeat(8))

    before = {name: value.clone() for name, value in defense.state_dict().items()}
    draws, state = int(defense.draw), torch.get_rng_state()
    defense(digits.images)
    assert torch.equal(torch.get_rng_state(), state)
    adversarial = attack(defense, digits.images, digits.labels)
    check_ball(adversarial, digits.images)
    # More than noise of the same size does: the gradients flow through transform and purifier.
    noise = (digits.images + EPS * torch.randn_like(digits.images).sign()).clamp(0, 1)
    assert loss(adversarial) > loss(noise) + 0.5
    assert int(defense.draw) > draws + 8, "an attack of 8 steps sees as many draws"
    assert not any(module.training for module in defense.modules())
    assert all(parameter.requires_grad for parameter in defense.parameters())
    assert all(torch.equal(value, before[name]) for name, value in defense.state_dict().items())


HOLDERS = ("foolbox", "foolbox-preprocessing", "torchattacks-normalized", "art", "art-preprocessing")


@pytest.fixture
def held(request, digits):
    """A classifier as another package holds it, as a callable from images in [0, 1]."""
    network = models.standard_mnist()
    normalized = Denormalized(network).eval()
    match request.param:
        case "foolbox":
            return pytest.importorskip("foolbox").PyTorchModel(network, bounds=(0, 1), device="cpu")
        case "foolbox-preprocessing":
            preprocessing = {"mean": [MEAN], "std": [STD], "axis": -3}
            foolbox = pytest.importorskip("foolbox")
            return foolbox.PyTorchModel(normalized, bounds=(0, 1), device="cpu", preprocessing=preprocessing)
        case "torchattacks-normalized":
            return lambda x: normalized((x - MEAN) / STD)
        case "art":
            return art_classifier(network, digits.images).model
        case "art-preprocessing":
            estimator = art_classifier(normalized, digits.images, preprocessing=(MEAN, STD))
            return lambda x: estimator.model((x - MEAN) / STD)


class Denormalized(nn.Module):
    """A network that expects images normalized outside of it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x * STD + MEAN)


# Every attack on the model held in the most roundabout way, and one attack on all.
PAIRS = [(name, norm, HOLDERS[-1]) for name, (_, norms, _) in OURS.items() for norm in norms]
PAIRS += [("PGD", "Linf", holder) for holder in HOLDERS[:-1]]


@pytest.mark.parametrize(("name", "norm", "held"), PAIRS, indirect=["held"])
def test_our_attacks_take_their_models(name, norm, held, digits):
    attack, _, share = OURS[name]
    adversarial = attack(held, norm, EPS_OF[norm])(digits.images, digits.labels)
    delta = (adversarial - digits.images).flatten(1)
    if norm != "flow":
        assert delta.norm(p=torch.inf if norm == "Linf" else 2, dim=1).max() <= EPS_OF[norm] * (1 + 1e-5)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert fooled(held, adversarial, digits.labels) > share
    # Normalizing and back rounds, and the sign of a gradient near 0 can turn; Adam makes steps of any gradient.
    turned = 0.06 if name == "StAdv" else 0.02
    direct = attack(models.standard_mnist(), norm, EPS_OF[norm])(digits.images, digits.labels)
    assert ((adversarial - direct).abs() > 1e-4).float().mean() < turned


def test_normalized_model_as_torchattacks_attacks_it(digits):
    torchattacks = pytest.importorskip("torchattacks")
    normalized = Denormalized(models.standard_mnist()).eval()
    attack = torchattacks.PGD(normalized, eps=EPS, alpha=EPS / 4, steps=4, random_start=False)
    attack.set_normalization_used(mean=[MEAN], std=[STD])
    theirs = attack((digits.images - MEAN) / STD, digits.labels) * STD + MEAN
    ours = PGD(lambda x: normalized((x - MEAN) / STD), EPS, alpha=EPS / 4, steps=4, random_start=False)
    assert ((ours(digits.images, digits.labels) - theirs).abs() > 1e-4).float().mean() < 0.02


def test_art_predicts_what_the_network_predicts(digits):
    predicted = torch.from_numpy(art_classifier(models.standard_mnist(), digits.images).predict(digits.images.numpy()))
    with torch.no_grad():
        torch.testing.assert_close(predicted, models.standard_mnist()(digits.images))


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.split()[1])
def test_snippets_of_the_page_run(snippet, tmp_path, monkeypatch):
    for package in re.findall(r"^(?:import|from) (\w+)", snippet, re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.setattr("atop_fast.mnist5k", models.all_digits)
    monkeypatch.chdir(tmp_path)
    if "checkpoint.pt" in snippet:
        torch.save(build_classifier("resnet18").state_dict(), "checkpoint.pt")
    names = {}
    exec(SETUP, names)
    exec(snippet, names)
    if "adversarial" in names:
        distance = (names["adversarial"] - names["images"]).abs().max()
        assert distance <= 8 / 255 + 1e-6
        # The untrained network is wrong in every draw that pyautoattack looks at first.
        assert distance > 0 or "pyautoattack" in snippet
    elif "first" in names:
        torch.testing.assert_close(names["first"], names["second"])
    else:
        assert names["model"](torch.rand(2, 3, 32, 32)).shape == (2, 10)
