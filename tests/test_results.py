"""The rule behind every native kernel: one that is slower than eager is not registered. Reads the committed results."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from atop_fast.ops import _registry

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
ATTACKS = [RESULTS / f"{name}--cpu.json" for name in ("attacks", "autoattack")]
NO_OPS = [*(RESULTS / f"{name}--cpu.json" for name in ("demo", "limits", "reliability", "numerics", "load")), *ATTACKS]
FILES = sorted(path for path in RESULTS.glob("*.json") if path not in NO_OPS)


def speedups(document, owner_of, *keys):
    """Speed-ups over eager of each op's owner, grouped by the columns `keys`."""
    groups = defaultdict(list)
    for row in document["rows"]:
        if row["backend"] == owner_of[row["op"]] != "eager":
            groups[tuple(row[key] for key in keys)].append(row["speedup_vs_eager"])
    return groups


def test_cpu_results_are_there():
    assert RESULTS / "ops--cpu.json" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_metadata(path):
    document = json.loads(path.read_text())
    assert {"date", "commit", "device", "threads", "versions", "owners", "rows"} <= set(document)
    assert {"python", "torch", "cuda"} == set(document["versions"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_owner_is_not_slower_than_eager(path):
    document = json.loads(path.read_text())
    by_direction = speedups(document, document["owners"], "op", "direction")
    by_dtype = speedups(document, document["owners"], "op", "direction", "dtype")
    assert by_direction
    for group, ratios in {**by_direction, **by_dtype}.items():
        assert statistics.median(ratios) >= 1, f"{group}: {ratios}"


def test_every_native_owner_is_measured():
    documents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*--cpu.json")) if path not in NO_OPS]
    measured = {row["op"] for document in documents for row in document["rows"] if row["backend"] == "cpp"}
    for name in _registry.OPS:
        # A backward op is measured with its forward op, as direction "both".
        if _registry.owner(name, "cpu") == "cpp":
            assert {"gated": "gated_elu", "gated_bwd": "gated_elu"}.get(name, name.removesuffix("_bwd")) in measured, (
                name
            )


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_attacks_are_faster_and_no_weaker(path):
    """Every contest names its peer's version, and ours leaves at most half a point more accuracy than the peer."""
    document = json.loads(path.read_text())
    assert {"date", "commit", "device", "threads", "versions", "rows"} <= set(document)
    contests = defaultdict(dict)
    for row in document["rows"]:
        contests[row["case"]][row["variant"]] = row
    for variants in contests.values():
        (peer,) = set(variants) & set(document["versions"])
        assert len(variants) >= 2
        for name in set(variants) - {peer}:
            assert variants[name]["accuracy"] <= variants[peer]["accuracy"] + 0.005
            assert variants[name]["ratio"] > 1
