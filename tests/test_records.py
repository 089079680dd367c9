"""The records of a training: metrics, TensorBoard's logs, held-out evaluations."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_task import places, trained_classifier
from test_train import fail, files, tiny  # noqa: F401

from atop_fast import (
    RT2,
    RT3,
    Defense,
    FinetuneConfig,
    PretrainConfig,
    RandomResizePad,
    build_purifier,
    finetune,
    pretrain,
)
from atop_fast.evaluation.pictures import training_picture
from atop_fast.randomness import seeded
from atop_fast.training import PretrainStep
from atop_fast.training.engine import _Training
from atop_fast.training.metrics import Metrics, read_metrics

X, Y = places(24, 1)
HELD_OUT = places(10, 2)
CONFIG = FinetuneConfig(epochs=2, batch_size=8, eps=0.2, attack="fgsm", gan_weight=0)


def tuned(config=CONFIG, **options):
    """The history and the weights of a small fine-tuning."""
    with seeded(0):
        purifier = build_purifier("unet", channels=1, width=4)
    defense = Defense(RT2(4, sigma=0.1), purifier, trained_classifier())
    history = finetune(defense, X, Y, config=config, **{"progress": False, **options})
    return history, torch.cat([p.detach().flatten() for p in purifier.parameters()])


def test_held_out_evaluations_leave_the_training_as_it_is(tmp_path):
    plain, weights = tuned(held_out=HELD_OUT)
    state = torch.get_rng_state()
    history, same = tuned(replace(CONFIG, evaluate_every=2), held_out=HELD_OUT, metrics=tmp_path / "metrics.jsonl")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(same, weights)
    assert history[0] == plain[0]
    clean, robust = (history[1].pop(f"held_out_{name}") for name in ("clean", "robust"))
    assert history[1] == plain[1]
    # The classifier is nearly always right; an attack that strong on an untrained purifier is felt.
    assert robust < clean
    assert clean * 10 == pytest.approx(round(clean * 10))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line.get("held_out_clean") for line in lines] == [None, clean]


@pytest.mark.parametrize("average", ["none", "ema", "median"])
def test_held_out_images_meet_the_weights_that_a_training_ends_with(average, monkeypatch):
    """Its average so far, not the weights of the last update; these go on."""
    evaluated, evaluate = [], _Training._evaluate

    def recorded(self, feed):
        evaluated.append(torch.cat([p.detach().flatten() for p in next(iter(self.step.modules.values())).parameters()]))
        return evaluate(self, feed)

    monkeypatch.setattr(_Training, "_evaluate", recorded)
    config = replace(CONFIG, epochs=3, average=average, ema_decay=0.9)
    _, weights = tuned(config)
    _, same = tuned(replace(config, evaluate_every=1), held_out=HELD_OUT)
    assert torch.equal(same, weights)
    assert len(evaluated) == 3
    assert torch.equal(evaluated[-1], weights)
    assert not torch.equal(evaluated[0], weights)


@pytest.mark.parametrize("transform", [RT2(4, sigma=0.1), RT3(4, copies=3, sigma=0.1), RandomResizePad(12, 20)])
@pytest.mark.parametrize("count", [9, 10])
def test_the_held_out_l1_is_that_of_the_whole_restoration(transform, count):
    """Also with several copies of an image, where numbers of other images were subtracted."""
    with seeded(0):
        purifier = build_purifier("unet", channels=1, width=4).eval()
    step, x, ids = (
        PretrainStep(transform, purifier, None, PretrainConfig(), 3),
        places(count, 2)[0],
        torch.arange(count),
    )
    wanted = (transform.target(x, step.seed, ids, 0)[:: transform.copies] + 1) / 2
    with torch.no_grad():
        restored = Defense(transform, purifier, torch.nn.Identity()).purify(x, step.seed, ids, 0)
    torch.testing.assert_close(step.evaluate(x, Y, ids)["l1"], (restored - wanted).abs().mean())
    torch.testing.assert_close(step.pictures(x, Y, ids), torch.cat((wanted, restored)))


def test_tensorboard_shows_the_metrics_and_pictures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    with seeded(0):
        purifier = build_purifier("unet", channels=1, width=4)
    options = {"metrics": tmp_path / "metrics.jsonl", "tensorboard": tmp_path / "logs"}
    config = replace(CONFIG, epochs=1)
    tuned(config, **options)
    pretrain(purifier, RT2(4), X, config=config, progress=False, **options)
    for title in ("pretrain", "finetune"):
        log = accumulator(str(tmp_path / "logs" / title)).Reload()
        (line,) = (line for line in read_metrics(tmp_path / "metrics.jsonl") if line["training"] == title)
        for name in ("l1", "lr", "images_per_second"):
            (event,) = log.Scalars(name)
            assert (event.step, event.value) == (3, pytest.approx(line[name]))
        (picture,) = log.Images("purified")
        # Eight images and their restorations, 16 pixels wide.
        assert picture.width * picture.height == 16 * 16 * 16


class Normed(torch.nn.Module):
    """A purifier with batch norm."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        self.out = torch.nn.Conv2d(4, 1, 1)

    def forward(self, z):
        return self.out(self.net(z)).tanh()


@pytest.mark.parametrize("train", ["pretrain", "finetune"])
def test_pictures_leave_the_training_as_it_is(train, tmp_path):
    """They counted in the running statistics of batch norm, and so changed the trained network."""
    pytest.importorskip("tensorboard")

    def state(**options):
        with seeded(0):
            purifier = Normed()
        if train == "pretrain":
            pretrain(purifier, RT2(4), X, config=CONFIG, progress=False, **options)
        else:
            finetune(Defense(RT2(4), purifier, trained_classifier()), X, Y, config=CONFIG, progress=False, **options)
        return purifier.state_dict()

    plain, watched = state(), state(tensorboard=tmp_path)
    assert plain["net.1.num_batches_tracked"] == 6
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def test_held_out_images_that_do_not_fit_are_refused_before_the_first_update():
    """They ended a training at its first evaluation, perhaps after hours."""
    config = replace(CONFIG, epochs=10**6, evaluate_every=10**6)
    for wrong in (torch.rand(4, 3, 16, 16), torch.rand(4, 1, 18, 18)):
        with pytest.raises(ValueError, match="fit: held_out must be images that the networks take, got"):
            tuned(config, held_out=(wrong, Y[:4]))


def test_the_folder_of_the_metrics_is_made_or_refused_at_the_start(tmp_path):
    """A folder that did not exist ended a training after its first epoch."""
    tuned(metrics=tmp_path / "new" / "metrics.jsonl")
    assert len(read_metrics(tmp_path / "new" / "metrics.jsonl")) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="fit: metrics must be a writable folder, got"):
        tuned(replace(CONFIG, epochs=10**6), metrics=tmp_path / "file" / "metrics.jsonl")


def test_without_tensorboard_nothing_is_written(tiny, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    error = fail(capsys, "train", "tiny.yaml", "--out=run", "--tensorboard=true")
    assert "the package tensorboard is missing: pip install 'atop-fast[track]'" in error
    assert not Path("run").exists()


def test_lines_of_an_interrupted_training_are_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for title in ("first", "second"):
        record = Metrics(path, title, 0)
        for epoch in range(3):
            record.add(epoch, 10 * (epoch + 1), {"loss": 1.0}, 0.1)
    Metrics(path, "first", 15).add(1, 20, {"loss": 2.0}, 0.1)
    found = [(line["training"], line["updates"], line["loss"]) for line in read_metrics(path)]
    assert found == [("first", 10, 1.0), *(("second", n, 1.0) for n in (10, 20, 30)), ("first", 20, 2.0)]


def test_curves_need_lines():
    assert training_picture([]) is None
    lines = [{"training": "a", "updates": n, "loss": 1 / n, "held_out_clean": 0.5} for n in (1, 2)]
    # The first line may lack what the last one has.
    del lines[0]["held_out_clean"]
    assert training_picture(lines).startswith(b"\x89PNG")
