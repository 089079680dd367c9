"""The loop under the trainings: schedules, averages, feeds, exact resumption, and several processes."""

from __future__ import annotations

import json
import os
import random
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toolkit import PATIENCE, SPAWN, end_itself, ranks
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from atop_fast import RT2, Defense, FinetuneConfig, build_classifier, build_purifier, finetune
from atop_fast.purifiers import SNPatchDiscriminator
from atop_fast.randomness import seeded
from atop_fast.training import Feed, Step, TrainingConfig, fit
from atop_fast.training.average import Average
from atop_fast.training.classifier import shift_and_mirror

X = torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 4
CPU = torch.device("cpu")
# Exit status of a process that SIGTERM reaches before or after its training.
OUTSIDE = 99


class Line(Step):
    """A linear map of the images' mean to 0, and a record of what it saw."""

    def __init__(self, config=None, **options):
        with seeded(0):
            module = nn.Linear(1, 1)
        super().__init__({"line": module}, config or TrainingConfig(**options), (0.9, 0.999))
        self.rates, self.seen, self.gradients, self.weights = [], [], [], []

    def losses(self, x, y, ids, epoch):
        self.rates.append(float(self.optimizers["line"].param_groups[0]["lr"]))
        self.seen.append(ids.clone())
        loss = self.modules["line"](x.mean((1, 2, 3))[:, None]).square().mean()
        self.update(loss, "line")
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.modules["line"].parameters()]))
        self.weights.append(self.now())
        return {"loss": loss}

    def now(self):
        return torch.cat([p.detach().flatten() for p in self.modules["line"].parameters()])


def run(step, images=X, labels=Y, **options):
    return fit("test", step, Feed("test", images, labels, CPU, workers=0), **{"seed": 0, "progress": False, **options})


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
def test_schedules(schedule):
    step = Line(epochs=2, batch_size=3, lr=0.5, schedule=schedule)
    run(step)
    done = torch.arange(8, dtype=torch.float64) / 8
    expected = {
        "cosine": 0.25 * (1 + torch.cos(torch.pi * done)),
        "linear": 0.5 * (1 - done),
        "step": 0.5 * torch.tensor([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01], dtype=torch.float64),
        "constant": torch.full((8,), 0.5, dtype=torch.float64),
    }[schedule]
    torch.testing.assert_close(torch.tensor(step.rates, dtype=torch.float64), expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_cycle_is_torchs(batch):
    step = Line(epochs=3, batch_size=batch, lr=0.5, schedule="onecycle")
    run(step)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, len(step.rates), pct_start=0.2, anneal_strategy="linear", cycle_momentum=False
    )
    for rate in step.rates:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        theirs.step() if theirs.last_epoch + 1 < len(step.rates) else None


@pytest.mark.parametrize("updates", [1, 2, 3, 5])
def test_one_cycle_is_finite_and_positive_however_short(updates):
    step = Line(epochs=1, batch_size=1, lr=0.5, schedule="onecycle", updates=updates)
    run(step)
    assert len(step.rates) == updates
    assert max(step.rates) == 0.5
    assert min(step.rates) > 0


def test_steps_know_how_much_of_the_training_is_done():
    class Watched(Line):
        def losses(self, x, y, ids, epoch):
            return {**super().losses(x, y, ids, epoch), "progress": self.progress}

    history = run(Watched(epochs=4, batch_size=12))
    assert [entry["progress"] for entry in history] == [0, 0.25, 0.5, 0.75]


def test_every_epoch_sees_every_image_once():
    step = Line(epochs=2, batch_size=5)
    run(step)
    epochs = torch.cat(step.seen).view(2, 12)
    assert torch.equal(epochs.sort(1).values, torch.arange(12).expand(2, 12))
    assert not torch.equal(epochs[0], epochs[1])


def test_accumulated_parts_give_the_gradient_of_the_whole():
    """Also for parts of unequal sizes."""
    whole, parts = Line(epochs=1, batch_size=7), Line(epochs=1, batch_size=7, accumulate=3)
    assert run(whole)[0]["loss"] == pytest.approx(run(parts)[0]["loss"], rel=1e-6)
    assert [len(ids) for ids in parts.seen] == [3, 2, 2, 2, 2, 1]
    torch.testing.assert_close(parts.gradients[2], whole.gradients[0])
    torch.testing.assert_close(parts.now(), whole.now())


def test_long_gradients_are_clipped():
    free, clipped = Line(epochs=1, batch_size=12), Line(epochs=1, batch_size=12, clip=0.01)
    run(free), run(clipped)
    assert free.gradients[0].norm() > 0.02
    torch.testing.assert_close(clipped.gradients[0], free.gradients[0] * 0.01 / free.gradients[0].norm())


@pytest.mark.parametrize("limit", [0.2, 0.999])
def test_moving_average(limit):
    step = Line(epochs=2, batch_size=4, average="ema", ema_decay=limit)
    run(step)
    expected = step.weights[0]
    for t, weights in enumerate(step.weights[1:], start=1):
        decay = min(limit, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(step.now(), expected)
    assert not torch.equal(step.now(), step.weights[-1])


@pytest.mark.parametrize("epochs", [1, 6, 7])
def test_median_of_the_epochs_of_the_second_half(epochs):
    step = Line(epochs=epochs, batch_size=12, average="median")
    run(step)
    kept = torch.stack(step.weights[epochs // 2 :])
    torch.testing.assert_close(step.now(), torch.quantile(kept, 0.5, dim=0))


def test_the_median_is_over_the_epochs_that_a_limit_of_updates_leaves():
    """Five epochs of three updates, and one more update; the configured epochs have no second half."""
    step = Line(epochs=100, updates=16, batch_size=4, average="median", schedule="constant")
    run(step)
    kept = torch.stack([step.weights[i] for i in (11, 14, 15)])
    torch.testing.assert_close(step.now(), torch.quantile(kept, 0.5, dim=0))
    assert not torch.equal(step.now(), step.weights[-1])


@pytest.mark.parametrize("average", ["ema", "median"])
def test_statistics_of_batch_norm_are_averaged_like_the_weights(average):
    """torch's averaged model, whose decay is constant, as ours is up to 0.1."""
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ours = Average(module, TrainingConfig(average=average, ema_decay=0.1), 4)
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.1), use_buffers=True)
    statistics = []
    for epoch in range(4):
        with torch.no_grad():
            module[0].weight.normal_()
            module(3 * torch.randn(8, 2) + epoch)
        ours.after_update(), theirs.update_parameters(module), ours.after_epoch(epoch)
        statistics.append(module[1].running_var.clone())
    expected = theirs.module[1].running_var if average == "ema" else (statistics[2] + statistics[3]) / 2
    with ours.applied():
        torch.testing.assert_close(module[1].running_var, expected)
        assert module[1].num_batches_tracked == 4
    assert torch.equal(module[1].running_var, statistics[3])


class Pairs(Dataset):
    """Images of bytes with their labels."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], int(Y[i])


@pytest.mark.parametrize("workers", [0, 2])
def test_bytes_floats_and_datasets_are_the_same_images(workers):
    pixels = (255 * X).byte()
    ids = [torch.tensor([3, 1]), torch.tensor([7])]
    feeds = [Feed("test", pixels, Y, CPU), Feed("test", pixels.float() / 255, Y, CPU)]
    feeds.append(Feed("test", Pairs(pixels), None, CPU, workers))
    state = torch.get_rng_state()
    for batches in zip(*(feed.batches(ids) for feed in feeds), strict=True):
        for other in batches[1:]:
            assert all(torch.equal(a, b) for a, b in zip(batches[0], other, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(feeds[2].first(), feeds[0].first())


@pytest.mark.parametrize(
    ("images", "labels", "error", "pattern"),
    [
        (X * 2, Y, ValueError, r"test: images must be in \[0, 1\]"),
        (X[0].byte(), Y, ValueError, r"test: images must be of shape \(N, C, H, W\), got \(1, 16, 16\)"),
        (X[:0], Y[:0], ValueError, "test: images must be at least one, got none"),
        (X, Y[:3], ValueError, r"test: labels must be of shape \(12,\)"),
        (Pairs(X[:0]), None, ValueError, "test: images must be at least one, got none"),
        ("folder", None, TypeError, "test: images must be a tensor, or a dataset with a length, got str"),
    ],
)
def test_wrong_images_are_named(images, labels, error, pattern):
    with pytest.raises(error, match=pattern):
        Feed("test", images, labels, CPU)


@pytest.mark.parametrize(
    ("items", "error", "pattern"),
    [
        (lambda i: (2 * X[i] - 1, 0), ValueError, r"test: images must be in \[0, 1\], got values in \[-0.9"),
        (lambda i: (255 * X[i], 0), ValueError, r"test: images must be in \[0, 1\], got values in \[0"),
        (lambda i: ((255 * X[i]).long(), 0), TypeError, "images must be a floating-point tensor, got torch.int64"),
        (lambda i: (X[i], 0.7), TypeError, "test: labels must be one integer for each image, got torch.float64"),
        (lambda i: (X[i], torch.ones(3).long()), TypeError, "labels must be one integer for each image"),
        (lambda i: X[i], TypeError, r"test: images must be a dataset of \(image, label\).*, got batches of Tensor"),
        (lambda i: {"image": X[i], "label": 0}, TypeError, "images must be a dataset of .*, got batches of dict"),
    ],
)
def test_wrong_items_of_a_dataset_are_named_when_they_are_read(items, error, pattern):
    """Normalized images trained a purifier on another range than the one that it meets in a Defense."""

    class Items(Pairs):
        def __getitem__(self, i):
            return items(i)

    with pytest.raises(error, match=pattern):
        Feed("test", Items(X), None, CPU).first()


class Augmented(Pairs):
    """Draws from all global generators."""

    def __getitem__(self, i):
        return self.images[i] * torch.rand(()) * random.random() * float(np.random.rand()), 0


def test_random_augmentations_are_a_function_of_seed_epoch_and_item():
    """They were the same in every epoch, and a resumed training, whose data seemed to be others, was refused."""
    ids = [torch.tensor([3, 1]), torch.tensor([7])]
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    here, elsewhere = (Feed("test", Augmented(X), None, CPU, workers) for workers in (0, 2))
    read = [[x for x, _, _ in feed.batches(ids, seed=1)] for feed in (here, elsewhere)]
    assert all(map(torch.equal, *read))
    other = next(here.batches([torch.tensor([1, 7, 3])], seed=1))[0]
    assert torch.equal(other, torch.cat(read[0])[[1, 2, 0]])
    assert not torch.equal(next(here.batches(ids, seed=2))[0], read[0][0])
    descriptions = {feed.description() for feed in (here, elsewhere)}
    torch.rand(3), random.random()
    assert descriptions == {here.description()}
    torch.set_rng_state(states[0]), random.setstate(states[1])
    here.first(), here.description()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_a_training_on_augmented_items_resumes_to_the_same_bits(tmp_path):
    options = {"images": Augmented(X), "labels": None, "checkpoint": tmp_path / "run.pt", "checkpoint_minutes": 0}
    whole, resumed = Line(epochs=2, batch_size=5), Line(epochs=2, batch_size=5)
    history = run(whole, **options | {"checkpoint": None})
    losses, seen = Line.losses, []

    def stopping(self, *args):
        seen.append(1)
        if len(seen) > 4:
            raise KeyboardInterrupt
        return losses(self, *args)

    cut = Line(epochs=2, batch_size=5)
    cut.losses = stopping.__get__(cut)
    with pytest.raises(KeyboardInterrupt):
        run(cut, **options)
    torch.rand(3)
    assert run(resumed, **options) == history
    assert torch.equal(resumed.now(), whole.now())


def test_shift_and_mirror():
    """Each image is one of the 162 that it may be, whatever the batch; most of these occur."""
    x, ids = torch.rand(1, 2, 6, 5).expand(600, -1, -1, -1), torch.arange(600)
    y = shift_and_mirror(x, 3, ids, 7)
    padded = F.pad(x[0], (4, 4, 4, 4))
    moved = [padded[:, i : i + 6, j : j + 5] for i in range(9) for j in range(9)]
    possible = torch.stack([*moved, *(image.flip(2) for image in moved)])
    found = (y[:, None] == possible).flatten(2).all(2)
    # The outermost shifts may leave equal images.
    assert found.any(1).all()
    assert found.any(0).sum() > 140
    assert torch.equal(shift_and_mirror(x[40:50], 3, ids[40:50], 7), y[40:50])
    assert not torch.equal(shift_and_mirror(x, 3, ids, 8), y)
    near = shift_and_mirror(x, 3, ids, 7, reach=1)
    within = [at + 9 * i + j for at in (0, 81) for i in (3, 4, 5) for j in (3, 4, 5)]
    assert (near[:, None] == possible[within]).flatten(2).all(2).any(1).all()


def test_alternating_flips_show_both_sides_in_turn():
    x, ids = torch.rand(1, 1, 4, 4).expand(100, -1, -1, -1), torch.arange(100)
    epochs = [shift_and_mirror(x, 3, ids, torch.tensor(epoch), 0, alternating=True) for epoch in range(4)]
    for earlier, later in pairwise(epochs):
        assert torch.equal(later, earlier.flip(3))
    mirrored = (epochs[0] == x.flip(3)).flatten(1).all(1)
    assert torch.equal(epochs[0][~mirrored], x[~mirrored])
    assert 30 < mirrored.sum() < 70


def train(rank, variables, folder, options):
    """One process of a fine-tuning, as torchrun would start it."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(OUTSIDE))
    with seeded(0):
        classifier = build_classifier("small_cnn", channels=1, classes=4).eval()
        purifier, discriminator = build_purifier("unet", channels=1, width=4), SNPatchDiscriminator(1, 4, 2)
    if moment := options.pop("stop", None):
        before = written(folder / "run.pt")
        end_itself(moment[0], lambda: written(folder / "run.pt") > before, moment[1])
    if options.pop("differ", False):
        options["lr"] = 0.1 * (1 + rank)
    config = FinetuneConfig(epochs=3, batch_size=5, eps=0.1, attack="pgd", steps=1, average="ema", **options)
    history = finetune(
        Defense(RT2(4, sigma=0.1), purifier, classifier),
        X,
        Y,
        discriminator=discriminator,
        config=config,
        checkpoint=folder / "run.pt",
        checkpoint_minutes=0,
        metrics=folder / "metrics.jsonl",
        progress=False,
    )
    torch.save((history, purifier.state_dict(), discriminator.state_dict()), folder / f"result{rank}.pt")


def start(folder, size=1, **options):
    folder.mkdir(exist_ok=True)
    arguments = [(rank, variables, folder, options) for rank, variables in enumerate(ranks(size))]
    processes = [SPAWN.Process(target=train, args=args) for args in arguments]
    for process in processes:
        process.start()
    return processes


def finish(processes, folder):
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(len(processes))]


def same(a, b):
    return a[0] == b[0] and all(torch.equal(v, y[k]) for x, y in zip(a[1:], b[1:], strict=True) for k, v in x.items())


def written(path):
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_the_update_in_which_it_comes(tmp_path, capsys, number, error):
    class Stopped(Line):
        def losses(self, *args):
            if len(self.seen) == 3:
                os.kill(os.getpid(), number)
            return super().losses(*args)

    whole, rest = (Line(epochs=3, batch_size=5) for _ in range(2))
    run(whole)
    before = signal.getsignal(number)
    with pytest.raises(error) as stop:
        run(Stopped(epochs=3, batch_size=5), checkpoint=tmp_path / "run.pt")
    assert error is KeyboardInterrupt or stop.value.code == 143
    assert signal.getsignal(number) is before
    assert "run.pt has update 4 of 9, and the same call resumes" in capsys.readouterr().err
    run(rest, checkpoint=tmp_path / "run.pt")
    assert len(rest.seen) == 5
    assert torch.equal(rest.now(), whole.now())


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_stopped_again_and_again_ends_with_the_same_bits(tmp_path, stop):
    (whole,) = finish(start(tmp_path / "whole"), tmp_path / "whole")
    folder, moments, stops = tmp_path / "stopped", random.Random(0), 0
    for _ in range(4):
        # After an update or some more, or somewhere within one.
        (process,) = start(folder, stop=(stop, moments.random() * 0.02))
        process.join(PATIENCE)
        if process.exitcode in (0, OUTSIDE):
            break
        assert process.exitcode == (-9 if stop == signal.SIGKILL else 143)
        stops += 1
    assert stops >= 2
    (resumed,) = finish(start(folder), folder)
    assert same(resumed, whole)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert all(line[key] == value for line, epoch in zip(lines, whole[0], strict=True) for key, value in epoch.items())
    assert all(line["images_per_second"] > 0 for line in lines)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """With batches of 5 and a last one of 2 images, equal up to the order of summation; both ranks end alike."""
    ones = finish(start(tmp_path / "one"), tmp_path / "one")
    first, second = finish(start(tmp_path / "two", 2), tmp_path / "two")
    assert same(first, second)
    for a, b in zip(ones[0][0], first[0], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    start_weights = build_purifier("unet", channels=1, width=4).state_dict()
    moved = sum(float((ones[0][1][k] - v).square().sum()) for k, v in start_weights.items()) ** 0.5
    apart = sum(float((ones[0][1][k] - first[1][k]).square().sum()) for k in start_weights) ** 0.5
    assert apart < 0.01 * moved


@pytest.mark.slow
def test_processes_with_different_options_are_refused(tmp_path):
    processes = start(tmp_path, 2, differ=True)
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 1
    assert not (tmp_path / "run.pt").exists()


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    run(Line(epochs=1, batch_size=6), checkpoint=path, checkpoint_minutes=0)
    saved = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(Line(epochs=1, batch_size=6), checkpoint=path, checkpoint_minutes=0)
    assert path.read_bytes() == saved
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
