"""Robust evaluation: attack the whole defense, choose each image's worst candidate, judge it on fresh randomness."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from .._core.checks import (
    check_choice,
    check_integer,
    check_number,
    check_radius,
    message,
)
from .._core.distributed import process_group
from .._core.files import shown
from .._core.signals import stop_requests
from ..attacks import NORMS, Model, counted_passes, frozen
from ..data import Dataset
from ..defense import Defense, with_fixed_randomness
from ..randomness import derive_seed
from ..training.metrics import summary_writer
from .findings import (
    Threat,
    check_findings,
    draws_finding,
    examined,
    outside_finding,
    radius_finding,
    transfer_finding,
    warn_of_dropout,
)
from .given import given_attacks
from .identity import attack_identity, model_identity, probe_images
from .judge import Judge, judged
from .page import describe_images, describe_model
from .pictures import gallery_rows
from .protocols import CURVE, PROTOCOLS, AnyAttack, Protocol, build_attack, build_attacks
from .report import write_evaluation
from .runs import Run
from .source import Source, make_source
from .summary import CLEAN, Report, curve_name, summarize
from .tracing import TraceFile, write_scalars
from .verdict import INTERVALS
from .work import Work

NOT_FIXED = (
    "evaluate: randomness='fixed' fixes what the transform and a keyed classifier draw, but this Defense still differs "
    "from draw to draw: its networks draw without a key, or rounding differs"
)


def evaluate(
    model: Model,
    images: Tensor | Dataset | TorchDataset[Any] | DataLoader[Any],
    labels: Tensor | None = None,
    *,
    protocol: str = "quick",
    norm: str | None = None,
    eps: float | None = None,
    seed: int = 0,
    attacks: Mapping[str, AnyAttack] | Callable[[Model], Mapping[str, AnyAttack]] | None = None,
    draws: int | None = None,
    selection_draws: int = 20,
    batch_size: int = 100,
    max_batch: int | None = None,
    out: str | Path | None = None,
    budget: float | str | None = None,
    randomness: str = "fresh",
    interval: str = "wilson",
    curve: Sequence[float] = (),
    diagnostics: bool | Sequence[Mapping[str, Any]] = True,
    title: str = "evaluate",
    progress: bool = True,
    trace: str | Path | None = None,
    tensorboard: str | Path | None = None,
    about: Mapping[str, str] | None = None,
) -> Report:
    """Attack a model and judge it on draws that neither an attack nor the choice of candidates has seen.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits. The draws of a Defense are keyed
            by (seed, image index, draw), so that its verdict does not depend on `batch_size` beyond rounding; draws of
            another callable are repeated calls, for which the global generators are seeded and then restored. A model
            with the same logits in every call is judged by one draw.
        images: float images (N, C, H, W) in [0, 1], of the dtype in which the model computes; 16-bit images are judged
            in float32. Or a Dataset of this library, a map-style torch Dataset of (image, label), or a DataLoader over
            one: items are streamed in the order of the dataset, with the same results as for tensors. With `out`, the
            candidates of a dataset are on disk, and memory holds only a few batches. Images of a dataset are moved to
            the device of the model's first parameter.
        labels: int64 labels (N,); None for a dataset, which has labels.
        protocol: a name in PROTOCOLS: quick, pgd-eot, autoattack-rand, autoattack-fixed, bpda-eot, paper, unseen,
            eot-fast, fast.
        norm, eps: threat model, eps in units of [0, 1] pixels; default is the protocol's (Linf, 8/255; unseen: L2,
            0.5). Another norm needs an eps.
        seed: key of all randomness.
        attacks: replaces the protocol's attacks: name -> attack(images, labels, sample_ids) returning adversarial
            images, or attack(images, labels), or an attack of torchattacks or ART; or a function from the model to such
            a mapping, which randomness="fixed" requires and calls with the fixed model. An attack whose attribute
            `norm` is not one of the three, such as "flow", declares that its candidates are not bounded by the ball.
        draws: K, the number of fresh draws of every verdict; default is the protocol's (20; bpda-eot: 150).
        selection_draws: number of draws for the choice among an image's candidates.
        batch_size: images attacked together; halved, with a warning, after an out-of-memory error.
        max_batch: maximum number of images in one forward pass; None allows as many as fit into about 1 GiB, on a
            GPU into a share of its free memory.
        out: folder of the run: shards, log, report.json, report.html. A call that was stopped or killed resumes from
            it, with any batch_size, budget and number of processes, to the same verdicts (or, for models with their own
            randomness, to other draws).
        budget: seconds, or text such as "90s", "10m", "2h". When it is spent, no further attack starts: images that
            were not attacked keep their last candidate, and the result is an upper bound on the robust accuracy
            (complete=False). The verdict on an interrupted attack covers the images that it reached.
        randomness: "fresh", or "fixed": each image's mask and noise are the same in attack, choice and verdict, and
            known to the attacker; requires a Defense.
        interval: interval of the means: "wilson", which is conservative, or "bootstrap" over images.
        curve: radii at which PGD of the protocol quick is repeated for the curve of accuracy against eps.
        diagnostics: True: atop_fast.doctor examines the model for the report, with a warning for each check that does
            not pass: with `out`, all checks run on at most 64 of the images; without it, the cheap checks of the
            contract on at most 32. False disables them; findings {"name", "status": "pass" | "warn" | "fail",
            "reason"}, such as those of atop_fast.doctor.diagnose, replace them.
        title, progress: name of the model in the report and on the progress bar; whether to show a progress bar with
            the ETA.
        trace: file of JSON lines with loss, accuracy and passes after each step of every attack of this library, as in
            TraceStep, with the attack's name and the first image of its batch. Lines of a batch are added when it is
            done; a resumed run keeps its lines, as far as it was traced. The report shows their curve.
        tensorboard: folder for the same values as TensorBoard scalars; needs the extra atop-fast[track].
        about: name -> text for the first screen of report.html, such as {"model": "mynet.pt"}; the text of "repeat" is
            a script that repeats the evaluation: it is shown at the end, and written to `out`/repeat.sh.

    Under torchrun, or with an initialized process group, every process attacks its shard of the images and returns the
    same Report; rank 0 writes it.

    Raises:
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM (status 143); what was saved is printed.
        TypeError, ValueError: naming the argument that is wrong; `out` of another run or damaged: nothing is changed.
    """
    start = time.monotonic()
    source = make_source(images, labels, model)
    check_integer("evaluate", "batch_size", batch_size, low=1)
    check_choice("evaluate", "randomness", randomness, ("fresh", "fixed"))
    check_choice("evaluate", "interval", interval, INTERVALS)
    plan = PROTOCOLS[check_choice("evaluate", "protocol", protocol, list(PROTOCOLS))]
    norm, eps = plan.threat(None if norm is None else check_choice("evaluate", "norm", norm, NORMS), eps)
    threat = Threat(norm, check_radius("evaluate", norm, eps))
    if not isinstance(curve, Iterable):
        raise TypeError(message("evaluate", "curve", "a sequence of radii, such as (0, 8 / 255)", type(curve).__name__))
    if about is not None and not isinstance(about, Mapping):
        expected = 'a mapping of texts, such as {"model": "mynet.pt"}'
        raise TypeError(message("evaluate", "about", expected, type(about).__name__))
    radii = tuple(check_number("evaluate", "curve", radius, low=0) for radius in curve)
    findings = check_findings(diagnostics)
    deadline = None if budget is None else start + parse_budget(budget)
    transform = repr(model.transform) if isinstance(model, Defense) else None
    if tensorboard is not None:
        # A missing package must be reported now, not after an hour.
        summary_writer()
    if randomness == "fixed":
        model = _fixed(model, attacks, seed)
    warn_of_dropout(model)
    judge = Judge(model, seed, plan.draws if draws is None else draws, selection_draws, max_batch)
    with process_group() as group, counted_passes() as passes:
        with frozen(model):
            if judge.is_repeatable(source):
                judge.collapse()
            elif randomness == "fixed":
                warnings.warn(NOT_FIXED, stacklevel=2)
        named = _attacks(attacks, plan, model, threat, radii, seed, judge.deterministic, max_batch)
        settings = {
            "protocol": protocol if attacks is None else "custom",
            "norm": threat.norm,
            "eps": threat.eps,
            "seed": seed,
            "draws": judge.draws,
            "selection_draws": judge.selection_draws,
            "randomness": randomness,
            "transform": transform,
            "images": len(source),
        }
        folder = None if out is None else Path(out)
        header = {**settings, "attacks": _texts(named, None if attacks else plan), "data": source.identity}
        if folder is not None or group.size > 1:
            header |= _identities(model, source, named if attacks else {})
        run = Run(len(source), folder, header, group)
        if diagnostics is True:
            # One process looks: others might find other numbers, or read the folder's while they are written.
            found = examined(folder, model, source, threat, seed, progress) if group.rank == 0 else []
            findings = group.gather(found)[0]
        cascade = attacks is None and plan.cascade and judge.deterministic
        tracing = trace is not None or tensorboard is not None
        file = None if trace is None else _trace_file(Path(trace), run, list(named))
        work = Work(model, source, judge, run, named, threat, batch_size, cascade, deadline, passes, tracing, file)
        stated = radius_finding(work.attacks, threat) + transfer_finding(work.attacks, judge, source)
        _attack(work, title, progress)
        if file is not None:
            file.write(run.trace(list(named)))
        headline = plan.headline if attacks is None else None
        findings = [*findings, *stated, *outside_finding(run, work.attacks, source.sample, threat)]
        if not judge.deterministic:
            findings += draws_finding(findings, work.attacks)
        options = (radii, settings, interval, cascade, headline, findings, source.classes, source.files)
        report = summarize(run, source.labels.cpu(), list(work.attacks), *options, judge.deterministic)
        if tensorboard is not None and group.rank == 0:
            write_scalars(Path(tensorboard), report.trace)
        if folder is not None and group.rank == 0:
            _write(folder, title, work, report, about or {})
        # A barrier: no rank may close its connections before the report is written.
        group.gather(None)
    return report


def _fixed(model: Model, attacks: object, seed: int) -> Defense:
    """The model under a fixed draw of each image; raises unless it and the attacks allow that."""
    if attacks is not None and not callable(attacks):
        expected = "a function from the model to its attacks for randomness='fixed'"
        raise TypeError(message("evaluate", "attacks", expected, type(attacks).__name__))
    if not isinstance(model, Defense):
        raise TypeError(message("evaluate", "model", "a Defense for randomness='fixed'", type(model).__name__))
    return with_fixed_randomness(model, derive_seed(seed, "fixed"))


def parse_budget(budget: float | str, function: str = "evaluate") -> float:
    """Seconds of a budget: a number, or text with the unit s, m or h such as "90s", "10m", "1.5h"."""
    if isinstance(budget, str):
        match = re.fullmatch(r"([0-9.]+)\s*([smh]?)", budget.strip())
        with contextlib.suppress(ValueError, TypeError):
            return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]  # type: ignore[index]
        raise ValueError(message(function, "budget", 'seconds, or text such as "90s", "10m" or "2h"', repr(budget)))
    return check_number(function, "budget", budget, low=0)


def _trace_file(path: Path, run: Run, names: Sequence[str]) -> TraceFile | None:
    """The trace file on rank 0, with the lines of finished units; if rank 0 fails, all ranks fail."""
    files: list[TraceFile] = []
    run.agree(lambda: files.append(TraceFile(path, run.trace(names))) if run.group.rank == 0 else None)
    return files[0] if files else None


def _attacks(
    attacks: Mapping[str, AnyAttack] | Callable[[Model], Mapping[str, AnyAttack]] | None,
    protocol: Protocol,
    model: Model,
    threat: Threat,
    radii: Sequence[float],
    seed: int,
    deterministic: bool,
    max_batch: int | None,
) -> dict[str, AnyAttack]:
    """The caller's attacks or the protocol's, by name, and those of the curve."""
    options = (seed, deterministic, max_batch)
    if attacks is None:
        named = build_attacks(protocol, model, threat.norm, threat.eps, *options)
    else:
        named = given_attacks(attacks, model)
    return named | {curve_name(radius): build_attack(CURVE, model, threat.norm, radius, *options) for radius in radii}


def _texts(named: Mapping[str, AnyAttack], protocol: Protocol | None) -> dict[str, str]:
    """The text of each attack for the header of a run; None stands for the caller's attacks."""
    if protocol is None:
        return {name: shown(attack) for name, attack in named.items()}
    # The entry of the protocol says it; the object may also show how much fits into memory.
    return {name: shown(protocol.attacks.get(name, CURVE)) for name in named}


def _identities(model: Model, source: Source, own: Mapping[str, AnyAttack]) -> dict[str, Any]:
    """The identities of the model and of the caller's own attacks, for the header of a run."""
    given = {name: attack for name, attack in own.items() if not name.startswith(curve_name(""))}
    attacks = {f"attacks[{name!r}]": attack_identity(attack, model) for name, attack in given.items()}
    return {"model": model_identity(model, *probe_images(source)), **attacks}


def _attack(work: Work, title: str, progress: bool) -> None:
    """Do this process's work, and share it; a stopped one says what it saved."""
    run = work.run
    with frozen(work.model), stop_requests(at_once=True) as stop:
        try:
            work.all(title, progress and run.group.rank == 0)
        except (KeyboardInterrupt, SystemExit):
            if stop.signal is not None and run.group.rank == 0:
                print(f"evaluate: stopped; {run.saved([CLEAN, *work.named])}", file=sys.stderr)
            raise
    run.share()


def _write(folder: Path, title: str, work: Work, report: Report, about: Mapping[str, str]) -> None:
    """Write the report with a gallery of the first images."""
    model, source, transform = work.model, work.source, report.settings["transform"]
    ids, candidates = work.shown(report)
    clean = judged(source.take(ids)[0])
    with frozen(model):
        rows = gallery_rows(model, clean, candidates.to(clean), ids, report.settings["seed"], source.classes)
    facts = {"model": describe_model(model), **({"transform": transform} if transform else {})}
    facts["images"] = describe_images(len(source), clean.shape[1:], source.classes)
    facts |= {name: text for name, text in about.items() if name != "repeat"}
    write_evaluation(folder, title, report.to_dict(), rows, facts, about.get("repeat"))
