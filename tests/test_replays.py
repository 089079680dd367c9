"""Steps of attacks as graphs: the same bits as eager steps, in batches of few sizes; and what is not replayed.

As in test_capture.py, tapes of operators stand in for CUDA graphs.
"""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from tape import TapeRecorder, look_at_no_classes

from atop_fast import RT2, Defense, attacks, build_classifier, build_purifier
from atop_fast._core.capture import WARM_UP
from atop_fast.attacks import queue, replay, square
from atop_fast.attacks.passes import counted_passes
from atop_fast.attacks.queue import Batch
from atop_fast.defenses import RandomSeries
from atop_fast.evaluation import FixedRandomness
from atop_fast.randomness import seeded
from atop_fast.transforms import RandomTransform

COUNT, SLOTS = 36, 16
X = torch.rand(COUNT, 1, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(COUNT) * 7 + 3
EPS = {"Linf": 0.02, "L2": 0.2, "L1": 3.0}


@functools.cache
def classifier():
    """Untrained, with small margins: attacks fool some images early, and some never."""
    with seeded(0):
        return build_classifier("small_cnn", channels=1, classes=5).eval()


@functools.cache
def defense(transform=None):
    with seeded(0):
        purifier = build_purifier("unet", channels=1, width=4).eval()
    return Defense(transform or RT2(4, sigma=0.1), purifier, classifier()).eval()


def labels(model):
    with torch.no_grad():
        return model(X).argmax(dim=1)


@pytest.fixture
def tapes(monkeypatch):
    """Every recorder that an attack has made; on a GPU neither attack_loss nor Square looks at values."""
    made = []

    def make():
        made.append(TapeRecorder())
        return made[-1]

    look_at_no_classes(monkeypatch)
    monkeypatch.setattr(replay, "_recorder", lambda device: make)
    monkeypatch.setattr(replay, "_SAID", set())
    monkeypatch.setitem(queue.SLOTS, "cpu", SLOTS)
    monkeypatch.setattr(square, "QUERIES", 2)

    def keep(x, candidate, kept):
        x.lerp_(candidate, kept.to(x.dtype)[:, None, None, None])

    monkeypatch.setattr(square, "_keep", keep)
    return made


def compared(attack, x, y, monkeypatch, ids=IDS, **options):
    """The attack's result by replays, which must be the eager one; and how many passes each took."""
    with counted_passes() as replayed:
        found = attack(x, y, ids, **options)
    with monkeypatch.context() as patch, counted_passes() as eager:
        patch.setenv("ATOP_FAST_GRAPHS", "0")
        expected = attack(x, y, ids, **options)
    assert torch.equal(found, expected)
    assert not torch.equal(found, x)
    return replayed, eager


CASES = {
    "pgd": ("PGD", "Linf", {"steps": 8}),
    "pgd early": ("PGD", "Linf", {"steps": 12, "early_stop": True, "n_restarts": 2}),
    "pgd l2 momentum": ("PGD", "L2", {"steps": 9, "momentum": 0.9, "schedule": "cosine"}),
    "mifgsm": ("MIFGSM", "Linf", {"steps": 8}),
    "apgd": ("APGD", "Linf", {"steps": 8, "early_stop": True}),
    "apgd l2 dlr": ("APGD", "L2", {"steps": 8, "loss": "dlr"}),
    "apgd l1": ("APGD", "L1", {"steps": 9, "shrink_eps": True}),
    "apgdt": ("APGDT", "Linf", {"steps": 8, "target_classes": 2, "early_stop": True}),
    "fab": ("FAB", "Linf", {"steps": 8, "target_classes": 2, "n_restarts": 2}),
    "fab l2 early": ("FAB", "L2", {"steps": 8, "target_classes": 2, "early_stop": True}),
    "fab l1": ("FAB", "L1", {"steps": 8, "target_classes": 2}),
    "square": ("Square", "Linf", {"n_queries": 16}),
    "square l2": ("Square", "L2", {"n_queries": 16}),
    "square l1": ("Square", "L1", {"n_queries": 17, "early_stop": False}),
    "pma": ("PMA", "Linf", {"steps": 8, "early_stop": True}),
    "pma l2": ("PMA", "L2", {"steps": 8, "target_classes": 2}),
    "pma l1": ("PMA", "L1", {"steps": 8}),
    "cw": ("CW", "L2", {"steps": 10, "lr": 0.1, "c": 10.0, "search_steps": 2, "early_stop": True}),
    "stadv": ("StAdv", None, {"steps": 8, "bound": 0.02, "smoothness": 1e-4}),
}


def built(name, model):
    kind, norm, options = CASES[name]
    ball = {} if kind in ("CW", "StAdv") else {"norm": norm, "eps": EPS[norm]}
    return getattr(attacks, kind)(model, **options, **ball)


@pytest.mark.parametrize("name", CASES)
def test_replays_are_what_eager_steps_are(name, tapes, monkeypatch):
    """Bit for bit, images that leave and enter and batches that shrink included."""
    model = classifier()
    attack = built(name, model)
    some = slice(SLOTS + 4)
    replayed, eager = compared(attack, X[some], labels(model)[some], monkeypatch, IDS[some])
    assert sum(tape.replays for tape in tapes) > 0
    assert all(tape.records <= 2 for tape in tapes)
    # Batches of few sizes have more rows, those of one length no more than a half.
    assert eager.forward <= replayed.forward <= 2 * eager.forward


@pytest.mark.parametrize("name", CASES)
def test_float64_is_replayed_too(name, tapes, monkeypatch):
    model = copy.deepcopy(classifier()).double()
    compared(built(name, model), X[:8].double(), labels(classifier())[:8], monkeypatch, IDS[:8])
    assert len(tapes) >= 1


MODES = [{"gradient": mode} for mode in attacks.GRADIENT_MODES] + [
    {"precision": "bfloat16"},
    {"max_batch": 8},
    {"momentum": 0.9, "norm": "L2", "eps": 0.5},
]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_steps_over_draws_are_replayed(options, tapes, monkeypatch):
    """Draws are keyed by tensors: each replay has its own."""
    attack = attacks.PGD(defense(), **{"eps": 0.05, "steps": 8, "eot_iter": 2, **options})
    # Two batches of 16, which share a graph, and one of 8; bfloat16 is slow here.
    some = slice(COUNT if options in MODES[:2] else SLOTS + 4)
    replayed, eager = compared(attack, X[some], labels(classifier())[some], monkeypatch, IDS[some])
    (tape,) = tapes
    assert (tape.records, tape.replays) == (2, (16 if some.stop == COUNT else 8) - WARM_UP + 8 - WARM_UP)
    assert replayed == eager


def test_restarts_masks_targets_and_starts_are_replayed(tapes, monkeypatch):
    y = labels(classifier())
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :10] = True
    attack = attacks.APGD(classifier(), steps=8, eps=0.02, n_restarts=3, early_stop=True)
    compared(attack, X, y, monkeypatch, mask=mask, targets=(y + 1) % 5, start=(X + 0.01).clamp(0, 1))
    assert len(tapes) >= 3


def test_batches_have_few_sizes(tapes):
    """Half of the slots, a quarter ...: each is recorded once, and images that are left fit."""
    for slots in (8, 16, 24, 104, 256, 512):
        steps = replay.Replays(None, None, TapeRecorder(), slots)
        sizes = [steps.size(count) for count in range(1, slots + 1)]
        assert all(size >= count and size % 8 == 0 for count, size in enumerate(sizes, 1))
        assert all(size < 2 * count + 8 for count, size in enumerate(sizes, 1))
        assert len(set(sizes)) <= 1 + slots.bit_length() - 3
        steps.replayed.missing = "not captured"
        assert [steps.size(count) for count in (1, slots)] == [8, slots]


class Swapping:
    """A program that swaps two entries and writes into a third: the buffers must not see half of it."""

    def step(self, estimator, state):
        state["a"], state["b"] = state["b"], state["a"][:]
        state["t"] += 1


def test_entries_that_trade_places_are_kept_apart():
    estimator = attacks.GradientEstimator(classifier())
    steps = replay.Replays(Swapping(), estimator, TapeRecorder(), 8)
    shared = torch.arange(8.0)
    steps.enter({"a": shared, "b": shared, "t": torch.zeros(8), "done": torch.zeros(8, dtype=torch.bool)})
    steps.state["b"] += 1
    for number in range(1, WARM_UP + 4):
        steps()
        one, other = (shared + 1, shared) if number % 2 else (shared, shared + 1)
        assert torch.equal(steps.state["a"], one)
        assert torch.equal(steps.state["b"], other)
        assert steps.state["t"].eq(number).all()
    assert torch.equal(shared, torch.arange(8.0))


class Casting(Swapping):
    def step(self, estimator, state):
        state["a"] = state["a"] + torch.full((8,), 1 / 3, dtype=torch.float64)


def test_an_entry_that_would_be_rounded_is_not_replayed(tapes):
    estimator = attacks.GradientEstimator(classifier())
    steps = replay.Replays(Casting(), estimator, TapeRecorder(), 8)
    steps.enter({"a": torch.zeros(8), "done": torch.zeros(8, dtype=torch.bool)})
    with pytest.warns(RuntimeWarning, match="were not captured: a step changes the shape or the type of 'a'"):
        steps()
    for _ in range(WARM_UP + 2):
        steps()
    assert (steps.state["a"] - (WARM_UP + 3) / 3).abs().max() < 1e-14
    assert steps.state["a"].dtype == torch.float64


class Sharing(Casting):
    def step(self, estimator, state):
        super().step(estimator, state)
        state["b"] = state["a"]


def test_a_batch_that_enters_after_a_failed_capture_keeps_its_values(tapes):
    """Eager steps leave entries that share memory: a copy into one would overwrite another."""
    steps = replay.Replays(Sharing(), attacks.GradientEstimator(classifier()), TapeRecorder(), 8)
    first, second = torch.zeros(8), torch.ones(8)
    done = torch.zeros(8, dtype=torch.bool)
    steps.enter({"a": first, "b": second, "done": done})
    with pytest.warns(RuntimeWarning, match="were not captured"):
        steps()
    steps.enter({"a": first, "b": second, "done": done})
    assert torch.equal(steps.state["a"], first)
    assert torch.equal(steps.state["b"], second)


class OwnAttack(attacks.PGD):
    """Keeps a number in Python, which a replayed graph would not update."""

    turn = 0

    def step(self, estimator, state):
        self.turn += 1
        super().step(estimator, state)


class Drawing(RandomTransform):
    def forward(self, x, seed=0, sample_ids=None, draw=0):
        ones = torch.ones_like(x[:, :1])
        return torch.cat((2 * x - 1 + 0.1 * torch.randn_like(x), ones, ones), dim=1)


def hooked():
    model = build_classifier("small_cnn", channels=1, classes=5).eval()
    model.register_forward_hook(lambda *args: None)
    return model


def patched():
    attack = attacks.PGD(classifier(), steps=8)
    attack.step = functools.partial(attacks.PGD.step, attack)
    return attack


def noisy():
    transform = RT2(4, sigma=0.1)
    transform.forward = functools.partial(Drawing().forward)
    return transform


NOT_REPLAYED = {
    "own attack": (lambda: OwnAttack(classifier(), steps=8), "the attack OwnAttack is not"),
    "patched attack": (patched, "the attack PGD is not"),
    "model with a hook": (lambda: attacks.PGD(hooked(), steps=8), "the model SmallCNN may keep a state"),
    "function": (lambda: attacks.PGD(lambda x: classifier()(x), steps=8), "the model <lambda> may keep"),
    "own transform": (lambda: attacks.PGD(defense(Drawing()), steps=8), "the model Defense may keep"),
    "own transform inside": (lambda: attacks.PGD(defense(FixedRandomness(Drawing(), 0)), steps=8), "the model Defense"),
    "patched transform": (lambda: attacks.PGD(defense(noisy()), steps=8), "the model Defense"),
    "substitute": (
        lambda: attacks.PGD(defense(), steps=8, gradient="bpda", substitute=lambda x: 0.9 * x),
        "the substitute may keep",
    ),
    "few passes": (lambda: attacks.PGD(classifier(), steps=7), None),
    "callback": (lambda: attacks.PGD(classifier(), steps=8, callback=lambda step: None), None),
}


@pytest.mark.parametrize("name", NOT_REPLAYED)
def test_what_is_not_replayed_says_so_once(name, tapes, monkeypatch):
    make, reason = NOT_REPLAYED[name]
    for turn in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attack = make()
            compared(attack, X[:8], labels(classifier())[:8], monkeypatch, IDS[:8])
        texts = [str(w.message) for w in said if "not replayed" in str(w.message)]
        expected = [] if reason is None or turn else [reason]
        assert len(texts) == len(expected)
        assert all(part in text for part, text in zip(expected, texts, strict=True))
    assert not tapes


def test_a_step_that_looks_at_values_goes_on_eagerly(tapes, monkeypatch):
    """RandomSeries chooses rows by their numbers: the capture fails, and the warm-up's steps count."""
    attack = attacks.PGD(defense(RandomSeries(3)), steps=8, eot_iter=2, eps=0.05)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        replayed, eager = compared(attack, X[:8], labels(classifier())[:8], monkeypatch, IDS[:8])
    assert [tape.replays for tape in tapes] == [0]
    texts = [str(w.message) for w in said if "not replayed" in str(w.message)]
    assert texts == [
        "PGD: steps are not replayed as CUDA graphs: they were not captured: aten.nonzero.default while recording"
    ]
    assert replayed == eager


def test_an_update_that_is_captured_replays_nothing_of_its_own(tapes):
    """Attacks inside of a training's graph are part of it."""
    attack = attacks.PGD(classifier(), steps=8)
    with attack.prepared() as estimator:
        attack.run(estimator, Batch(X, labels(classifier()), IDS))
    assert not tapes


def test_the_switch(tapes, monkeypatch):
    monkeypatch.setenv("ATOP_FAST_GRAPHS", "yes")
    with pytest.raises(ValueError, match="ATOP_FAST_GRAPHS must be one of '1', 'updates', '0', got 'yes'"):
        attacks.PGD(classifier(), steps=8)(X, labels(classifier()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_graphs_are_what_eager_steps_are(name, monkeypatch):
    """Almost all images, in float64: the order of some sums on a GPU is not fixed, and a sign in Linf may flip."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = build_classifier("small_cnn", channels=1, classes=5).eval().cuda()
    model.load_state_dict(classifier().state_dict())
    attack = built(name, model.double())
    x, y, ids = X.double().cuda(), labels(classifier()).cuda(), IDS.cuda()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not replayed")
        found = attack(x, y, ids)
    monkeypatch.setenv("ATOP_FAST_GRAPHS", "0")
    expected = attack(x, y, ids)
    near = ((found - expected).abs().flatten(1).amax(dim=1) < 1e-6).double().mean()
    assert float(near) >= 0.9
