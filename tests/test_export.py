"""A report's table as CSV and LaTeX: every number of the report, and what a budget left out."""

from __future__ import annotations

import csv
import dataclasses
import re

import pytest
import torch

import atop_fast as atop

NAMES = {"pgd_eot": 2, "50 % & more_{}": 4, "a\\b~c^d#e$": 6}


@pytest.fixture(scope="module")
def report():
    """A random model under attacks with awkward names."""

    def model(x):
        z = x.flatten(1)[:, :3] + 0.3 * torch.randn(len(x), 3)
        return torch.cat((z, z[:, :1] - 1), dim=1)

    images, labels = torch.rand(12, 1, 4, 4), torch.randint(3, (12,))
    attacks = {name: atop.PGD(model, eps=0.1, steps=steps) for name, steps in NAMES.items()}
    return atop.evaluate(model, images, labels, attacks=attacks, eps=0.1, draws=5, diagnostics=[], progress=False)


def read(report, path):
    report.to_csv(path)
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_has_every_verdict_to_the_last_digit(report, tmp_path):
    rows = read(report, tmp_path / "table.csv")
    verdicts = {"clean": report.clean, **report.attacks, "robust": report.robust, "robust, 8 bit": report.eight_bit}
    assert [row["verdict"] for row in rows] == [*verdicts, "chance"]
    assert float(rows[-1]["mean"]) == report.chance
    for row, verdict in zip(rows[:-1], verdicts.values(), strict=True):
        assert (int(row["images"]), int(row["draws"]), row["complete"]) == (12, 5, "True")
        for measure in ("mean", "majority", "worst"):
            assert float(row[measure]) == getattr(verdict, measure)
            assert (float(row[f"{measure}_low"]), float(row[f"{measure}_high"])) == getattr(verdict, f"{measure}_ci")


def test_latex_has_the_same_rows(report):
    lines = report.to_latex().splitlines()
    assert lines[-3].endswith(f"most frequent class: {report.chance:.3f}}}\\\\")
    body = lines[lines.index(r"\midrule") + 1 : -4]
    assert len(body) == len(NAMES) + 3
    columns = len(re.search(r"\{tabular\}\{(\w+)\}", report.to_latex())[1])
    for line in body:
        assert line.endswith(r" \\")
        assert len(re.split(r"(?<!\\)&", line)) == columns
    assert f"{report.robust.mean:.3f} [{report.robust.mean_ci[0]:.3f}, {report.robust.mean_ci[1]:.3f}]" in body[-2]
    # Nothing of a name is left that LaTeX would interpret.
    names = [re.split(r"(?<!\\)&", line)[0] for line in body[1:-2]]
    escapes = r"\\[&%$#_{}]|\\text\w+\{\}"
    assert [bool(re.search(r"[&%$#_{}~^\\]", re.sub(escapes, "", name))) for name in names] == [False] * len(NAMES)
    assert r"50 \% \& more\_\{\}" in names[1]
    assert r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\#e\$" in names[2]


def test_what_a_budget_left_out_is_said(report, tmp_path):
    first, second, third = NAMES
    few = dataclasses.replace(report.attacks[second], images=7)
    cut = dataclasses.replace(report, attacks={**report.attacks, second: few, third: None}, complete=False)
    rows = {row["verdict"]: row for row in read(cut, tmp_path / "cut.csv")}
    assert [rows[name]["complete"] for name in (first, second, third)] == ["True", "False", "False"]
    assert [rows[name]["complete"] for name in ("clean", "robust", "robust, 8 bit")] == ["True", "False", "False"]
    assert rows[third]["images"] == "0"
    assert rows[third]["mean"] == ""
    text = cut.to_latex()
    assert text.count("(incomplete)") == 4
    assert "upper bound" in text
    assert "upper bound" not in report.to_latex()
