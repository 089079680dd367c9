"""Forbidden operations, searched for in the source: unpickling, evaluating text, starting programs, the network."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from atop_fast.evaluation.pictures import gallery
from atop_fast.evaluation.report import write_report

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "atop_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
# Modules that load code or data from elsewhere, start programs or unpack archives. `pickle` is named for its error.
MODULES = {
    *(
        "subprocess",
        "socket",
        "urllib",
        "http",
        "ftplib",
        "smtplib",
        "requests",
        "aiohttp",
        "httpx",
        "ssl",
        "webbrowser",
    ),
    *("tarfile", "zipfile", "shelve", "marshal", "dill", "cloudpickle", "joblib", "ctypes", "runpy", "code", "pty"),
}
# Benchmarks ask git for the commit, start themselves as several processes, and tell the allocator to keep its memory.
BENCH = {"results.py": "import subprocess", "scaling.py": "import subprocess", "harness.py": "import ctypes"}
# An archive of a run is a zip file, of which three members are read by their names; of a classifier's archive, the
# table of contents. A class in a .py file runs by consent: see test_own_classifier.py.
RECIPES = {"pack.py": "import zipfile"}
CLASSIFIERS = {"programs.py": ("import zipfile", "exec()", "compile()", "torch.jit.load()", "torch.export.load()")}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "os": {"system", "popen", "execv", "execve", "execvp", "spawnl", "spawnv", "fork", "posix_spawn", "startfile"},
    "pickle": {"load", "loads", "Unpickler"},
    "yaml": {"full_load", "unsafe_load", "FullLoader", "UnsafeLoader", "Loader", "load_all"},
    "numpy": {"load", "fromregex"},
    "np": {"load", "fromregex"},
    "torch": {"hub"},
    "shutil": {"unpack_archive"},
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(source: str) -> list[str]:
    """The forbidden operations in a source, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found += [f"{node.lineno}: import {name}" for name in names if name.partition(".")[0] in MODULES]
        if isinstance(node, ast.Attribute):
            owner = dotted(node.value)
            if node.attr in ATTRIBUTES.get(owner, ()) or (owner == "torch" and node.attr in ATTRIBUTES["torch"]):
                found.append(f"{node.lineno}: {owner}.{node.attr}")
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            # torch's loader of exported programs unpickles, and that of TorchScript runs code.
            if called in ("torch.jit.load", "torch.export.load"):
                found.append(f"{node.lineno}: {called}()")
            if called in CALLS:
                found.append(f"{node.lineno}: {called}()")
            if called == "torch.load" and getattr(options.get("weights_only"), "value", None) is not True:
                found.append(f"{node.lineno}: torch.load without weights_only=True")
            if called == "yaml.load" and [dotted(a) for a in node.args[1:]] not in (["_Loader"], ["_WithoutDates"]):
                found.append(f"{node.lineno}: yaml.load with another loader")
            if getattr(options.get("shell"), "value", None):
                found.append(f"{node.lineno}: shell=True")
            if called.endswith(("load_state_dict_from_url", "download_url", "hf_hub_download", "urlopen")):
                found.append(f"{node.lineno}: {called}()")
            if getattr(options.get("trust_remote_code"), "value", None):
                found.append(f"{node.lineno}: trust_remote_code")
    return found


def test_nothing_runs_or_fetches_what_is_read():
    assert len(SOURCES) > 100
    found = []
    for path in SOURCES:
        folders = {"bench": BENCH, "recipes": RECIPES, "classifiers": CLASSIFIERS}
        allowed = folders.get(path.parent.name, {}).get(path.name, "")
        known = (allowed,) if isinstance(allowed, str) else allowed
        wrong = [fault for fault in faults(path.read_text(encoding="utf-8")) if fault.split(": ")[1] not in known]
        found += [f"{path.relative_to(ROOT)}:{fault}" for fault in wrong]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "from urllib.request import urlopen",
        "import os\nos.system('x')",
        "import pickle\npickle.loads(b'')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\ntorch.load('x', weights_only=flag)",
        "import torch\ntorch.hub.load('x', 'y')",
        "import yaml\nyaml.load(text, yaml.SafeLoader)",
        "import yaml\nyaml.unsafe_load(text)",
        "eval('1')",
        "import zipfile",
        "f(shell=True)",
    ],
)
def test_what_is_forbidden_is_found(source):
    assert len(faults(source)) >= 1


SCRIPT = "<script>alert(1)</script>"
HOSTILE = (SCRIPT, '"><img src=x onerror=alert(1)>', "'; DROP", "{{ 7 * 7 }}", "{% for x in y %}", "$\\frac{$", "&amp;")


def verdict():
    numbers = dict.fromkeys(("mean", "majority", "worst"), 0.5)
    return {**numbers, **{f"{key}_ci": [0.4, 0.6] for key in numbers}, "draws": 2, "images": 4}


def test_reports_escape_all_names(tmp_path):
    for hostile in HOSTILE:
        data = {
            "seed": 0,
            "versions": {hostile: hostile},
            "threat_model": {"norm": hostile, "eps": 0.1},
            "systems": {hostile: {"clean": verdict(), hostile: verdict()}},
        }
        write_report(tmp_path, hostile, data, notes=[hostile], picture=b"\x89PNG", picture_caption=hostile)
        page = (tmp_path / "report.html").read_text()
        assert "<script" not in page.lower()
        assert "<img src=x" not in page
        assert json.loads((tmp_path / "report.json").read_text())["systems"].keys() == {hostile}


def test_pictures_show_any_name():
    """Text that matplotlib would parse as mathematics stays text."""
    image = torch.rand(2, 1, 8, 8)
    rows = [(name, image, (name, name)) for name in HOSTILE]
    assert gallery(rows, 0.1).startswith(b"\x89PNG")
