"""The files for services around the repository agree with the project: citation, workflow, pre-commit hooks."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def load(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pyproject():
    return (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_citation_is_of_this_version(pyproject):
    citation = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    for key in ("version", "license"):
        assert citation[key] == re.search(rf'^{key} = "(.+)"$', pyproject, re.MULTILINE)[1]
    [paper] = citation["references"]
    assert paper["url"] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert paper["identifiers"][0]["value"].split(":")[1] in paper["url"]


def test_the_workflow_runs_what_everybody_runs():
    [job] = load(".github/workflows/ci.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands.count(".ci/run") == 1
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_hooks_are_the_tools_of_make_lint():
    [repository] = load(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].removeprefix(".venv/bin/").split()[0] for hook in repository["hooks"]]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    assert hooks == re.findall(r"\$\(BIN\)/(\S+)", lint)
