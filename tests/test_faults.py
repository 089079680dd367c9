"""Faults: memory, disk and networks that fail while something runs; threads that share a process."""

from __future__ import annotations

import contextlib
import gc
import importlib
import linecache
import math
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from small_task import places, trained_classifier
from test_engine import CPU, Line, X, Y
from test_evaluate_runs import results
from toolkit import PRELOADED, SPAWN
from torch import nn

from atop_fast import RT2, Defense, build_classifier, evaluate, save_model
from atop_fast._core.files import save_checkpoint, write_atomic
from atop_fast._core.flags import holding
from atop_fast.attacks import PGD, GradientEstimator, frozen
from atop_fast.attacks.folding import fold_batch_norm
from atop_fast.evaluation.judge import full_precision
from atop_fast.randomness import seeded
from atop_fast.training import Feed, fit

ROOT = Path(__file__).parent.parent
IMAGES, LABELS = places(20, 0)
IDS = torch.arange(20)


class Limited(nn.Module):
    """A classifier that has memory for `most` rows."""

    def __init__(self, most: int, error: Exception, backward: bool = False) -> None:
        super().__init__()
        self.network, self.most, self.error, self.backward, self.seen = trained_classifier(), most, error, backward, []

    def forward(self, x):
        self.seen.append(len(x))
        logits = self.network(x)
        if len(x) > self.most and not self.backward:
            raise self.error
        if len(x) > self.most and logits.requires_grad:
            logits.register_hook(self._fail)
        return logits

    def _fail(self, gradient):
        raise self.error


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you")],
    ids=["cuda", "cpu"],
)
def test_passes_that_do_not_fit_are_halved_and_change_no_result(error, summed, backward):
    """In the forward or the backward pass, with the gradients of several draws added up or not."""

    def estimator(classifier):
        return GradientEstimator(Defense(RT2(4, sigma=0.1), None, classifier), eot_iter=3, seed=1)

    model, t = Limited(16, error, backward), torch.zeros_like(IDS)
    with frozen(model):
        plain = estimator(model.network)(IMAGES, LABELS, IDS, t, summed=summed)
        short = estimator(model)
        with pytest.warns(RuntimeWarning, match=r"GradientEstimator: not enough memory for \d+ rows") as warned:
            estimate = short(IMAGES, LABELS, IDS, t, summed=summed)
        assert [str(w.message).rpartition(" with ")[2] for w in warned] == ["32", "16"]
        model.seen.clear()
        again = short(IMAGES, LABELS, IDS, t, summed=summed)
        # The learned weights are kept.
        assert model.seen == [16, 16, 16, 16]
        for found in (estimate, again):
            gradient = plain.gradient if summed or plain.gradient.dim() == 4 else plain.gradient.sum(0)
            torch.testing.assert_close(found.gradient, gradient, rtol=1e-5, atol=1e-7)
            assert torch.equal(found.correct, plain.correct)
            torch.testing.assert_close(found.loss, plain.loss, rtol=1e-6, atol=1e-7)


def test_other_errors_and_the_smallest_pass_are_raised():
    t = torch.zeros_like(IDS)
    for most, error in ((16, RuntimeError("another")), (0, torch.OutOfMemoryError("none for a single image"))):
        model = Limited(most, error)
        estimator = GradientEstimator(model, max_batch=8 if most == 0 else None)
        with frozen(model), pytest.raises(type(error), match=str(error)):
            estimator(IMAGES, LABELS, IDS, t)


def test_an_evaluation_whose_attack_lacks_memory_goes_on_with_fewer_images():
    defense = Defense(RT2(4, sigma=0.1), None, trained_classifier())
    sizes = []

    def attacks(most):
        def attack(x, y, ids):
            sizes.append(len(x))
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return PGD(defense, eps=0.1, steps=2)(x, y, ids)

        return {"pgd": attack}

    options = {"eps": 0.1, "draws": 3, "selection_draws": 3, "batch_size": 20, "progress": False}
    whole = results(evaluate(defense, IMAGES, LABELS, attacks=attacks(20), **options))
    sizes.clear()
    with pytest.warns(RuntimeWarning, match=r"evaluate: not enough memory for \d+ images at a time; going on with"):
        short = results(evaluate(defense, IMAGES, LABELS, attacks=attacks(7), **options))
    assert sizes == [20, 10, 5, 5, 5, 5]
    assert short == whole


def test_an_evaluation_says_for_which_image_a_model_returns_nan():
    class Sometimes(nn.Module):
        def forward(self, x):
            logits = trained_classifier()(x)
            # Attacked images alone have pixels of exactly 0 or 1 in their corner.
            return torch.where(x[:, 0, 0, 0, None] == 1, math.nan, logits)

    x = IMAGES.clone()
    x[:, 0, 0, 0] = 0.5
    attacks = {"corner": lambda images, y, ids: torch.where(ids[:, None, None, None] == 13, 1.0, images)}
    given = r"1 of 10 images 'corner', the first of them images\[13\]"
    with pytest.raises(ValueError, match=f"NaN or infinity for {given}"):
        evaluate(Sometimes(), x, LABELS, attacks=attacks, batch_size=10, progress=False)


class Broken(Line):
    """A network whose loss or gradient is NaN from some update on."""

    def __init__(self, at, what, **options):
        super().__init__(**options)
        self.at, self.what = at, what

    def update(self, loss, name):
        if len(self.seen) > self.at and self.what == "weights":
            # A gradient that overflows while the loss does not.
            loss = loss + (self.modules["line"].weight.sum() * 0 + 1e-30).sqrt() * 1e38 * 1e10
        super().update(loss, name)

    def losses(self, x, y, ids, epoch):
        logs = super().losses(x, y, ids, epoch)
        return {"loss": logs["loss"] * (math.nan if len(self.seen) > self.at and self.what == "loss" else 1)}


@pytest.mark.parametrize(("what", "pattern"), [
    ("loss", "fit: loss must be finite, got NaN or infinity in update 1 of epoch 1"),
    ("weights", "fit: the weights of line must be finite, got NaN or infinity after update 1 of epoch 1"),
])  # fmt: skip
@pytest.mark.parametrize("minutes", [0, 10])
def test_a_training_stops_at_nan_and_keeps_the_last_good_checkpoint(tmp_path, what, pattern, minutes):
    """Found at the next save, or when the epoch ends; nothing that came after it is saved."""
    path, options = tmp_path / "run.pt", {"epochs": 3, "batch_size": 4}

    def train(step):
        feed = Feed("test", X, Y, CPU)
        return fit("test", step, feed, seed=0, checkpoint=path, checkpoint_minutes=minutes, progress=False)

    if minutes and what == "weights":
        # The next loss shows it before the epoch ends.
        pattern = "fit: loss must be finite, got NaN or infinity in update 2 of epoch 1"
    with pytest.raises(ValueError, match=pattern):
        train(Broken(4, what, **options))
    if minutes == 0:
        state = torch.load(path, weights_only=True)
        assert (state["epoch"], state["batch"]) == (1, 1)
        assert all(value.isfinite().all() for value in state["line"].values())
    whole, resumed = Line(**options), Line(**options)
    train(resumed)
    path.unlink()
    train(whole)
    assert torch.equal(resumed.now(), whole.now())


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of the scripts whose long form docs/reliability.md shows."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kinds"), [
    ("training", ("disk full",)),
    ("evaluation", ("disk full", "read-only folder")),
])  # fmt: skip
def test_faults_at_random_moments_lose_nothing_that_was_saved(benchmarks, task, kinds):
    faults = importlib.import_module("faults")
    # The script has a list of its own.
    SPAWN.set_forkserver_preload(PRELOADED)
    found = faults.inject(len(kinds), 0, {task: kinds})
    assert len(found) == len(kinds)
    assert [fault for fault in found if not fault["right"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FGSM", "APGDT", "CW", "Square"])
def test_attacks_leave_no_memory_behind(benchmarks, name):
    row = importlib.import_module("load").leak(name, 100)
    assert row["tensors more"] == 0
    assert row["MiB more"] < 5


def test_folded_networks_leave_no_source_behind():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    before = set(linecache.cache)
    for _ in range(3):
        folded = fold_batch_norm(model)
    assert folded is not model
    del folded
    gc.collect()
    # A warning in between may have cached lines of real files.
    assert [name for name in linecache.cache.keys() - before if not Path(name).exists()] == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:evaluate. The model is in training mode")
@pytest.mark.parametrize("shared", [False, True])
def test_evaluations_in_threads_are_those_of_each_alone(benchmarks, shared):
    row = importlib.import_module("load").concurrent(4, shared)
    assert row["equal"] == "4 of 4"
    assert row["state restored"]


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["checkpoint", "model", "text"])
def test_a_full_disk_is_an_oserror_and_leaves_the_earlier_file(tmp_path, kind):
    classifier = build_classifier("small_cnn")
    path = tmp_path / {"checkpoint": "a.pt", "model": "a.safetensors", "text": "a.txt"}[kind]

    def write():
        if kind == "checkpoint":
            save_checkpoint(path, "", classifier.state_dict())
        elif kind == "model":
            save_model(path, classifier, "classifier", "small_cnn")
        else:
            write_atomic(path, lambda p: p.write_text("x" * 10000))

    write()
    before = path.read_bytes()
    with full_disk(5000), pytest.raises(OSError, match=r"File too large|MB left"):
        write()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_names_are_on_the_disk_before_a_write_returns(tmp_path, monkeypatch):
    """The file first, then, once it has its name, the folder."""
    synced, real = [], os.fsync

    def fsync(descriptor):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append((is_folder, (tmp_path / "a").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "a", lambda p: p.write_text("x"))
    assert synced == [(False, False), (True, True)]


def test_a_checkpoint_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    step = Line(epochs=1, batch_size=4)
    with pytest.raises(ValueError, match=r"fit: checkpoint must be a writable folder, got .*file"):
        fit("test", step, Feed("test", X, Y, CPU), seed=0, checkpoint=tmp_path / "file/run.pt", progress=False)
    assert not step.seen


def test_what_killed_processes_left_is_removed(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    dead, living = tmp_path / f".run.{done.pid}.pt", tmp_path / f".run.{os.getpid()}.pt"
    other = tmp_path / f".notes.{done.pid}.pt"
    for path in (dead, living, other):
        path.touch()
    fit("test", Line(epochs=0), Feed("test", X, Y, CPU), seed=0, checkpoint=tmp_path / "run.pt", progress=False)
    # This process's id is in the name of the checkpoint's temporary file.
    assert set(tmp_path.iterdir()) == {tmp_path / "run.pt", other}


def test_flags_held_by_several_are_put_back_by_the_last():
    model = nn.Linear(1, 1)
    with contextlib.ExitStack() as first:
        first.enter_context(frozen(model))
        with contextlib.ExitStack() as second:
            second.enter_context(frozen(model))
            first.pop_all().close()
            assert not model.training
            assert not model.weight.requires_grad
    assert model.training
    assert model.weight.requires_grad


def test_flags_are_put_back_after_an_error():
    class Refuses:
        good, bad = 1, property(lambda self: 1)

    thing = Refuses()
    with pytest.raises(AttributeError), holding([(thing, "good", 2), (thing, "bad", 2)]):
        pytest.fail("not reached")
    assert thing.good == 1


def test_precision_held_by_several_is_put_back_by_the_last():
    place = torch.backends.mkldnn.matmul
    before = place.fp32_precision
    try:
        place.fp32_precision = "bf16"
        with contextlib.ExitStack() as first:
            first.enter_context(full_precision(CPU))
            with full_precision(CPU):
                first.pop_all().close()
                assert place.fp32_precision == "ieee"
        assert place.fp32_precision == "bf16"
    finally:
        place.fp32_precision = before


def test_threads_take_turns_with_torchs_generator():
    state, drawn = torch.get_rng_state(), {}

    def draw(number):
        with seeded(0):
            drawn[number] = torch.stack([torch.rand(()) for _ in range(50)])

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with seeded(0):
        alone = torch.stack([torch.rand(()) for _ in range(50)])
    assert all(torch.equal(values, alone) for values in drawn.values())
    assert torch.equal(torch.get_rng_state(), state)
