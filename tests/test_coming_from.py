"""The page for users of other libraries: both columns of every row run, and rows of equal images are equal."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import atop_fast
from atop_fast.randomness import seeded

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text(encoding="utf-8")
LIBRARIES = {"torchattacks": "torchattacks", "AutoAttack": "autoattack", "foolbox": "foolbox",
             "RobustBench": "robustbench", "ART": "art"}  # fmt: skip
SAME, LOADS = ("same images", "same logits"), ("load_model(", "load_classifier(")


def rows():
    """(library, their code, our code, what differs) of every row."""
    for section in PAGE.split("\n## ")[1:]:
        library = section.partition("\n")[0]
        for line in section.splitlines():
            if line.startswith("| `"):
                theirs, ours, differs = line.strip("| ").split(" | ")
                yield pytest.param(library, theirs.strip("`"), ours.strip("`"), differs, id=f"{library}-{theirs[:60]}")


@pytest.fixture(scope="module")
def names():
    """The objects of the page's block."""
    found: dict[str, object] = {}
    with seeded(0):
        exec(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], found)
    return found


def run(code, names):
    """Run statements on one line, and return the value of the last."""
    *first, last = ast.parse(code).body
    assert isinstance(last, ast.Expr)
    names = dict(names)
    exec(compile(ast.Module(first, []), code, "exec"), names)
    return eval(compile(ast.Expression(last.value), code, "eval"), names)


def our_names(code, names):
    """The names that our code needs, or a skip: one row puts ART's preprocessing into a model."""
    if "SpatialSmoothing" not in code:
        return names
    return {**names, "SpatialSmoothing": pytest.importorskip("art.defenses.preprocessor").SpatialSmoothing}


def bind(code, names):
    """Check the arguments of a call whose function must not run."""
    call = ast.parse(code, mode="eval").body
    function = eval(compile(ast.Expression(call.func), code, "eval"), dict(names))
    keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    inspect.signature(function).bind(*map(ast.literal_eval, call.args), **keywords)


def their_names(library, code, names):
    """The objects that their code needs; skips if the library is missing."""
    found = {**our_names(code, names)}
    if library == "ART":
        estimators = pytest.importorskip("art.estimators.classification")
        found["art"] = importlib.import_module("art.attacks.evasion")
        found["PyTorchClassifier"] = estimators.PyTorchClassifier
        found["classifier"] = estimators.PyTorchClassifier(
            names["model"], torch.nn.CrossEntropyLoss(), (3, 8, 8), nb_classes=10, clip_values=(0, 1), device_type="cpu"
        )
        arrays = zip("xyt", (names["images"], names["labels"], names["targets"]), strict=True)
        return found | {name: value.numpy() for name, value in arrays}
    if code.startswith("AutoAttack("):
        found["AutoAttack"] = pytest.importorskip("autoattack").AutoAttack
        return found
    root = code.split(".")[0].split(" ")[-1]
    found[root] = pytest.importorskip(root)
    for module in re.findall(rf"{root}\.(\w+)\.\w+\(", code):
        importlib.import_module(f"{root}.{module}")
    return found


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """The other packages seed torch's and numpy's global generators, and a row writes a file."""
    monkeypatch.chdir(tmp_path)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    yield
    torch.set_rng_state(torch_state)
    np.random.set_state(numpy_state)


@pytest.mark.parametrize(("library", "theirs", "ours", "differs"), rows())
@pytest.mark.filterwarnings("ignore")
def test_ours_runs(library, theirs, ours, differs, names):
    assert ours.startswith("atop.")
    if any(load in ours for load in LOADS):
        bind(ours, names)
        return
    value = run(ours, our_names(ours, names))
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        assert value.shape == names["images"].shape
        assert 0 <= value.min() <= value.max() <= 1
    else:
        assert isinstance(value, (torch.Tensor, float, atop_fast.Report))


@pytest.mark.parametrize(("library", "theirs", "ours", "differs"), rows())
@pytest.mark.filterwarnings("ignore")
def test_theirs_runs_and_same_images_are_the_same(library, theirs, ours, differs, names):
    needed = their_names(library, theirs, names)
    if any(load in theirs for load in LOADS):
        bind(theirs, needed)
        return
    if library == "RobustBench" and "benchmark(" in theirs:
        eval_module = pytest.importorskip("robustbench.eval")
        if not hasattr(eval_module, "benchmark"):
            pytest.skip("this robustbench has no benchmark()")
        bind(theirs, {**needed, "robustbench": importlib.import_module("robustbench")})
        return
    value = run(theirs, needed)
    if differs.startswith(SAME):
        expected = run(ours, our_names(ours, names))
        value = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))
        assert not torch.equal(expected, names["images"])
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-5)


def test_every_library_has_rows():
    found = [row.values for row in rows()]
    assert {row[0] for row in found} == set(LIBRARIES)
    assert sum(row[3].startswith(SAME) for row in found) >= 10
    assert all(len(row) == 4 and "`" not in row[1] + row[2] for row in found)
