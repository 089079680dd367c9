"""A run's script that repeats it, and its archive, which another machine evaluates without the images' folder."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import fail, files, tiny  # noqa: F401
from torch import nn

from atop_fast import evaluate
from atop_fast.cli import main
from atop_fast.data import Dataset
from atop_fast.recipes.budget import Budget
from atop_fast.recipes.images import read_images, save_images
from atop_fast.recipes.pack import _quoted, evaluation_script, given_files, system_of, unpack
from atop_fast.recipes.run import run_recipe
from atop_fast.recipes.schema import load_recipe

pytestmark = pytest.mark.usefixtures("no_pictures")
SHORT = ["--classifier.training.epochs=1", "--pretrain.epochs=1", "--finetune.epochs=1", "--evaluation.images=2"]


@pytest.mark.slow
def test_an_archive_is_evaluated_as_the_run_was(tiny, capsys, tmp_path):  # noqa: F811
    main(["train", "tiny.yaml", "--out=run", *SHORT])
    shown = capsys.readouterr().out
    main(["report", "run", "--pack=run.zip"])
    out = capsys.readouterr().out
    assert "Wrote run.zip" in out
    # Beside what the training says, the report is shown again.
    assert all(line in shown.splitlines() for line in out.splitlines()[:-1])
    with zipfile.ZipFile("run.zip") as archive:
        names = set(archive.namelist())
    assert names == {
        *("defense.safetensors", "held_out.safetensors", "gallery.png", "recipe.yaml", "repeat.sh"),
        *("report.html", "report.json", "run.json"),
    }
    main(["evaluate", "run", "--out=near", "--diagnostics=false"])
    os.mkdir("elsewhere")
    os.rename("run.zip", "elsewhere/run.zip")
    os.rename("images", "hidden")
    os.chdir("elsewhere")
    main(["evaluate", "run.zip", "--out=far", "--diagnostics=false"])
    expected = json.loads(Path("../run/evaluate_finetuned/report.json").read_text())
    for path in ("../near", "far"):
        report = json.loads(Path(path, "report.json").read_text())
        assert report["samples"] == expected["samples"]
        assert (report["protocol"], report["eps"], report["draws"]) == (expected["protocol"], 0.2, 2)
    # The report says how to repeat it.
    script = Path("far/repeat.sh").read_text()
    assert 'atop-fast evaluate run.zip --diagnostics=false --out "$out"' in script
    assert hashlib.sha256(Path("run.zip").read_bytes()).hexdigest() in script
    assert "run.zip sha256:" in Path("far/report.html").read_text()
    assert report["samples"][0]["file"].startswith("class")
    # Options of the command replace those of the run.
    main(["evaluate", "run.zip", "--out=other", "--eps=0.1", "--images=1", "--steps=1", "--diagnostics=false"])
    report = json.loads(Path("other/report.json").read_text())
    assert (report["eps"], report["images"]) == (0.1, 1)
    assert list(report["attacks"]) == ["fgsm", "pgd_eot"]
    fast = ["--protocol=bpda-eot", "--draws=1", "--images=1", "--eps=0", "--diagnostics=false"]
    main(["evaluate", "run.zip", "--out=protocol", *fast])
    assert json.loads(Path("protocol/report.json").read_text())["protocol"] == "bpda-eot"
    # A radius in Linf is none in L2: a protocol of another norm has its own.
    kept = system_of(Path("run.zip"), tmp_path / "unpacked", ["run.zip", "--protocol", "pgd-eot"])
    assert (kept["eps"], "steps" in kept) == (0.2, False)
    kept = system_of(Path("run.zip"), tmp_path / "unpacked", ["run.zip", "--protocol=unseen"])
    assert not {"norm", "eps"} & kept.keys()


def test_a_radius_of_a_run_is_not_one_of_another_norm(tmp_path):
    evaluation = {"protocol": "quick", "norm": None, "eps": 0.2}
    header = {"data": {}, "evaluation": evaluation, "classifier": {}, "images": "", "seed": 3}
    (tmp_path / "run.json").write_text(json.dumps(header))
    for given, expected in (
        ([], 0.2),
        (["--norm=Linf"], 0.2),
        (["--norm=L2"], None),
        (["--norm", "L1"], None),
        (["--protocol=unseen"], None),
    ):
        assert system_of(tmp_path, tmp_path, ["run", *given]).get("eps") == expected


@pytest.mark.slow
def test_a_run_says_how_to_repeat_it(tiny, capsys):  # noqa: F811
    main(["train", "tiny.yaml", "--out=run", *SHORT, "--seed=3"])
    header = json.loads(Path("run/run.json").read_text())
    recipe = load_recipe("run/recipe.yaml")
    assert recipe.finetune.epochs == 1
    assert json.loads(json.dumps(recipe.__dict__, default=lambda v: v.__dict__)) == {
        key: value for key, value in header.items() if key not in ("seed", "images")
    }
    script = Path("run/repeat.sh").read_text()
    assert "atop-fast train recipe.yaml --seed 3" in script
    assert f'--data.source "${{DATA_SOURCE:-{Path("images").absolute()}}}"' in script
    assert "How to repeat it" in Path("run/report.html").read_text()
    # Other images than those that were attacked make no archive.
    for file in Path("images/class1").iterdir():
        shutil.copy("images/class0/0.png", file)
    error = fail(capsys, "report", "run", "--pack=run.zip")
    assert "report: run must be one whose images are as they were" in error
    assert not Path("run.zip").exists()
    assert "the folder of a finished run, with defense.safetensors" in fail(capsys, "report", "images", "--pack=x.zip")


@pytest.mark.slow
def test_the_script_repeats_the_run_elsewhere(tiny):  # noqa: F811
    main(["train", "tiny.yaml", "--out=run", *SHORT])
    os.rename("images", 'moved it\'s "here" $HOME')
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["DATA_SOURCE"] = str(Path('moved it\'s "here" $HOME').absolute())
    command = ["sh", "run/repeat.sh", str(Path("again").absolute())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "The verdicts are the same." in done.stdout


@pytest.mark.slow
def test_the_script_repeats_an_evaluation(tiny):  # noqa: F811
    main(["train", "tiny.yaml", "--out=run", *SHORT])
    main(["evaluate", "run", "--out", "it's", "--diagnostics=false"])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def repeat():
        command = ["sh", "it's/repeat.sh", "again"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    assert (done := repeat()).returncode == 0, done.stderr
    assert "The verdicts are the same." in done.stdout
    Path("run/defense.safetensors").write_bytes(b"another")
    assert "run/defense.safetensors is not the file that was evaluated" in repeat().stderr


def test_a_folder_whose_name_is_no_utf8_is_named_by_its_bytes(tmp_path, monkeypatch):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    try:
        os.mkdir(folder)
    except OSError as error:
        pytest.skip(f"the file system refuses the name: {error}")
    monkeypatch.chdir(os.fsdecode(folder))
    images = {os.fsdecode(b"\xff.pt"): "0" * 64}
    script = evaluation_script(["evaluate", *images], images, {"atop_fast": "1", "torch": "2"})
    evaluate(
        nn.Flatten(), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), out="e", diagnostics=(), progress=False,
        about={"repeat": script, "files": ", ".join(images)},
    )  # fmt: skip
    written = Path("e/repeat.sh").read_bytes()
    assert b"\ncd " + os.fsencode(shlex.quote(os.fsdecode(folder))) + b"\n" in written
    assert b"atop-fast evaluate '\xff.pt'" in written
    page = Path("e/report.html").read_text(encoding="utf-8")
    assert "How to repeat it" in page
    assert "?.pt" in page


def test_the_arguments_of_an_evaluation(tmp_path, monkeypatch):
    """Its outputs are left out, and files are found among options and others."""
    monkeypatch.chdir(tmp_path)
    Path("x.pt").write_bytes(b"x")
    Path("t.jsonl").write_bytes(b"lines of a call that was stopped")
    written = ["--out=p", "--trace=t.jsonl", "--trace", "t.jsonl"]
    given = ["evaluate", "--out", "o", "--classifier=x.pt", "--key", "a b", *written, "--budget", "1s"]
    assert given_files([*given, "--data={" + 300 * "x" + "}"]) == given_files(given)
    found = given_files(given)
    assert found == {"x.pt": hashlib.sha256(b"x").hexdigest()}
    script = evaluation_script(given, found, {"atop_fast": "1", "torch": "2"})
    assert "\natop-fast evaluate --classifier=x.pt --key 'a b' --budget 1s --out \"$out\"\n" in script
    assert "--budget ends it by the clock" in script
    assert "by the clock" not in evaluation_script(["evaluate"], {}, {"atop_fast": "1", "torch": "2"})


@pytest.mark.slow
def test_a_run_under_a_budget_is_repeated_without_it(tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Budget, "limit", lambda *_: 600.0)
    options = {"progress": False, "until": "evaluate"}
    recipe = replace(load_recipe("tiny.yaml"), ablation=True)
    first = run_recipe(recipe, "run", budget=3, **options)
    again = run_recipe(load_recipe("run/recipe.yaml"), "again", **options)
    assert again["systems"] == first["systems"]
    assert again["findings"] == first["findings"]
    assert "budget" not in again


@pytest.mark.parametrize("text", ["plain", "it's", 'a"b', "a $HOME `id` \\ b}c", "two  spaces"])
def test_paths_in_the_script_are_taken_as_they_are(text):
    script = f'printf %s "${{NONE:-{_quoted(text)}}}"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout == text


def test_images_round_trip(tmp_path):
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    data = Dataset(images, torch.tensor([1, 0, 2, 1]), ("a", "b", "c"))
    for name, given in (("bytes", data), ("floats", data.floats())):
        save_images(tmp_path / name, given)
        found = read_images(tmp_path / name)
        assert torch.equal(found.images, images)
        assert torch.equal(found.labels, data.labels)
        assert found.classes == data.classes
    bad = {
        "classes": Dataset(images, data.labels, ("a", "b")),
        "labels": Dataset(images, data.labels[:2], data.classes),
        "uint8": Dataset(images[0], data.labels, data.classes),
    }
    for name, given in bad.items():
        save_images(tmp_path / "bad", given)
        with pytest.raises(ValueError, match=rf"read_images: path must be a file of images .*{name}"):
            read_images(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(b"no file of tensors")
    with pytest.raises(ValueError, match="read_images: path must be a file of images"):
        read_images(tmp_path / "bad")


def test_foreign_archives_are_refused(tmp_path):
    path, folder = tmp_path / "run.zip", tmp_path / "folder"
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="RUN must be an archive"):
        unpack(path, folder)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../outside", "x")
        file.writestr("run.json", "{}")
    with pytest.raises(ValueError, match=r"RUN must be an archive .*defense.safetensors"):
        unpack(path, folder)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("defense.safetensors", bytes(2**25))
    with pytest.raises(ValueError, match=r"defense\.safetensors would take 33,554,432 bytes"):
        unpack(path, folder)
    assert not (tmp_path / "outside").exists()
    assert not folder.exists()
