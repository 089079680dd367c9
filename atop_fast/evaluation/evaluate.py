"""Robust evaluation: attack the whole defense, choose each image's worst candidate, judge it on fresh randomness."""

from __future__ import annotations

import contextlib
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from .._core.checks import (
    check_choice,
    check_integer,
    check_number,
    check_radius,
    message,
)
from .._core.distributed import process_group
from .._core.memory import halve_chunk
from .._core.signals import stop_requests
from .._core.threads import Queueing
from ..attacks import NORMS, Model, Passes, counted_passes, frozen
from ..attacks import Attack as KeyedAttack
from ..data import Dataset
from ..defense import Defense
from ..randomness import derive_seed, seeded
from ..training.metrics import summary_writer
from .findings import Threat, draws_finding, examined, is_bound, outside_finding, outside_text
from .given import checked_candidates, given_attacks
from .identity import attack_identity, model_identity, probe_images, shown
from .judge import Judge, eight_bit, fixed_randomness, judged
from .page import describe_images, describe_model
from .pictures import gallery_rows
from .protocols import CURVE, PROTOCOLS, Attack, Protocol, build_attack, build_attacks
from .report import write_evaluation
from .runs import Run, Unit
from .source import Source, make_source
from .summary import CLEAN, EIGHT_BIT, Report, choice, curve_name, summarize
from .tracing import TraceFile, trace_line, traced, write_scalars
from .verdict import INTERVALS

# Under a budget, the number of images in an attack's first unit, whose time determines the sizes of later units.
PILOT = 8
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
    attacks: Mapping[str, Attack] | Callable[[Model], Mapping[str, Attack]] | None = None,
    draws: int | None = None,
    selection_draws: int = 20,
    batch_size: int = 100,
    max_batch: int | None = None,
    out: str | Path | None = None,
    budget: float | str | None = None,
    randomness: str = "fresh",
    interval: str = "wilson",
    curve: Sequence[float] = (),
    diagnostics: Sequence[Mapping[str, Any]] | None = None,
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
            0.5).
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
        diagnostics: findings to show in the report: {"name", "status": "pass" | "warn" | "fail", "reason"}. By default,
            atop_fast.doctor finds them, with a warning for each that does not pass: with `out`, all checks run on at
            most 64 of the images; without it, the cheap checks of the contract on at most 32. () disables them.
        title, progress: name of the model in the report and on the progress bar; whether to show a progress bar with
            the ETA.
        trace: file of JSON lines with loss, accuracy and passes after each step of every attack of this library, as in
            TraceStep, with the attack's name and the first image of its batch. Lines of a batch are added when it is
            done; a resumed run keeps its lines, as far as it was traced. The report shows their curve.
        tensorboard: folder for the same values as TensorBoard scalars; needs the extra atop-fast[track].
        about: name -> text for the first screen of report.html, such as {"model": "mynet.pt"}; the text "repeat" is a
            script, which `out`/repeat.sh gets, too.

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
    norm = check_choice("evaluate", "norm", plan.norm if norm is None else norm, NORMS)
    threat = Threat(norm, check_radius("evaluate", norm, plan.eps if eps is None else eps))
    radii = tuple(check_number("evaluate", "curve", radius, low=0) for radius in curve)
    deadline = None if budget is None else start + parse_budget(budget)
    transform = repr(model.transform) if isinstance(model, Defense) else None
    if tensorboard is not None:
        # A missing package must be reported now, not after an hour.
        summary_writer()
    if randomness == "fixed":
        if attacks is not None and not callable(attacks):
            expected = "a function from the model to its attacks for randomness='fixed'"
            raise TypeError(message("evaluate", "attacks", expected, type(attacks).__name__))
        model = fixed_randomness(model, seed)
    judge = Judge(model, seed, plan.draws if draws is None else draws, selection_draws, max_batch)
    with process_group() as group, counted_passes() as passes:
        with frozen(model):
            if judge.is_repeatable(source):
                judge.collapse()
            elif randomness == "fixed":
                warnings.warn(NOT_FIXED, stacklevel=2)
        named = _attacks(attacks, plan, model, threat, seed, judge.deterministic, max_batch)
        for radius in radii:
            args = (threat.norm, radius, seed, judge.deterministic, max_batch)
            named[curve_name(radius)] = build_attack(CURVE, model, *args)
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
        # An entry says what its attack does; the object may also show how much fits into memory.
        texts = {name: shown(attack if attacks else plan.attacks.get(name, CURVE)) for name, attack in named.items()}
        header = {**settings, "attacks": texts, "data": source.identity}
        if out is not None or group.size > 1:
            header["model"] = model_identity(model, *probe_images(source))
            own = named if attacks else {}
            header |= {
                f"attacks[{name!r}]": attack_identity(attack, model)
                for name, attack in own.items()
                if not name.startswith(curve_name(""))
            }
        run = Run(len(source), None if out is None else Path(out), header, group)
        if diagnostics is None:
            folder = None if out is None else Path(out)
            # One process looks: others might find other numbers, or read the folder's while they are written.
            found = examined(folder, model, source, threat, seed, progress) if group.rank == 0 else []
            diagnostics = group.gather(found)[0]
        cascade = attacks is None and plan.cascade and judge.deterministic
        names = list(named)
        tracing = trace is not None or tensorboard is not None
        file = None if trace is None else _trace_file(Path(trace), run, names)
        work = _Work(model, source, judge, run, named, threat, batch_size, cascade, deadline, passes, tracing, file)
        with frozen(model), stop_requests(at_once=True) as stop:
            try:
                work.all(title, progress and group.rank == 0)
            except (KeyboardInterrupt, SystemExit):
                if stop.signal is not None and group.rank == 0:
                    print(f"evaluate: stopped; {run.saved([CLEAN, *names])}", file=sys.stderr)
                raise
        run.share()
        if file is not None:
            file.write(run.trace(names))
        headline = plan.headline if attacks is None else None
        diagnostics = [*diagnostics, *outside_finding(run, work.attacks, source.sample, threat)]
        if not judge.deterministic:
            diagnostics += draws_finding(diagnostics, work.attacks)
        options = (radii, settings, interval, cascade, headline, diagnostics, source.classes, source.files)
        report = summarize(run, source.labels.cpu(), list(work.attacks), *options)
        if tensorboard is not None and group.rank == 0:
            write_scalars(Path(tensorboard), report.trace)
        if out is not None and group.rank == 0:
            ids, candidates = work.shown(report)
            clean = judged(source.take(ids)[0])
            with frozen(model):
                rows = gallery_rows(model, clean, candidates.to(clean), ids, seed, source.classes)
            facts = {"model": describe_model(model), **({"transform": transform} if transform else {})}
            facts["images"] = describe_images(len(source), clean.shape[1:], source.classes)
            facts |= {name: text for name, text in (about or {}).items() if name != "repeat"}
            write_evaluation(Path(out), title, report.to_dict(), rows, facts, (about or {}).get("repeat"))
        # A barrier: no rank may close its connections before the report is written.
        group.gather(None)
    return report


@dataclass
class _Work:
    """The units of one process: its blocks of images, candidate by candidate."""

    model: Model
    source: Source
    judge: Judge
    run: Run
    named: dict[str, Attack]
    threat: Threat
    batch_size: int
    cascade: bool
    deadline: float | None
    passes: Passes
    tracing: bool
    trace_file: TraceFile | None

    def __post_init__(self) -> None:
        self.attacks = {n: attack for n, attack in self.named.items() if not n.startswith(curve_name(""))}
        self.outside: set[str] = set()
        blocks = torch.arange(len(self.source)).split(self.batch_size)
        self.blocks = blocks[self.run.group.rank :: self.run.group.size]

    def all(self, title: str, progress: bool) -> None:
        """Process all remaining units, with a progress bar."""
        total = sum(map(len, self.blocks)) * (len(self.named) + 2)
        with tqdm(total=total, desc=title, disable=not progress, unit="img") as self.bar:
            self.queueing = Queueing(torch.get_num_threads() if self.source.sample.device.type == "cpu" else 1)
            self._candidates(CLEAN)
            if self.deadline is not None:
                # Reserve time for the 8-bit images at the end, which cost as much as the clean images.
                clean = sum(unit.seconds for unit in self.run.units if unit.name == CLEAN)
                self.deadline -= clean / self.run.group.size
            for name in self.named:
                self._candidates(name)
            self._round()

    def shown(self, report: Report, count: int = 8) -> tuple[Tensor, Tensor]:
        """The ids and the chosen candidates (n, C, H, W) of the first images of this process, for the gallery."""
        ids = self.blocks[0][:count]
        rows = [self._images(report.samples[i]["attack"], torch.tensor([i])) for i in ids.tolist()]
        return ids, torch.cat(rows)

    def _candidates(self, name: str) -> None:
        """Attack the images that no log has under this name, or judge them unchanged for CLEAN."""
        self.bar.set_postfix_str(name)
        rate: float | None = None
        for block in self.blocks:
            todo = self._todo(name, block)
            self._skip(len(block) - len(todo))
            while len(todo):
                if not (size := self._size(name, rate)):
                    self._skip(len(todo))
                    break
                part = todo[:size]
                try:
                    unit = self._unit(name, part)
                except (RuntimeError, MemoryError) as error:
                    self.batch_size = halve_chunk("evaluate", "images", len(part), error)
                    continue
                todo = todo[size:]
                rate = unit.seconds / len(part)
                self.run.add(unit)
                if self.trace_file is not None:
                    self.trace_file.add(unit.trace)
                self.bar.update(len(part))
                if not self.bar.disable and (remark := self.queueing.remark()):
                    tqdm.write(f"{self.bar.desc}: {remark}", file=sys.stderr)

    def _skip(self, images: int) -> None:
        # Shrink the total: counting skipped images would distort the ETA.
        self.bar.total -= images
        self.bar.refresh()

    def _todo(self, name: str, block: Tensor) -> Tensor:
        todo = ~self.run.done(name)[block]
        if self.cascade and name in self.attacks:
            names = list(self.attacks)
            correct = choice(self.run, [CLEAN, *names[: names.index(name)]])[1]
            todo &= correct[block] > 0
        return block[todo]

    def _size(self, name: str, rate: float | None) -> int:
        """The number of images in the next unit: the batch size, or fewer near the end of the budget, 0 after it."""
        if self.deadline is None or name == CLEAN:
            return self.batch_size
        left = self.deadline - time.monotonic()
        if left <= 0:
            return 0
        return min(self.batch_size, PILOT if rate is None else int(left / max(rate, 1e-9)))

    def _unit(self, name: str, ids: Tensor) -> Unit:
        start, index = time.monotonic(), ids.to(self.source.sample.device)
        before = replace(self.passes)
        x, labels = self.source.take(ids)
        steps: list[dict[str, Any]] = []
        candidates = x if name == CLEAN else self._attack(name, x, labels, index, steps)
        # The passes of other libraries' attacks cannot be counted.
        seen = name == CLEAN or self.passes != before
        if name in (CLEAN, *self.attacks):
            values = self.judge(name, candidates, labels, index)
        else:
            # Points of the curve are not candidates for the choice.
            values = {"predictions": self.judge.predictions(name, candidates, labels, index)}
        values["distance"] = self.threat.distance(candidates - x).cpu()
        self._warn_outside(name, values["distance"])
        images = candidates.float().cpu() if name in self.attacks else None
        forward, backward = self._since(before) if seen else (None, None)
        return Unit(name, ids, values, images, time.monotonic() - start, forward, backward, tuple(steps))

    def _warn_outside(self, name: str, distance: Tensor) -> None:
        """Warn once, immediately, if candidates lie outside the ball: the remaining work may take hours."""
        if name not in self.attacks or name in self.outside or not is_bound(self.attacks[name]):
            return
        if count := int(self.threat.outside(distance, self.source.sample).sum()):
            self.outside.add(name)
            warnings.warn(f"evaluate: {outside_text(name, count, distance, self.threat)}", stacklevel=2)

    def _images(self, name: str, ids: Tensor) -> Tensor:
        return self.source.take(ids)[0].float().cpu() if name == CLEAN else self.run.images(name, ids)

    def _since(self, before: Passes) -> tuple[int, int]:
        return self.passes.forward - before.forward, self.passes.backward - before.backward

    def _attack(self, name: str, x: Tensor, labels: Tensor, ids: Tensor, steps: list[dict[str, Any]]) -> Tensor:
        """The attack's candidates; if attacks are traced, its steps are added to `steps`."""
        attack, first = self.named[name], int(ids[0])
        if self.tracing:
            attack = traced(attack, lambda step: steps.append(trace_line(name, first, step)))
        # Attacks of this library have keyed randomness, so they need not lock the global generators.
        own = isinstance(attack, KeyedAttack)
        seed = derive_seed(self.judge.seed, "attack", name, first)
        with contextlib.nullcontext() if own else seeded(seed, x.device):
            return checked_candidates(name, attack(x, labels, ids), x)

    def _round(self) -> None:
        """Judge the chosen candidates, rounded to 8 bits, by the same draws as their verdicts."""
        names = [CLEAN, *self.attacks]
        chosen = choice(self.run, names)[0]
        radius = self.threat.eps if self.threat.norm == "Linf" else None
        for number, name in enumerate(names):
            for block in self.blocks:
                # Named after the candidate, so that a different choice in a resumed run is judged again.
                ids = block[(chosen[block] == number) & ~self.run.done(name + EIGHT_BIT)[block]]
                if not len(ids):
                    continue
                start, before, sample = time.monotonic(), replace(self.passes), self.source.sample
                x, labels = self.source.take(ids)
                ball = radius if name != CLEAN and self._inside(name, ids) else None
                candidates = x.float() if name == CLEAN else self.run.images(name, ids).to(x.device)
                rounded = eight_bit(candidates, x, ball)
                images = rounded.to(judged(sample[:0]).dtype) / 255
                predictions = self.judge.predictions(name, images, labels, ids.to(x.device))
                cost = (time.monotonic() - start, *self._since(before))
                self.run.add(Unit(name + EIGHT_BIT, ids, {"predictions": predictions}, rounded.cpu(), *cost))
                self.bar.update(len(ids))

    def _inside(self, name: str, ids: Tensor) -> bool:
        """Whether the candidates lie in the ball; StAdv's do not, and rounding must not project them into it."""
        return not self.threat.outside(self.run.tables[name]["distance"][ids], self.source.sample).any()


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
    attacks: Mapping[str, Attack] | Callable[[Model], Mapping[str, Attack]] | None,
    protocol: Protocol,
    model: Model,
    threat: Threat,
    seed: int,
    deterministic: bool,
    max_batch: int | None,
) -> dict[str, Attack]:
    if attacks is None:
        return build_attacks(protocol, model, threat.norm, threat.eps, seed, deterministic, max_batch)
    return given_attacks(attacks, model)
