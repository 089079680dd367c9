"""Pictures of result files: ratios to the peers, and scaling of time and memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Wong's colors, which all readers can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


class Comparison(NamedTuple):
    """One of our variants and one peer at the same work; ratio is the peer's time over ours."""

    ours: dict[str, Any]
    peer: dict[str, Any]
    ratio: float


def comparisons(rows: list[dict[str, Any]]) -> Iterator[Comparison]:
    """Every pair of one of ours and a peer in the same case, shape and dtype of the case."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        # Variants in bfloat16 answer to those of the case; an op's cases differ in dtype.
        dtype = row["dtype"] if row["suite"] == "ops" else ""
        groups[row["suite"], row["case"], row["shape"], dtype].append(row)
    for group in groups.values():
        for ours in (row for row in group if row["ours"]):
            for peer in (row for row in group if not row["ours"]):
                yield Comparison(ours, peer, peer["median_s"] / ours["median_s"])


def draw_ratios(document: dict[str, Any], path: Path) -> None:
    """A dot for each shape and peer in the line of its case; right of 1, ours is faster."""
    import matplotlib.figure

    found = [c for c in comparisons(document["rows"]) if c.ours["suite"] != "scaling"]
    lines = list(dict.fromkeys((c.ours["suite"], c.ours["case"]) for c in found))
    peers = list(dict.fromkeys(c.peer["variant"].removesuffix(" bfloat16") for c in found))
    figure = matplotlib.figure.Figure(figsize=(8, 1 + 0.22 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for peer, color in zip(peers, COLORS * (len(peers) // len(COLORS) + 1), strict=False):
        mine = [c for c in found if c.peer["variant"].removesuffix(" bfloat16") == peer]
        heights = [-lines.index((c.ours["suite"], c.ours["case"])) for c in mine]
        axes.scatter([c.ratio for c in mine], heights, s=14, color=color, alpha=0.7, label=peer, linewidths=0)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("time of the other over ours: right of the line ours is faster")
    axes.set_yticks([-i for i in range(len(lines))], [f"{suite}: {case}" for suite, case in lines], fontsize=7)
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set_ylim(-len(lines), 1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.06), ncols=5, fontsize=7, frameon=False)
    axes.set_title(_title(document), fontsize=8)
    figure.savefig(path, dpi=110)


def draw_scaling(document: dict[str, Any], path: Path) -> None:
    """Time and peak memory against images, draws, steps and image size."""
    import matplotlib.figure

    panels: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in document["rows"]:
        if row["suite"] == "scaling" and " by " in row["case"] and row["shape"].split()[-1].isalpha():
            panels[row["shape"].split()[-1]][row["variant"]].append(row)
    figure = matplotlib.figure.Figure(figsize=(2.6 * len(panels), 4.6), layout="constrained")
    axes: Any = figure.subplots(2, len(panels), squeeze=False, sharey="row")
    for column, (axis, variants) in enumerate(panels.items()):
        for (variant, rows), color in zip(variants.items(), COLORS, strict=False):
            values = [int(row["shape"].split()[0]) for row in rows]
            axes[0][column].plot(values, [row["median_s"] for row in rows], "o-", color=color, label=variant)
            if all(row["peak_mib"] is not None for row in rows):
                axes[1][column].plot(values, [row["peak_mib"] for row in rows], "o-", color=color, label=variant)
        for line in axes[:, column]:
            line.set_xscale("log", base=2)
            line.set_yscale("log")
            line.grid(alpha=0.3)
        axes[1][column].set_xlabel(axis)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("peak memory, MiB")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(_title(document), fontsize=8)
    figure.savefig(path, dpi=110)


def _title(document: dict[str, Any]) -> str:
    return (
        f"{document['device']}, {document['threads']} threads, torch {document['versions']['torch']}, "
        f"{document['date']}, commit {document['commit']}"
    )
