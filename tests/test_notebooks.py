"""The notebooks in examples/ run from top to bottom and print what they show, up to the digits of numbers.

`python tests/test_notebooks.py` executes them and writes their outputs.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def execute(notebook: dict[str, Any]) -> list[str]:
    """The output of each code cell, executed in one namespace, as by a kernel."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), "cell", "exec"), names)
            printed.append(out.getvalue())
    return printed


def shown(notebook: dict[str, Any]) -> list[str]:
    """The text below each code cell."""
    cells = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    return ["".join("".join(output["text"]) for output in cell["outputs"]) for cell in cells]


def words(text: str) -> list[str]:
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", text).split()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_shows(path, tmp_path, monkeypatch):
    pytest.importorskip("mlxtend")
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    printed = execute(notebook)
    assert any(printed)
    assert list(map(words, printed)) == list(map(words, shown(notebook)))


def main() -> None:
    """Write the outputs of all notebooks."""
    warnings.simplefilter("ignore")
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for count, (cell, text) in enumerate(zip(code, execute(notebook), strict=True), start=1):
            stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
            cell |= {"execution_count": count, "outputs": [stream] if text else []}
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
