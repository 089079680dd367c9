"""Every program in examples/ runs, in its quick form, and what it prints is sensible."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import models
import pytest

import atop_fast as atop

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "digits")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def program(tmp_path_factory, monkeypatch, capsys):
    """Run a program in a folder that all of them share; what it printed."""
    folder = tmp_path_factory.getbasetemp() / "examples"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(atop, "mnist5k", models.all_digits)
    # An example registers its own; afterwards it is gone.
    monkeypatch.setitem(atop.purifiers.PURIFIERS, "denoiser", None)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", PROGRAMS)
def test_quick_form_runs(program, name):
    pytest.importorskip("mlxtend")
    if name == "attack_with_torchattacks":
        pytest.importorskip("torchattacks")
    values = [float(value) for value in re.findall(r"\b[01]\.\d{2,3}\b", program(name, "--quick").split("clean")[-1])]
    assert len(values) >= 3
    assert all(0 <= value <= 1 for value in values)


def masked(line):
    """A line without its numbers and without the space between columns."""
    return " ".join(re.sub(r"[+-]?\d[\d,.]*", "#", line).split())


def test_own_classifier_walks_from_its_class_to_a_colleague(tmp_path):
    """Its output, shortened, stands in the README."""
    pytest.importorskip("mlxtend")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["sh", str(EXAMPLES / "own_classifier.sh"), str(tmp_path / "new")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "The colleague's verdict is the same, image by image." in done.stdout
    assert "trust must be given" in done.stderr
    printed = {masked(line) for line in done.stdout.splitlines()}
    block = (ROOT / "README.md").read_text().partition("examples/own_classifier.sh")[2].partition("```text\n")[2]
    shown = [line for line in block.partition("```")[0].splitlines() if line and line != "..."]
    assert len(shown) > 12
    # Commands may be shortened, and the colleague may be another user than in the README.
    lines = [line for line in shown if not line.endswith(" ...") and not line.startswith("The colleague, as user")]
    assert [line for line in lines if masked(line) not in printed] == []
    # It wants an empty folder.
    assert subprocess.run(script, env=environment, capture_output=True, text=True).returncode == 2


def test_coin_flip_is_what_the_docs_show(program, tmp_path):
    """The committed result, again; and it says what docs/evaluation.md says."""
    path = tmp_path / "coin.json"
    program("coin_flip", "--json", str(path))
    results = json.loads(path.read_text())
    assert results == json.loads((ROOT / "benchmarks/results/counted/coin-flip.json").read_text())
    low, high = results["evaluate"]["mean_ci"]
    assert low <= results["right"] <= high
    assert results["autoattack"]["standard"]["square"] < results["autoattack"]["rand"]["apgd-dlr"] < low
