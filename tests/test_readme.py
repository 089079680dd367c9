"""README and docs: their numbers are those of the committed result files, and the example runs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from atop_fast import build_classifier, build_purifier, save_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def readme_tables():
    """benchmarks/readme.py, which writes the tables."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "benchmarks"))
    return module


def test_tables_are_those_of_the_result_files(readme_tables):
    for page, tables in readme_tables.PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert tables
        for name in tables:
            assert readme_tables.filled(text, name) == text, f"{page}: {name}"


def test_every_loss_is_listed(readme_tables):
    """In the words of the page: whoever was faster than the same work of ours stands in its table of losses."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    losses = text.partition("<!-- losses -->")[2].partition("<!-- /losses -->")[0].splitlines()
    rows = [row for row in readme_tables.latest() if row["suite"] != "limits"]
    count = 0
    for ours in (row for row in rows if row["ours"]):
        for peer in (row for row in rows if not row["ours"]):
            same = all(ours[key] == peer[key] for key in ("suite", "case", "shape"))
            if (
                same
                and (ours["dtype"] == peer["dtype"] or ours["suite"] != "ops")
                and peer["median_s"] < ours["median_s"]
            ):
                names = (ours["case"], ours["shape"], ours["dtype"], ours["variant"], peer["variant"])
                assert any(line.startswith(f"| {' | '.join(names)} |") for line in losses), names
                count += 1
    assert count == len(losses) - 3


def test_the_demo_keeps_its_promises():
    """What the README says in words, over every recorded seed."""
    runs = json.loads((RESULTS / "demo--cpu.json").read_text())["runs"]
    assert len(runs) >= 3
    for run in runs:
        systems, attack = run["systems"], "pgd20_eot"
        assert systems["classifier"][attack]["mean"] < 0.05
        assert systems["finetuned"]["clean"]["mean"] > 0.9
        assert systems["finetuned"][attack]["mean"] > 2 * systems["pretrained"][attack]["mean"]
        assert systems["finetuned"][attack]["mean_ci"][0] > systems["pretrained"][attack]["mean_ci"][1]
        blind = run["findings"]["finetuned_against_classifier_alone"]
        assert blind[attack]["mean"] < systems["pretrained"][attack]["mean"]
        assert run["seconds"] < 300


def test_the_python_examples_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlxtend")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    classifier, purifier = {"channels": 1}, {"channels": 1, "width": 4}
    path = tmp_path / "runs/demo/classifier.safetensors"
    save_model(path, build_classifier("small_cnn", **classifier), "classifier", "small_cnn", **classifier)
    path = tmp_path / "runs/demo/finetuned.safetensors"
    save_model(path, build_purifier("unet", **purifier), "purifier", "unet", **purifier)
    codes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(codes) == 2
    for code in codes:
        exec(re.sub(r"slice\(0, \d+\)", "slice(0, 2)", code), {})
        assert len(capsys.readouterr().out.split()) == 4
    assert (tmp_path / "runs/report/report.html").is_file()


def test_links_and_commands_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert f"\n{target}: " in makefile
