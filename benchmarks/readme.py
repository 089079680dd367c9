"""Writes the tables of the README and the docs from the committed result files: python benchmarks/readme.py"""

from __future__ import annotations

import functools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _counted
from _judged import judged, write_files
from _passes import eot_curves, parity, verdicts
from _reliability import faults, load, mutations, numerics
from _results import OTHERS, RESULTS
from defenses import defenses, shipped
from pilot import pilot

from atop_fast.bench.plot import Comparison, comparisons, draw_ratios, draw_scaling
from atop_fast.bench.results import format_quality, format_time, read

ROOT = Path(__file__).parent.parent
DEMO = RESULTS / "demo--cpu.json"
# Rows that the README shows: case, shape, dtype.
OPS = (
    ("corrupt forward", "64x3x32x32", "float32"),
    ("corrupt both", "64x3x32x32", "float32"),
    ("corrupt both", "64x3x256x256", "float32"),
    ("corrupt both", "64x3x32x32 to 256x256", "float32"),
    ("random_resize_pad both", "16x3x224x224 to 256x256", "float32"),
    ("pgd_step_linf forward", "64x3x32x32, nchw", "float32"),
    ("pgd_step_linf forward", "64x3x256x256, nchw", "float32"),
    ("pgd_step_l2 forward", "64x3x32x32", "float32"),
    ("pgd_step_l2 forward", "64x3x256x256", "float32"),
    ("apgd_step_linf forward", "64x3x32x32", "float32"),
    ("attack_loss both", "512x10, ce", "float32"),
    ("attack_loss both", "512x1000, ce", "float32"),
    ("attack_loss both", "512x10, dlr", "float32"),
    ("attack_loss both", "512x1000, dlr", "float32"),
    ("conv3x3 both", "64x64x32x32, nhwc", "float32"),
    ("gated_elu both", "8x96x128x128, nchw", "float32"),
    ("gated_elu both", "8x96x128x128, nhwc", "float32"),
    ("gated_elu both", "8x96x128x128, nhwc", "bfloat16"),
    ("gated_elu both", "8x96x128x128, nchw", "float16"),
)
NOTHING = "Not measured on this machine, but on the [other one](benchmarks-avx2.md)."
WORK = {"forward": "forward", "both": "forward + backward"}


@functools.cache
def documents() -> dict[str, dict[str, Any]]:
    """The result files by name, the oldest first, and of one day the largest last."""
    found = {path.stem: read(path) for path in sorted(RESULTS.glob("*.json")) if path.stem not in OTHERS}
    return dict(sorted(found.items(), key=lambda item: (item[1]["date"], len(item[1]["rows"]))))


@functools.cache
def latest(machine: str = "cpu") -> tuple[dict[str, Any], ...]:
    """The newest rows of a machine, case by case, each with the name of its file."""
    cases: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for name, document in documents().items():
        if not name.endswith(f"--{machine}"):
            continue
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for row in document["rows"]:
            dtype = row["dtype"] if row["suite"] == "ops" else ""
            groups[row["suite"], row["case"], row["shape"], dtype].append({**row, "file": name})
        cases |= groups
    return tuple(row for rows in cases.values() for row in rows)


def demo() -> str:
    """Mean accuracies with their 95 % intervals, of the first recorded run."""
    document = json.loads(DEMO.read_text())
    run, *others = document["runs"]
    images, draws = (run["systems"]["finetuned"]["clean"][key] for key in ("images", "draws"))
    systems = {f"`{name}`": verdicts for name, verdicts in {**run["systems"], **run["findings"]}.items()}
    seconds = ", ".join(str(r["seconds"]) for r in (run, *others))
    return (
        f"Accuracy of one draw on {images} digits, mean of {draws} fresh draws, with 95 % "
        f"intervals; Linf, eps {run['threat_model']['eps']}:\n\n" + _verdicts("system", systems) + "\n\n"
        f"{_source(document)} Seed {run['seed']} is shown; seeds {', '.join(str(r['seed']) for r in others)} tell the "
        f"same ([demo--cpu.json](benchmarks/results/demo--cpu.json)). Times of the three runs: {seconds} s."
    )


def attacks(machine: str = "cpu") -> str:
    """Attacks end to end against the originals, with what each found."""
    names = [f"attacks--{machine}", f"autoattack--{machine}"]
    lines = [
        "| work | ours | against | faster | accuracy, theirs and ours | judged alike |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        for ours, peer, ratio in comparisons(documents()[name]["rows"]):
            both = f"{100 * peer['accuracy']:.1f} %, {100 * ours['accuracy']:.1f} %"
            lines.append(
                f"| {ours['case']} | {ours['variant']} | {peer['variant']} | {ratio:.1f}x | {both} "
                f"| {100 * ours['agree']:.1f} % |"
            )
    first = documents()[names[0]]
    peers = ", ".join(f"{peer} {first['versions'][peer]}" for peer in ("torchattacks", "pyautoattack"))
    files = ", ".join(f"[{name}.json](../benchmarks/results/{name}.json)" for name in names)
    return "\n".join(lines) + f"\n\n{_source(first)} Peers: {peers}. Files: {files}."


# Rows of the README's first screen: file, case, our variant, peer.
SPEED = (
    ("attacks--cpu", "PGD-100 to a verdict, 512 images", "float32", "torchattacks"),
    ("attacks--cpu", "PGD-20 x EOT-20, RT2 + U-Net + ResNet-18, B=8", "float32", "torchattacks"),
    ("autoattack--cpu", "AutoAttack standard, Linf, CIFAR, 512 images", "float32", "pyautoattack"),
    ("finetune--cpu", "DeepFillV2", "atop_fast", "public"),
)


def speed() -> str:
    """One row for each kind of work, in float32 on both sides."""
    lines = ["| work | against | theirs | ours | faster |", "|---|---|---|---|---|"]
    for file, *key in SPEED:
        found = comparisons(documents()[file]["rows"])
        [(ours, peer, ratio)] = [c for c in found if [c.ours["case"], c.ours["variant"], c.peer["variant"]] == key]
        work = f"fine-tuning step, {ours['case']}, {ours['shape']}" if ours["shape"] else ours["case"]
        against = "AToP's public code" if peer["variant"] == "public" else peer["variant"]
        times = " | ".join(format_time(row["median_s"]) for row in (peer, ours))
        lines.append(f"| {work} | {against} | {times} | {ratio:.1f}x |")
    files = ", ".join(
        f"[{name}.json](benchmarks/results/{name}.json)" for name in dict.fromkeys(name for name, *_ in SPEED)
    )
    return "\n".join(lines) + f"\n\n{_source(documents()[SPEED[0][0]]).partition(', commit')[0]}. Files: {files}."


def ops() -> str:
    """Speed-ups of the C++ kernels over eager mode and torch.compile."""
    lines = [
        "| op | work | shape | type, layout | against eager | against torch.compile |",
        "|---|---|---|---|---|---|",
    ]
    files = []
    for key in OPS:
        rows = [row for row in latest() if (row["case"], row["shape"], row["dtype"]) == key]
        found = {peer["variant"]: (ours, ratio) for ours, peer, ratio in comparisons(rows)}
        ours, ratio = found["eager"]
        op, direction = ours["case"].split()
        shape, _, layout = ours["shape"].partition(", ")
        kind = f"{ours['dtype']}, {(layout or 'nchw').upper()}"
        compiled = f"{found['compile'][1]:.1f}x" if "compile" in found else "not measured"
        lines.append(f"| `{op}` | {WORK[direction]} | {shape} | {kind} | {ratio:.1f}x | {compiled} |")
        files.append(ours["file"])
    sources = [
        f"- [{name}.json](../benchmarks/results/{name}.json): {_source(documents()[name])}"
        for name in dict.fromkeys(files)
    ]
    return "\n".join(lines) + "\n\n" + "\n".join(sources)


# Rows of the runs that docs/transforms.md shows, with the targets that were set: against eager and compile.
TRANSFORMS = (
    ("corrupt forward", "64x3x32x32", 15, 35),
    ("corrupt both", "64x3x32x32", 17, 30),
    ("corrupt forward", "64x3x256x256", 10, 35),
    ("corrupt both", "64x3x256x256", 10, 30),
    ("corrupt forward", "64x3x32x32 to 256x256", 12, 35),
    ("corrupt both", "64x3x32x32 to 256x256", 9, 30),
    ("random_normal forward", "64x3x32x32", 15, None),
    ("random_normal forward", "64x3x256x256", 15, None),
)


def transforms() -> str:
    """Speed-ups in all runs that have them, next to the targets, for float32."""
    runs = [document for document in documents().values() if _variants(document, *TRANSFORMS[0][:2])]
    peers = ("eager", "compile", "torchvision", "kornia")
    lines = [
        "| op | work | shape | eager (target) | compile (target) | torchvision | kornia | share of copy bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, shape, *targets in TRANSFORMS:
        found = [_variants(document, case, shape) for document in runs]
        cells = [", ".join(_times(run, peer) for run in found if peer in run) for peer in peers]
        for i, target in enumerate(targets):
            cells[i] += f" (>= {target})" if target else ""
        share = ", ".join(f"{100 * run['ours']['roofline']:.0f} %" for run in found)
        op, direction = case.split()
        lines.append(f"| `{op}` | {WORK[direction]} | {shape} | " + " | ".join(cells) + f" | {share} |")
    counted = {1: "One run", 2: "Two runs", 3: "Three runs", 4: "Four runs"}.get(len(runs), f"{len(runs)} runs")
    return "\n".join(lines) + f"\n\n{_source(runs[0])} {counted}."


def limits() -> str:
    """Breakdown of the time of corrupt in microseconds, with 1 and with 2 threads."""
    document = documents()["limits--cpu"]
    table: dict[str, dict[str, list[str]]] = {}
    for row in document["rows"]:
        cells = table.setdefault(row["variant"], {}).setdefault(row["shape"], [])
        cells.append(f"{row['median_s'] * 1e6:.0f}")
    shapes = list(next(iter(table.values())))
    lines = ["| part | " + " | ".join(shapes) + " |", "|---|" + "---|" * len(shapes)]
    for part, cells in table.items():
        lines.append(f"| {part} | " + " | ".join(", ".join(cells[shape]) for shape in shapes) + " |")
    return "\n".join(lines) + f"\n\n{_source(document).replace('2 threads', '1 and 2 threads')}"


def summary(machine: str = "cpu") -> str:
    """How often ours wins and loses, for each suite and peer, and how the losses end."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for ours, peer, ratio in _compared(machine):
        groups[ours["suite"], peer["variant"]].append(ratio)
    lines = [
        "| suite | against | comparisons | ours faster | ours slower | worst | median | best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (suite, peer), ratios in sorted(groups.items()):
        won = sum(ratio >= 1 for ratio in ratios)
        ends = " | ".join(_ratio(f(ratios)) for f in (min, statistics.median, max))
        lines.append(f"| {suite} | {peer} | {len(ratios)} | {won} | {len(ratios) - won} | {ends} |")
    used = dict.fromkeys(row["file"] for row in latest(machine) if row["suite"] in COMPARED)
    sources = [f"- [{name}.json](../benchmarks/results/{name}.json): {_source(documents()[name])}" for name in used]
    return "\n".join(lines) + "\n\n" + "\n".join(sources)


def losses(machine: str = "cpu") -> str:
    """Every comparison that ours loses, the worst first."""
    return _table([c for c in _compared(machine) if c.ratio < 1])


def suite_table(suite: str, machine: str = "cpu") -> str:
    """Every comparison of a suite, the worst for us first."""
    found = [c for c in _compared(machine) if c.ours["suite"] == suite]
    picture = "![Time and memory against images, draws, steps and image size](scaling.png)\n\n"
    return (picture if suite == "scaling" and found else "") + _table(found)


def finetune() -> str:
    """A fine-tuning step against the formulations that torch's own functions allow."""
    lines = ["| step | ours | against | times, theirs and ours | faster | peak memory |", "|---|---|---|---|---|---|"]
    for ours, peer, ratio in sorted(comparisons(documents()["finetune--cpu"]["rows"]), key=lambda c: c.ours["case"]):
        times = ", ".join(format_time(row["median_s"]) for row in (peer, ours))
        memory = ", ".join(f"{row['peak_mib']:,.0f}" for row in (peer, ours))
        work = f"{ours['case']}, {ours['shape']}"
        lines.append(f"| {work} | {ours['dtype']} | {peer['variant']} | {times} | {_ratio(ratio)} | {memory} MiB |")
    return "\n".join(lines) + f"\n\n{_source(documents()['finetune--cpu'])}"


def processes(machine: str = "cpu") -> str:
    """One evaluation by several processes."""
    rows = [row for row in latest(machine) if row["case"] == "evaluation by processes"]
    if not rows:
        return NOTHING
    lines = ["| processes | images | threads in all | time | IQR | against one |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row["variant"], row["shape"], row["threads"], format_time(row["median_s"]), format_time(row["iqr_s"]))
        lines.append("| " + " | ".join(map(str, cells)) + f" | {_ratio(row['ratio'])} |")
    return "\n".join(lines)


def _compared(machine: str) -> list[Comparison]:
    found = [c for c in comparisons(list(latest(machine))) if c.ours["suite"] != "limits"]
    return sorted(found, key=lambda c: (c.ratio, c.ours["case"], c.ours["shape"], c.peer["variant"]))


def _table(found: list[Comparison]) -> str:
    """A table of comparisons; if a cell has two numbers, the first is theirs."""
    if not found:
        return NOTHING
    lines = [
        "| case | shape | type | ours | against | theirs / ours | times | IQRs | images/s | roofline | peak | result |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for ours, peer, ratio in found:
        times = ", ".join(format_time(row["median_s"]) for row in (peer, ours))
        ranges = ", ".join(format_time(row["iqr_s"]) for row in (peer, ours) if row["samples"] > 1)
        rates = [row["images_per_s"] for row in (peer, ours)]
        speed = "" if None in rates else f"{rates[0]:.3g}, {rates[1]:.3g}"
        roofline = "" if ours["roofline"] is None else f"{100 * ours['roofline']:.0f} %"
        peaks = [row["peak_mib"] for row in (peer, ours)]
        memory = "" if None in peaks else f"{peaks[0]:.0f}, {peaks[1]:.0f} MiB"
        result = format_quality(ours)
        if peer["accuracy"] is not None:
            result += f" (theirs {100 * peer['accuracy']:.1f} %)"
        cells = (ours["case"], ours["shape"], ours["dtype"], ours["variant"], peer["variant"], _ratio(ratio))
        lines.append("| " + " | ".join((*cells, times, ranges, speed, roofline, memory, result)) + " |")
    return "\n".join(lines)


def _ratio(ratio: float) -> str:
    text = f"{ratio:.2f}x"
    return text if ratio >= 1 else f"**{text}**"


def _variants(document: dict[str, Any], case: str, shape: str) -> dict[str, dict[str, Any]]:
    wanted = (case, shape, "float32")
    rows = [row for row in document["rows"] if tuple(row[key] for key in ("case", "shape", "dtype")) == wanted]
    return {"ours" if row["ours"] else row["variant"]: row for row in rows}


def _times(run: dict[str, dict[str, Any]], peer: str) -> str:
    return f"{run[peer]['median_s'] / run['ours']['median_s']:.1f}"


def filled(text: str, name: str) -> str:
    """`text` with the table `name`, one of TABLES, between its two comments."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}{TABLES[name]()}\n{end}{after}"


# Titles of verdicts; older result files have PGD of 20 steps.
VERDICTS = {"clean": "no attack", "fgsm": "FGSM, 4 draws", "pgd20_eot": "PGD, 20 steps x 4 draws",
            "pgd_eot": "PGD, 80 steps x 1 draw, momentum"}  # fmt: skip


def _verdicts(title: str, systems: dict[str, Any]) -> str:
    columns = {name: text for name, text in VERDICTS.items() if name in next(iter(systems.values()))}
    lines = [f"| {title} | " + " | ".join(columns.values()) + " |", "|---|" + "---|" * len(columns)]
    for name, found in systems.items():
        lines.append(f"| {name} | " + " | ".join(_accuracy(found[column]) for column in columns) + " |")
    return "\n".join(lines)


def _accuracy(verdict: dict[str, Any]) -> str:
    low, high = verdict["mean_ci"]
    return f"{verdict['mean']:.2f} [{low:.2f}, {high:.2f}]"


def _source(document: dict[str, Any]) -> str:
    return (
        f"Measured {document['date']} on {document['device']}, {_threads(document)}, "
        f"torch {document['versions']['torch']}, commit {document['commit'][:12]}."
    )


def recorded(file: str, table: Callable[[dict[str, Any]], str], machine: str = "cpu", source: bool = True) -> str:
    """A table of one of the files that hold no timings, with its source unless the table has it."""
    document = json.loads((RESULTS / f"{file}--{machine}.json").read_text())
    return table(document) + (f"\n\n{_source(document)}" if source else "")


def fast_verdicts() -> str:
    """Times to a verdict in processor seconds of one thread, against the usual tools."""
    names = ("eotpgd--cpu-avx2", "parity--cpu")
    found = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]
    files = ", ".join(f"[{name}.json](benchmarks/results/{name}.json)" for name in names)
    return f"{verdicts(*found)}\n\n{_source(found[0]).partition(', commit')[0]}, processor time. Files: {files}."


def engine(document: dict[str, Any]) -> str:
    """The share of time that a training spends outside its networks."""
    names = {"unet": "U-Net, width 32, 2 blocks", "deepfill_v2": "DeepFillV2"}
    lines = ["| purifier | batch | side | updates | outside of the networks |", "|---|---|---|---|---|"]
    for row in document["rows"]:
        sizes = " | ".join(str(row[key]) for key in ("batch", "size", "updates"))
        lines.append(f"| {names[row['purifier']]} | {sizes} | {row['outside_percent']:.1f} % |")
    return "\n".join(lines)


def cifar(document: dict[str, Any]) -> str:
    """The verdicts of a recipe's report: means of fresh draws with their intervals."""
    return _verdicts("purifier", document["systems"]) + f"\n\n`{document['command']}`"


def restoration(document: dict[str, Any]) -> str:
    """Restoration by U-Nets of several sizes."""
    lines = [
        "| purifier | million parameters | updates | time | PSNR | classified right |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        size = f"{row['million parameters']} | {row['updates']} | {row['seconds']:.0f} s" if row["updates"] else "| |"
        lines.append(f"| {row['purifier']} | {size} | {row['PSNR']:.2f} dB | {100 * row['accuracy']:.1f} % |")
    return "\n".join(lines) + f"\n\n`{document['command']}`"


def _threads(document: dict[str, Any]) -> str:
    return "1 thread" if document["threads"] == 1 else f"{document['threads']} threads"


RECORDED = {"reliability": faults, "numerics": numerics, "load": load, "engine": engine, "cifar-native": cifar,
            "restoration": restoration, "parity": parity, "eot-curves": eot_curves}  # fmt: skip
# Result files of a CPU without AVX-512 end so.
AVX2 = "cpu-avx2"
AVX2_SUITES = ("attacks", "evaluate", "scaling")
COMPARED = ("ops", "attacks", "evaluate", "finetune", "scaling")
TABLES = {
    "demo": demo, "attacks": attacks, "ops": ops, "transforms": transforms, "limits": limits, "summary": summary,
    "losses": losses, "processes": processes, "finetune": finetune, "speed": speed, "judged": judged,
    **{table.__name__: functools.partial(recorded, file, table) for file, table in RECORDED.items()},
    **{t.__name__: functools.partial(recorded, "defenses", t, source=False) for t in (shipped, defenses)},
    "mutations": functools.partial(recorded, "mutations", mutations, AVX2),
    "verdicts": fast_verdicts,
    "pilot": functools.partial(recorded, "pilot", pilot, AVX2),
    **{f"all {suite}": functools.partial(suite_table, suite) for suite in COMPARED},
    **{f"{table.__name__} avx2": functools.partial(table, AVX2) for table in (attacks, summary, losses, processes)},
    **{f"all {suite} avx2": functools.partial(suite_table, suite, AVX2) for suite in AVX2_SUITES},
    **_counted.TABLES,
}  # fmt: skip
# The tables of each page.
PAGES = {
    "README.md": ("headline", "shipped", "verdicts", "speed", "demo"),
    "docs/speed.md": ("attacks", "attacks avx2", "finetune", "ops"),
    "docs/transforms.md": ("transforms", "limits"),
    "docs/benchmarks.md": ("summary", "losses", *(f"all {suite}" for suite in COMPARED), "processes"),
    "docs/benchmarks-avx2.md": tuple(
        f"{name} avx2" for name in ("summary", "losses", *(f"all {suite}" for suite in AVX2_SUITES), "processes")
    ),
    **_counted.PAGES,
    "docs/reliability.md": ("faults", "numerics", "load", "mutations"),
    "docs/training.md": ("engine", "cifar", "pilot"),
    "docs/model-cards.md": ("defenses",),
    "docs/attacks.md": ("parity",),
    "docs/judged.md": ("judged",),
    "docs/evaluation.md": (*_counted.PAGES["docs/evaluation.md"], "eot_curves"),
    "docs/purifiers.md": (*_counted.PAGES["docs/purifiers.md"], "restoration"),
}


def main() -> None:
    """Fill the tables of every page, and draw the pictures of the pages of benchmarks."""
    for page, tables in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for table in tables:
            text = filled(text, table)
        (ROOT / page).write_text(text, encoding="utf-8")
    write_files(ROOT / "docs")
    for machine, picture in (("cpu", "benchmarks"), (AVX2, "benchmarks-avx2")):
        newest = [document for name, document in documents().items() if name.endswith(f"--{machine}")][-1]
        document = {**newest, "rows": [row for row in latest(machine) if row["suite"] != "limits"]}
        draw_ratios(document, ROOT / "docs" / f"{picture}.png")
        if any(row["suite"] == "scaling" for row in document["rows"]):
            draw_scaling(document, ROOT / "docs" / "scaling.png")


if __name__ == "__main__":
    main()
