"""Attacks and updates must not copy from the host or synchronize, as CUDA graphs cannot capture that. Needs no GPU.

Everything runs on the meta device, whose tensors have no values, so that reading one is an error; a detector refuses
operators that would copy from the host. As before a capture, a first run without the detector builds cached tables.
"""

from __future__ import annotations

import contextlib
import importlib
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atop_fast import RT1, RT2, RT3, Defense, FinetuneConfig, attacks, build_classifier, build_purifier
from atop_fast.attacks import square
from atop_fast.attacks.queue import Batch
from atop_fast.attacks.replay import Replays
from atop_fast.ops import _registry
from atop_fast.purifiers import SNPatchDiscriminator
from atop_fast.recipes import schema
from atop_fast.training import ClassifierConfig, ClassifierStep, FinetuneStep, PretrainStep
from atop_fast.training.step import Step, run_attack

META = torch.device("meta")
aten = torch.ops.aten
# Operators whose results have shapes or numbers that depend on values.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2}


class Detector(TorchDispatchMode):
    """Refuses operators that copy from the host to the device, or wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = [t.device == META for t in (*given, *tree_leaves(result)) if isinstance(t, torch.Tensor)]
        if not any(on_device):
            return result
        if func.overloadpacket in WAITS:
            raise AssertionError(f"{func} waits for the device")
        copies = func.overloadpacket in (aten._to_copy, aten.copy_)
        # Kernels take single numbers from the host by value.
        if any(t.device != META and (t.dim() or copies) for t in given):
            raise AssertionError(f"{func} copies from the host")
        return result


@contextlib.contextmanager
def detected(monkeypatch):
    """The detector, also of tensors that are made of the host's numbers, which no mode sees."""

    def refusing(name):
        def make(*args, device=None, **kwargs):
            if device is not None and torch.device(device).type == "meta" and not isinstance(args[0], torch.Tensor):
                raise AssertionError(f"torch.{name} copies from the host")
            return original(*args, device=device, **kwargs)

        original = getattr(torch, name)
        return make

    with monkeypatch.context() as patch, Detector():
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, refusing(name))
        yield


@pytest.fixture(autouse=True)
def a_step_of_a_queue(monkeypatch):
    """The queue reads which images are done outside of graphs, so only its steps, which are all alike, are run."""

    def run_queue(program, estimator, batch, given=None):
        # As a graph holds it: in buffers.
        steps = Replays(program, estimator, None, len(batch.images))
        steps.enter(program.begin(estimator, batch) | (given or {}))
        steps._advance()
        return steps.best(len(batch.images))

    monkeypatch.setattr(square, "QUERIES", 2)
    for name in ("base", "apgdt", "pma"):
        monkeypatch.setattr(sys.modules[f"atop_fast.attacks.{name}"], "run_queue", run_queue)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Autocast, fused optimizers and dispatch keys do not know the meta device; on a GPU they neither copy nor wait.

    There, attack_loss does not look at the classes.
    """
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)
    monkeypatch.setattr(_registry, "owner", lambda name, device: "eager")
    monkeypatch.setattr(importlib.import_module("atop_fast.ops.attack_loss"), "_check_classes", lambda *args: None)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    plain = lambda self, module, betas: torch.optim.SGD(module.parameters(), lr=0.1)  # noqa: E731
    for kind in (Step, ClassifierStep):
        monkeypatch.setattr(kind, "optimizer", plain)


def batch(channels=3, size=16, count=8):
    return torch.rand(count, channels, size, size, device=META), torch.zeros(count, dtype=torch.int64, device=META)


def defense(transform=None, channels=3):
    with META:
        classifier = build_classifier("small_cnn", channels=channels, classes=10)
        purifier = build_purifier("unet", channels=channels, width=4)
    return Defense(transform or RT2(4, sigma=0.1), purifier, classifier.eval().requires_grad_(False))


def test_the_detector_sees_what_it_is_for(monkeypatch):
    x = torch.zeros(4, device=META)
    for work in (
        lambda: torch.tensor(1.0, device=META),
        lambda: torch.as_tensor([1.0], device=META),
        lambda: torch.ones(2).to(META),
        lambda: torch.ones(()).to(META),
        lambda: x.copy_(torch.ones(4)),
        lambda: x.nonzero(),
    ):
        with pytest.raises((AssertionError, NotImplementedError)), detected(monkeypatch):
            work()
    with detected(monkeypatch):
        torch.where(x > 0, x + torch.ones(()), 0.0).sum() + torch.full((), 2.0, device=META)


CASES = [
    (name, norm)
    for name in ("FGSM", "PGD", "MIFGSM", "APGD", "APGDT", "FAB", "CW", "Square", "PMA", "StAdv")
    for norm in getattr(attacks, name).norms
]


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_steps_of_attacks(name, norm, monkeypatch):
    options = {} if name == "StAdv" else {"norm": norm, "eps": 0.5}
    # The tests of gradients and updates have a purifier.
    with META:
        classifier = build_classifier("small_cnn", channels=3, classes=10)
    attack, (x, y) = getattr(attacks, name)(Defense(RT2(4, sigma=0.1), None, classifier.eval()), **options), batch()
    ids = torch.zeros_like(y)
    for context in (contextlib.nullcontext(), detected(monkeypatch)):
        with attack.prepared() as estimator, context:
            assert attack.run(estimator, Batch(x, y, ids)).shape == x.shape


@pytest.mark.parametrize("mode", attacks.GRADIENT_MODES)
@pytest.mark.parametrize("transform", [RT1(4, size=(24, 24)), RT3(4, sigma=0.1)], ids=["rt1 resized", "rt3"])
def test_gradients_over_draws(mode, transform, monkeypatch):
    attack, (x, y) = attacks.PGD(defense(transform), gradient=mode, eot_iter=3), batch()
    for context in (contextlib.nullcontext(), detected(monkeypatch)):
        with context:
            run_attack(attack, torch.zeros((), dtype=torch.int64, device=META), x, y, torch.zeros_like(y))


ATTACKS = [("fgsm", "Linf"), ("fgsm-rs", "L2"), ("n-fgsm", "Linf"), ("pgd", "Linf"), ("apgd", "L1"), ("gat", "Linf")]


@pytest.mark.parametrize(("attack", "norm"), ATTACKS)
def test_updates_of_fine_tuning(attack, norm, monkeypatch):
    options = {
        "attack": attack,
        "norm": norm,
        "eps": 8 / 255 if norm == "Linf" else 0.5,
        "steps": 2,
        "adversarial_share": 0.5,
        "clean_weight": 0.5,
        "l1_final": 0.1,
    }
    with META:
        discriminator = SNPatchDiscriminator(3, 4, 2)
    step = FinetuneStep(defense(), discriminator, FinetuneConfig(**options), 0)
    update(step, batch(), monkeypatch)


def update(step, images, monkeypatch):
    x, y = images
    for module in step.modules.values():
        module.train()
    step(x, y, torch.zeros_like(y), 0)
    with detected(monkeypatch):
        step._update(x, y, torch.zeros_like(y))


# Quick enough for the first tier.
FAST = ("cifar10-native-rt2",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in schema.preset_names()]
)
def test_updates_of_presets(name, monkeypatch):
    recipe = schema.load_recipe(name)
    source, size = recipe.classifier, recipe.data.size or 32
    # The demo's images are digits.
    channels = recipe.purifier.options.get("channels", 3)
    transform = recipe.transform.build()
    with META:
        classifier = build_classifier(source.name, **{"channels": channels, "classes": 10, **source.options})
        purifier = build_purifier(recipe.purifier.name, **recipe.purifier.options)
        judge = SNPatchDiscriminator(**recipe.discriminator.options)
    images = batch(channels, size, 4)
    through = None if source.training.attack == "none" else transform
    update(ClassifierStep(classifier, source.training, 0, through), images, monkeypatch)
    update(PretrainStep(transform, purifier, judge, recipe.pretrain, 0), images, monkeypatch)
    fixed = Defense(transform, purifier, classifier.eval().requires_grad_(False))
    update(FinetuneStep(fixed, judge, recipe.finetune, 0), images, monkeypatch)


def test_updates_of_a_classifier(monkeypatch):
    with META:
        classifier = build_classifier("small_cnn", channels=3, classes=10)
    config = ClassifierConfig(augment=True, attack="n-fgsm", flip="alternating", accumulate=2)
    update(ClassifierStep(classifier, config, 0, RT2(4, sigma=0.1)), batch(), monkeypatch)
