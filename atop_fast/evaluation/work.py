"""The work of one process in an evaluation: its blocks of images, candidate by candidate."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._core.memory import halve_chunk
from .._core.threads import Queueing
from ..attacks import Attack, Model, Passes
from ..randomness import derive_seed, seeded
from .findings import Threat, is_bound, outside_text
from .given import checked_candidates
from .judge import Judge, eight_bit, judged
from .protocols import AnyAttack
from .runs import Run, Unit
from .source import Source
from .summary import CLEAN, EIGHT_BIT, Report, choice, curve_name
from .tracing import TraceFile, trace_line, traced

# Under a budget, the number of images in an attack's first unit, whose time determines the sizes of later units.
PILOT = 8


@dataclass
class Work:
    """The units that no log has yet; `all` processes them."""

    model: Model
    source: Source
    judge: Judge
    run: Run
    named: dict[str, AnyAttack]
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
        own = isinstance(attack, Attack)
        seed = derive_seed(self.judge.seed, "attack", name, first)
        with contextlib.nullcontext() if own else seeded(seed, x.device):
            # An attack that writes into its arguments must not move the images from which distances are measured.
            return checked_candidates(name, attack(x.clone(), labels.clone(), ids.clone()), x)

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
