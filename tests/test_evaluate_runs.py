"""Runs: folders that resume, refuse what is foreign or damaged, and are shared by several processes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from contextvars import ContextVar
from pathlib import Path

import pytest
import torch
from toolkit import PATIENCE, SPAWN, end_itself, ranks
from torch import nn

from atop_fast import RT2, Defense, evaluate
from atop_fast.evaluation import quick_attacks

pytestmark = pytest.mark.usefixtures("no_pictures")
COUNT = 40
Y = torch.arange(COUNT) % 10


def images() -> torch.Tensor:
    x = torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(1)) / 2
    # The classes are pixels, and the right one is brighter by little more than the noise.
    x.flatten(1)[torch.arange(COUNT), Y] = 0.7
    return x


# A function that attacks call first. It is not an attribute, because an attack that changes is another attack.
BEFORE: ContextVar = ContextVar("before")


def run(out, batch_size=10, before=lambda ids: None, sigma=0.1, **options):
    """An evaluation whose attacks call `before` first."""
    BEFORE.set(before)

    def attacks(model):
        def wrap(attack):
            def attacked(x, y, ids):
                BEFORE.get()(ids)
                return attack(x, y, ids)

            return attacked

        return {name: wrap(attack) for name, attack in quick_attacks(model, eps=0.1, steps=2).items()}

    defense = Defense(RT2(4, sigma=sigma), None, nn.Flatten())
    options = {"draws": 4, "selection_draws": 3, "progress": False, "attacks": attacks, "eps": 0.1, **options}
    options.setdefault("diagnostics", ())
    return evaluate(defense, images(), Y, out=out, batch_size=batch_size, **options)


def results(report) -> dict:
    """The contents of a report except its costs."""
    values = report if isinstance(report, dict) else report.to_dict()
    return {k: v for k, v in json.loads(json.dumps(values)).items() if k not in ("seconds", "passes")}


def written(folder: Path) -> dict:
    """results() of report.json, without what it holds besides the report."""
    values = results(json.loads((folder / "report.json").read_text()))
    return {k: v for k, v in values.items() if k not in ("systems", "threat_model", "answer", "doctor")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole():
    return results(run(None))


@pytest.mark.parametrize("stop_at", [0, 3, 6])
def test_a_stopped_run_goes_on_with_another_batch_size(tmp_path, whole, stop_at):
    attacked: list[int] = []

    def stop(ids):
        if len(attacked) == 10 * stop_at:
            raise KeyboardInterrupt
        attacked.extend(ids.tolist())

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", before=stop)
    assert len(attacked) == 10 * stop_at
    assert results(run(tmp_path / "run", batch_size=7, before=lambda ids: attacked.extend(ids.tolist()))) == whole
    # Each image once by each of the two attacks.
    assert sorted(attacked) == sorted(2 * list(range(COUNT)))
    assert written(tmp_path / "run") == whole
    # Once finished, nothing is attacked again.
    assert results(run(tmp_path / "run", before=lambda ids: pytest.fail("attacked again"))) == whole


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_stopped_evaluation_says_what_was_saved(tmp_path, capsys, number, error):
    def stop_in_the_third(ids):
        if int(ids[0]) == 20:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    for out, expected in ((tmp_path / "run", "clean 40, fgsm 20 of 40 images, and the same call"), (None, "nothing")):
        with pytest.raises(error) as stop:
            run(out, before=stop_in_the_third)
        assert error is KeyboardInterrupt or stop.value.code == 143
        assert signal.getsignal(number) is before
        assert expected in capsys.readouterr().err


def test_a_report_shows_itself_as_a_table():
    report = run(None)
    lines = repr(report).splitlines()
    assert lines[0] == "Report by the protocol custom, Linf, eps 0.1"
    assert lines[1].split() == ["system", "clean", "robust", "eight_bit", "fgsm", "pgd_eot"]
    assert f"{report.robust.mean:.3f}" in lines[3]
    assert len(lines) == 6
    cut = run(None, budget=0)
    assert "upper bounds" in repr(cut)
    assert [{s["attacked"] for s in r.samples} for r in (report, cut)] == [{True}, {False}]
    assert report.chance == 0.1


def test_a_torn_last_line_is_ignored(tmp_path, whole):
    run(tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-3]) + lines[-3][: len(lines[-3]) // 2])
    assert results(run(tmp_path / "run", batch_size=9)) == whole
    assert all(json.loads(line)["shard"] for line in log.read_text().splitlines())


def test_shards_hold_the_candidates(tmp_path):
    from safetensors.torch import load_file

    run(tmp_path / "run")
    shards = {p.name.split("-")[0]: load_file(p) for p in sorted((tmp_path / "run/shards").iterdir())}
    rounded = [name for name in shards if name.endswith("@8bit")]
    assert {"clean", "fgsm", "pgd_eot"} == shards.keys() - rounded
    assert rounded
    assert "images" not in shards["clean"]
    shard = shards["pgd_eot"]
    assert shard["images"].dtype == torch.float32
    assert (shard["images"] - images()[shard["ids"]]).abs().max() <= 0.1 + 1e-6
    assert shard["values.predictions"].shape == (10, 4)
    assert shard["values.predictions"].dtype == torch.uint8
    assert all(shards[name]["images"].dtype == torch.uint8 for name in rounded)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"seed": 1}, "seed"), ({"draws": 5}, "draws"), ({"sigma": 0.2}, "model"), ({"eps": 0.2}, "eps")],
    ids=["seed", "draws", "model", "eps"],
)
def test_a_run_of_something_else_is_refused(tmp_path, change, what):
    run(tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(
        ValueError, match=rf"evaluate: out must be a new folder .* belongs to a run with another {what}"
    ):
        run(tmp_path / "run", **change)
    assert contents(tmp_path) == before


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"a new folder or one of this run, got .* holds 'notes.txt' and no run.json"):
        run(tmp_path)
    assert contents(tmp_path) == {str(tmp_path / "notes.txt"): b"mine"}
    with pytest.raises(ValueError, match="evaluate: out must be a writable folder"):
        run(tmp_path / "notes.txt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{")
    with pytest.raises(ValueError, match="evaluate: out must be a readable run folder"):
        run(tmp_path / "run")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    run(tmp_path / "run")
    shard = sorted((tmp_path / "run/shards").iterdir())[5]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(data if damage == "flip" else data[:-9])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"evaluate: out must be a run folder with whole shards, got .*{shard.name}"):
        run(tmp_path / "run")
    assert contents(tmp_path) == before


def test_a_damaged_log_is_named(tmp_path):
    run(tmp_path / "run")
    log = tmp_path / "run/log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + b"no json\n" + b"".join(lines[1:]))
    with pytest.raises(ValueError, match=r"whole logs, got .*log.jsonl, damaged in line 2"):
        run(tmp_path / "run")


def units(folder: Path) -> int:
    """How much of a run its processes have written down."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("log*.jsonl"))


def rank(number: int, variables: dict[str, str], out: str | None, result: str, options: dict) -> None:
    """One process of a run, as torchrun would start it."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    delay, dies = options.pop("delay", 0), options.pop("dies", None)
    if stop := options.pop("stop", None):
        end_itself(signal.SIGKILL, lambda: units(Path(out)) >= stop[0], stop[1])

    def before(ids):
        time.sleep(delay)
        if number == dies:
            os._exit(9)

    report = run(None if out is None else Path(out), before=before, **options)
    (Path(result) / f"rank{number}.json").write_text(json.dumps(results(report)))


def start(size: int, out: Path | None, result: Path, **options) -> list:
    where = None if out is None else str(out)
    arguments = [(number, variables, where, str(result), options) for number, variables in enumerate(ranks(size))]
    processes = [SPAWN.Process(target=rank, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    return processes


def finish(processes: list) -> list[int]:
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("folder", [False, True])
def test_two_processes_find_what_one_finds(tmp_path, whole, folder):
    out = tmp_path / "run" if folder else None
    assert finish(start(2, out, tmp_path, batch_size=7)) == [0, 0]
    assert all(json.loads((tmp_path / f"rank{i}.json").read_text()) == whole for i in range(2))
    if folder:
        assert written(out) == whole
        assert {p.name for p in out.glob("log*.jsonl")} == {"log.jsonl", "log-1.jsonl"}
        # One process reads the logs of two.
        assert results(run(out, before=lambda ids: pytest.fail("attacked again"))) == whole


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(tmp_path):
    processes = start(2, tmp_path / "run", tmp_path, dies=1)
    processes[1].join(PATIENCE)
    # The limit of the wait for others is a day: what ends before the patience of `finish` has noticed.
    codes = finish(processes)
    assert codes[1] == 9
    assert codes[0] not in (0, None)
    assert not (tmp_path / "run/report.json").exists()
    assert finish(start(1, tmp_path / "run", tmp_path)) == [0]


@pytest.mark.slow
def test_ranks_with_different_settings_are_refused(tmp_path):
    arguments = [(i, variables, None, str(tmp_path), {"seed": i}) for i, variables in enumerate(ranks(2))]
    processes = [SPAWN.Process(target=rank, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    assert finish(processes) == [1, 1]


def test_a_report_holds_the_diagnostics_of_its_model(tmp_path):
    report = run(tmp_path / "whole", diagnostics=True)
    names = [finding["name"] for finding in report.diagnostics]
    assert {"logits", "determinism", "eps_sweep", "useless_transform"} <= set(names)
    assert json.loads((tmp_path / "whole" / "report.json").read_text())["diagnostics"] == report.diagnostics
    page = (tmp_path / "whole" / "report.html").read_text()
    assert all(name in page for name in names)

    def fail(*args, **options):
        raise AssertionError("examined again")

    # A call that goes on with the run does not examine the model again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("atop_fast.evaluation.findings"), "examine", fail)
        assert results(run(tmp_path / "whole", diagnostics=True)) == results(report)


@pytest.mark.parametrize("text", ["", '[{"name": 1}]', "{}"])
def test_damaged_findings_are_named(tmp_path, text):
    run(tmp_path)
    (tmp_path / "diagnostics.json").write_text(text)
    with pytest.raises(ValueError, match=r"evaluate: out must be a run folder with whole findings, got .*diagnostics"):
        run(tmp_path, diagnostics=True)


def test_other_images_are_no_other_model(tmp_path):
    """A run knows its model by its logits at the images, so that other images say nothing about it."""
    model, options = nn.Flatten(), {"attacks": {"none": lambda x, y: x}, "progress": False, "diagnostics": False}
    x, y = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    evaluate(model, x, y, out=tmp_path, **options)
    with pytest.raises(ValueError, match=r"belongs to a run with another data$"):
        evaluate(model, 1 - x, y, out=tmp_path, **options)
    with pytest.raises(ValueError, match=r"belongs to a run with another model$"):
        evaluate(lambda z: -model(z), x, y, out=tmp_path, **options)
