"""Traces: callbacks compared with the images one by one, and the files, reports and runs that hold them."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import mnist, standard_mnist
from toolkit import PATIENCE, SPAWN, ranks

from atop_fast import RT2, Defense, evaluate
from atop_fast.attacks import (
    APGD,
    APGDT,
    CW,
    FAB,
    MIFGSM,
    PGD,
    AutoAttack,
    Square,
    StAdv,
    TraceStep,
    counted_passes,
    queue,
)
from atop_fast.attacks.queue import Batch
from atop_fast.evaluation import quick_attacks
from atop_fast.evaluation.tracing import mean_trace

COUNT = 12
IDS = torch.arange(COUNT) * 7
ATTACKS = {
    "pgd": lambda model, **o: PGD(model, 0.1, steps=5, **o),
    "pgd-early": lambda model, **o: PGD(model, 0.1, steps=8, early_stop=True, **o),
    "mifgsm": lambda model, **o: MIFGSM(model, 0.1, steps=4, **o),
    "apgd": lambda model, **o: APGD(model, "Linf", 0.1, steps=5, early_stop=True, **o),
    "apgdt": lambda model, **o: APGDT(model, "L2", 1.5, steps=4, target_classes=2, **o),
    "fab": lambda model, **o: FAB(model, "Linf", 0.1, steps=4, target_classes=2, early_stop=True, **o),
    "square": lambda model, **o: Square(model, "Linf", 0.15, n_queries=40, **o),
    "cw": lambda model, **o: CW(model, c=1.0, steps=6, lr=0.1, **o),
    "cw-early": lambda model, **o: CW(model, c=1.0, steps=10, search_steps=2, lr=0.1, early_stop=True, **o),
    "stadv": lambda model, **o: StAdv(model, 0.1, steps=4, **o),
}


@pytest.fixture(scope="module")
def digits():
    data = mnist().take(slice(0, COUNT))
    return data.images, data.labels


def told(build, model, x, y, ids, **options):
    """An attack's trace and its result."""
    steps: list[TraceStep] = []
    return steps, build(model, callback=steps.append, **options)(x, y, ids)


def one_by_one(build, model, x, y):
    """Mean loss and accuracy after each step: every image alone, with what it had last where it is done."""
    alone = [told(build, model, x[i : i + 1], y[i : i + 1], IDS[i : i + 1])[0] for i in range(len(x))]
    means = {}
    for step in sorted({line.step for lines in alone for line in lines}):
        last = [[line for line in lines if line.step <= step][-1] for lines in alone if lines]
        loss, correct = sum(line.loss for line in last) / len(last), sum(line.accuracy for line in last) / len(x)
        means[step] = (loss, correct)
    return means


@pytest.mark.parametrize("name", list(ATTACKS))
def test_steps_are_the_means_over_images(digits, name, monkeypatch):
    x, y = digits
    expected = one_by_one(ATTACKS[name], standard_mnist(), x, y)
    result = ATTACKS[name](standard_mnist())(x, y, IDS)
    for slots in (256, 8):
        # Images that wait for a place in the batch.
        monkeypatch.setitem(queue.SLOTS, "cpu", slots)
        steps, traced = told(ATTACKS[name], standard_mnist(), x, y, IDS)
        assert torch.equal(traced, result)
        assert [line.step for line in steps] == list(expected)
        for line in steps:
            assert (line.loss, line.accuracy) == pytest.approx(expected[line.step], rel=1e-5, abs=1e-6)
            assert (line.images, line.restart) == (COUNT, 0)
        assert all(a.forward <= b.forward and a.backward <= b.backward for a, b in itertools.pairwise(steps))
    assert 0 <= steps[-1].accuracy <= steps[0].accuracy <= 1


def test_a_defense_is_right_in_a_share_of_its_draws(digits):
    x, y = digits
    defense = Defense(RT2(4, sigma=0.2), None, standard_mnist())
    attack = PGD(defense, 0.1, alpha=0.02, steps=3, eot_iter=4)
    with counted_passes() as passes:
        steps, _ = told(lambda model, **o: PGD(model, 0.1, 0.02, 3, eot_iter=4, **o), defense, x, y, IDS)
    assert [line.step for line in steps] == [0, 1, 2]
    assert (steps[-1].forward, steps[-1].backward) == (passes.forward, passes.backward)
    with attack.prepared() as estimator:
        for line in steps:
            at = _iterate(defense, x, y, line.step)
            _, loss, correct = estimator.evaluate(at, y, IDS, torch.full_like(y, line.step))
            assert line.loss == pytest.approx(float(loss.mean()), rel=1e-5)
            assert line.accuracy == pytest.approx(float(correct.mean()))


def _iterate(defense, x, y, steps):
    if steps:
        return PGD(defense, 0.1, 0.02, steps, eot_iter=4)(x, y, IDS)
    attack = PGD(defense, 0.1, 0.02, 1)
    return attack.begin(attack.estimator(defense), Batch(x, y, IDS))["x"]


def test_restarts_are_runs_over_what_is_left(digits):
    x, y = digits
    steps, _ = told(
        lambda model, **o: PGD(model, 0.06, steps=8, n_restarts=3, early_stop=True, **o),
        standard_mnist(), x, y, IDS,
    )  # fmt: skip
    images = {line.restart: line.images for line in steps}
    assert list(images) == [0, 1, 2]
    assert COUNT == images[0] > images[1] >= images[2]
    for restart in images:
        own = [line.step for line in steps if line.restart == restart]
        assert own == sorted(set(own))
        assert own[0] == 0
    spent = [line.forward for line in steps]
    assert spent == sorted(spent)


def test_losses_that_are_no_numbers_are_left_out(digits):
    x, y = digits
    steps, _ = told(ATTACKS["pgd"], lambda x: x.flatten(1)[:, :10] * math.nan, x, y, IDS)
    assert [line.loss for line in steps] == [None] * 5


def test_an_ensemble_names_its_attacks(digits):
    x, y = digits
    steps: list[TraceStep] = []
    options = {"version": "custom", "attacks_to_run": ["apgd-ce", "square"], "steps": 3, "n_queries": 16}
    attack = AutoAttack(standard_mnist(), "Linf", 0.05, callback=steps.append, **options)
    adversarial = attack(x, y)
    assert list(dict.fromkeys(line.attack for line in steps)) == ["apgd-ce", "square"]
    assert torch.equal(adversarial, AutoAttack(standard_mnist(), "Linf", 0.05, **options)(x, y))


def test_who_does_not_observe_is_told(digits):
    class Silent(PGD):
        def observe(self, loss, correct):
            pass

    x, y = digits
    with pytest.raises(NotImplementedError, match="Silent has no trace"):
        Silent(standard_mnist(), steps=2, callback=print)(x, y)
    with pytest.raises(TypeError, match="PGD: callback must be a callable or None, got int"):
        PGD(standard_mnist(), callback=3)
    assert repr(PGD(standard_mnist(), callback=print)) == repr(PGD(standard_mnist()))


def run(trace, out=None, batch_size=5, interrupt=None, **options):
    data = mnist().take(slice(0, COUNT))
    defense = Defense(RT2(4, sigma=0.3), None, standard_mnist())

    def attacks(model):
        named = quick_attacks(model, eps=0.1, steps=3)
        if interrupt is not None:
            inner = named["pgd_eot"].callback = Interrupt(interrupt)
            assert inner.left == interrupt
        return named

    options = {"draws": 3, "selection_draws": 2, "progress": False, "diagnostics": (), "eps": 0.1, **options}
    return evaluate(
        defense, data.images, data.labels, attacks=attacks, out=out, batch_size=batch_size, trace=trace, **options
    )


class Interrupt:
    """Stops the process, as it were, after some steps."""

    def __init__(self, left):
        self.left = left

    def __call__(self, step):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_file_and_report_have_every_step_once(tmp_path):
    report = run(tmp_path / "trace.jsonl", tmp_path / "run")
    found = lines(tmp_path / "trace.jsonl")
    expected = [("fgsm", first, 0) for first in (0, 5, 10)]
    expected += [("pgd_eot", first, step) for first in (0, 5, 10) for step in range(3)]
    assert [(line["attack"], line["first"], line["step"]) for line in found] == expected
    assert report.trace == mean_trace(found)
    assert [(line["attack"], line["images"]) for line in report.trace] == [("fgsm", 12)] + [("pgd_eot", 12)] * 3
    assert json.loads((tmp_path / "run/report.json").read_text())["trace"] == report.trace
    assert "accuracy and loss against passes" in (tmp_path / "run/report.html").read_text()
    # Means over images do not depend on the batch size.
    other = run(tmp_path / "other.jsonl", batch_size=12)
    assert other.robust == report.robust
    for line, same in zip(other.trace, report.trace, strict=True):
        assert (line["loss"], line["accuracy"]) == pytest.approx((same["loss"], same["accuracy"]), rel=1e-6)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("steps", [0, 2, 4, 8])
def test_a_stopped_run_goes_on_without_a_step_twice(tmp_path, steps):
    whole = run(tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "trace.jsonl", tmp_path / "run", interrupt=steps)
    # Finished batches alone.
    assert len(lines(tmp_path / "trace.jsonl")) == 3 + steps // 3 * 3
    with open(tmp_path / "trace.jsonl", "a") as file:
        file.write('{"attack": "fg')
    assert run(tmp_path / "trace.jsonl", tmp_path / "run").trace == whole.trace
    assert lines(tmp_path / "trace.jsonl") == lines(tmp_path / "whole.jsonl")
    # And once more, with nothing left to do; another file gets what the run has.
    run(tmp_path / "again.jsonl", tmp_path / "run")
    assert lines(tmp_path / "again.jsonl") == lines(tmp_path / "whole.jsonl")


@pytest.mark.usefixtures("no_pictures")
def test_without_a_trace_nothing_is_told(tmp_path):
    report = run(None, tmp_path / "run")
    assert report.trace == []
    assert "trace" not in (tmp_path / "run/log.jsonl").read_text()
    assert "accuracy and loss against passes" not in (tmp_path / "run/report.html").read_text()


def test_what_is_no_trace_is_refused_and_left_alone(tmp_path):
    for text in ("important\n", '{"attack": "x"}\n', "[1]\n", "words"):
        (tmp_path / "file").write_text(text)
        with pytest.raises(ValueError, match="evaluate: trace must be a new file, or the trace of an evaluation, got"):
            run(tmp_path / "file")
        assert (tmp_path / "file").read_text() == text


@pytest.mark.usefixtures("no_pictures")
def test_a_damaged_trace_in_the_log_is_refused(tmp_path):
    run(tmp_path / "trace.jsonl", tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    log.write_text(log.read_text().replace('"step": 1', '"step": "one"'))
    with pytest.raises(ValueError, match="a run folder with whole logs"):
        run(tmp_path / "trace.jsonl", tmp_path / "run")


def test_units_that_end_early_count_with_their_last_step():
    def line(first, step, loss, accuracy, images):
        place = {"attack": "a", "first": first, "part": "PGD", "restart": 0, "step": step}
        return {**place, "images": images, "loss": loss, "accuracy": accuracy, "forward": 8, "backward": 8}

    units = [line(0, 0, 1.0, 1.0, 3), line(0, 1, 2.0, 0.0, 3), line(3, 0, None, 0.5, 1)]
    place = {"attack": "a", "part": "PGD", "restart": 0, "images": 4, "forward": 16, "backward": 16}
    assert mean_trace(units) == [
        {**place, "step": 0, "loss": 1.0, "accuracy": 0.875},
        {**place, "step": 1, "loss": 2.0, "accuracy": 0.125},
    ]


def test_scalars_of_tensorboard(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):
        report = run(None, tensorboard=tmp_path / "log")
    events = loader.EventAccumulator(str(tmp_path / "log/pgd_eot"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "accuracy", "forward", "backward"}
    own = [line for line in report.trace if line["attack"] == "pgd_eot"]
    assert [(e.step, e.value) for e in events.Scalars("accuracy")] == [
        (line["step"], pytest.approx(line["accuracy"], abs=1e-6)) for line in own
    ]


def test_a_callback_of_the_callers_is_called_too(digits):
    x, y = digits
    steps = []
    attack = PGD(standard_mnist(), 0.1, steps=3, callback=steps.append)
    report = evaluate(
        standard_mnist(), x, y, eps=0.1, attacks={"mine": attack, "other": lambda x, y, ids: x}, diagnostics=(),
        progress=False, tensorboard=None, trace=None,
    )  # fmt: skip
    assert len(steps) == 3
    assert report.trace == []
    with torch.no_grad():
        assert steps[0].accuracy >= steps[-1].accuracy
        assert math.isfinite(F.cross_entropy(standard_mnist()(x), y))


def one_of_two(number: int, variables: dict[str, str], folder: str) -> None:
    """One process of an evaluation, as torchrun would start it."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    report = run(Path(folder) / "trace.jsonl", Path(folder) / "run")
    (Path(folder) / f"rank{number}.json").write_text(json.dumps(report.trace))


@pytest.mark.slow
def test_two_processes_tell_what_one_tells(tmp_path):
    whole = run(tmp_path / "whole.jsonl")
    arguments = [(number, variables, str(tmp_path)) for number, variables in enumerate(ranks(2))]
    processes = [SPAWN.Process(target=one_of_two, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    assert lines(tmp_path / "trace.jsonl") == lines(tmp_path / "whole.jsonl")
    assert all(json.loads((tmp_path / f"rank{number}.json").read_text()) == whole.trace for number in range(2))
