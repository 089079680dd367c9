"""The command `atop-fast bench`."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from .._core.checks import check_choice, check_device
from .._core.files import writable_folder
from .._core.precision import full_precision
from . import results
from .harness import Case, Options, Roofline, keep_heap, measure

# In the order of a full run.
SUITES = ("ops", "attacks", "evaluate", "finetune", "scaling")


def bench(
    suite: Literal["ops", "attacks", "evaluate", "finetune", "scaling", "all"] = "all",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    json: str | None = None,
    plot: str | None = None,
    quick: bool = False,
    compile_all: bool = False,
    match: str = "",
    commit: str | None = None,
) -> None:
    """Measure atop_fast against other libraries, plain PyTorch and torch.compile; `atop-fast bench [SUITE] [options]`.

    All variants of a case do the same work in turns in one process; docs/benchmarks.md has the method. The peers are
    torchattacks, pyautoattack, foolbox, adversarial-robustness-toolbox, kornia and torchvision; those that are not
    installed are left out.

    Args:
        suite: ops, attacks, evaluate, finetune, scaling or all.
        device: cpu, cuda, or auto: the GPU, if there is one.
        json: file for the results.
        plot: picture of the ratios, or of the suite scaling alone, by its name a PNG, SVG or PDF file.
        quick: fewer and smaller cases and no torch.compile; a minute or two instead of twenty.
        compile_all: torch.compile for every case of an op and for DeepFillV2, which takes minutes each.
        match: only cases in whose name this regular expression is found.
        commit: what to record as the commit; by default what git says.

    Raises:
        RuntimeError: some cases failed; it is raised after the others are measured and written.
    """
    check_choice("bench", "suite", suite, [*SUITES, "all"])
    kind = check_device("bench", "device", check_choice("bench", "device", device, ["auto", "cpu", "cuda"])).type
    paths = [Path(path) for path in (json, plot) if path]
    for path in paths:
        # Refuse it now instead of after twenty minutes.
        writable_folder("bench", "json" if str(path) == json else "plot", path.parent)
    document: dict[str, Any] = {}
    for document in run(SUITES if suite == "all" else (suite,), Options(kind, quick, compile_all), commit, match):
        if json:
            # Write after every case, so that an interrupted run keeps its measurements.
            results.write(Path(json), document)
    if plot:
        from .plot import draw_ratios, draw_scaling

        (draw_scaling if suite == "scaling" else draw_ratios)(document, Path(plot))
    for path in paths:
        print("wrote", path)
    if document.get("failures"):
        raise RuntimeError("bench: not measured: " + "; ".join(document["failures"]))


def run(
    suites: tuple[str, ...], options: Options, commit: str | None = None, match: str = ""
) -> Iterator[dict[str, Any]]:
    """Measure suites and print their rows; yields the document so far after each case and suite.

    A case that fails is named in "failures", and the others continue. All variants compute float32 without TF32.
    """
    keep_heap()
    start = time.perf_counter()
    roofline = Roofline(options.device)
    metadata = results.metadata(options.device, commit)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []

    def document() -> dict[str, Any]:
        best = {key: float(f"{rate:.4g}") for key, rate in sorted(roofline.rates.items())}
        seconds = round(time.perf_counter() - start)
        return {**metadata, "seconds": seconds, "roofline": best, "failures": failures, "rows": rows}

    for name in suites:
        first = len(rows)
        with full_precision(torch.device(options.device)):
            for case in _cases(name, options, failures):
                if re.search(match, case.name):
                    try:
                        rows += measure(case, options.device, 0.05 if options.quick else 0.15, roofline)
                    except Exception as error:  # one failing case must not stop the others
                        _note(failures, f"{case.name}, {case.shape}", error)
                    yield document()
        if rows[first:]:
            results.print_rows(rows[first:])
        seconds = time.perf_counter() - start
        print(f"{name}: done after {seconds:.0f} s, {torch.get_num_threads()} threads\n", flush=True)
        yield document()


def _cases(suite: str, options: Options, failures: list[str]) -> Iterator[Case]:
    """The cases of a suite, up to the first that cannot be constructed."""
    try:
        yield from importlib.import_module(f"atop_fast.bench.{suite}").cases(options)
    except Exception as error:  # one failing suite must not stop the others
        _note(failures, suite, error)


def _note(failures: list[str], what: str, error: Exception) -> None:
    failures.append(f"{what}: {type(error).__name__}: {error}".partition("\n")[0])
    print(f"FAILED {failures[-1]}", flush=True)
