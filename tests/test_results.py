"""The committed results: their form, and the rule that a native kernel slower than eager owns no op."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from atop_fast.bench.results import check_document, read, write
from atop_fast.ops import _registry

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from _results import OTHERS, RESULTS
from owners import OPS

FILES = sorted(path for path in RESULTS.glob("*.json") if path.stem not in OTHERS)


def op_rows(path):
    """The rows of the ops that the owners have, by op and direction."""
    document, exceptions = read(path), json.loads(_registry.EXCEPTIONS.read_text())
    device = path.stem.rpartition("--")[2].partition("-")[0]
    owners = {**document.get("owners", {}), **exceptions[device]["owners"]}
    for row in document["rows"]:
        op, direction = row["case"].split() if row["suite"] == "ops" else ("", "")
        owner = owners.get(op) or owners.get(OPS.get(op, op))
        if row["ours"] and row["variant"] == owner:
            yield op, direction, row


def test_cpu_results_are_there():
    assert any(row["suite"] == "ops" for path in FILES for row in read(path)["rows"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_schema(path):
    document = read(path)
    assert {"python", "torch", "cuda"} <= set(document["versions"])
    assert document["rows"]
    for row in document["rows"]:
        assert row["median_s"] > 0
        assert row["threads"] > 0
        assert row["samples"] > 0
        assert row["ratio"] > 0


def test_other_files_are_refused(tmp_path):
    document = read(FILES[0])
    path = tmp_path / "folder" / "same.json"
    write(path, document)
    assert read(path) == document
    for change in ({"rows": None}, {"date": 3}):
        with pytest.raises(ValueError, match="json must be a result file"):
            check_document({**document, **change})
    for change in ({"median_s": "1 s"}, {"ours": 1}, {"roofline": "half"}):
        with pytest.raises(ValueError, match=f"row 0 has {next(iter(change))}"):
            check_document({**document, "rows": [{**document["rows"][0], **change}]})
    with pytest.raises(ValueError, match="row 0 has other columns"):
        check_document({**document, "rows": [{**document["rows"][0], "more": 1}]})
    path.write_text("no JSON")
    with pytest.raises(ValueError, match=r"same\.json"):
        read(path)
    with pytest.raises(ValueError, match="json must be a result file"):
        check_document(json.loads("[]"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_owner_is_not_slower_than_eager(path):
    groups = defaultdict(list)
    for op, direction, row in op_rows(path):
        groups[op, direction].append(row["ratio"])
        groups[op, direction, row["dtype"]].append(row["ratio"])
    for group, ratios in groups.items():
        assert statistics.median(ratios) >= 1, f"{group}: {ratios}"


def test_every_native_owner_is_measured():
    paths = [path for path in FILES if path.stem.endswith("--cpu")]
    measured = {OPS.get(op, op) for path in paths for op, _, row in op_rows(path) if row["variant"] == "cpp"}
    for name in _registry.OPS:
        # A backward op is measured with its forward op, as direction "both".
        if _registry.owner(name, "cpu") == "cpp":
            assert {name, name.removesuffix("_bwd")} & measured, name


def test_attacks_are_faster_and_no_weaker():
    """Ours leave at most half a point more accuracy than the first peer, which names its version."""
    contests = defaultdict(list)
    for path in FILES:
        document = read(path)
        for row in document["rows"]:
            if row["suite"] in ("attacks", "evaluate") and row["accuracy"] is not None:
                contests[path.stem, row["case"], row["shape"]].append((row, document["versions"]))
    assert contests
    for (first, versions), *others in contests.values():
        assert first["variant"] in {*versions, "plain"}
        assert any(row["ours"] for row, _ in others)
        for row in (row for row, _ in others if row["ours"]):
            assert row["accuracy"] <= first["accuracy"] + 0.005
            assert row["ratio"] > 1
