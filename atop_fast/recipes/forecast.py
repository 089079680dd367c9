"""A forecast, before a run starts, of the work that fits into a budget, and of a budget that would be enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .._core.distributed import Group
from ..attacks import PGD
from ..data import Dataset
from ..training import TrainingConfig
from .budget import IMAGES, MARGIN, SHARES, evaluation_that_fits
from .evaluation import EvaluationConfig

# Below this share of a training's updates, and below IMAGES images, a run shows that it works and no more.
ENOUGH = 0.1
# Times to recommend, in seconds, up to a week.
TIMES = [m * 60 for m in (1, 2, 3, 5, 10, 15, 20, 30, 40)] + [
    h * 3600 for h in (1, 1.5, 2, 3, 4, 6, 8, 12, 18, 24, 36, 48, 72, 96, 120, 168)
]


@dataclass(frozen=True)
class Forecast:
    """The costs of a run under a budget.

    Attributes:
        trainings: stage -> its updates, and the seconds that one takes.
        evaluation, images: the whole evaluation, and its images.
        seconds_per_pass: of an image with its gradient, in all systems together.
        measured: the passes that gave it, and their seconds in each system.
    """

    trainings: Mapping[str, tuple[int, float]]
    evaluation: EvaluationConfig | None
    images: int
    seconds_per_pass: float
    measured: tuple[int, Mapping[str, float]] | None = None

    def fits(self, seconds: float) -> dict[str, tuple[int, int]]:
        """Stage -> the updates that fit into the time and those of the whole; "evaluate" -> images."""
        stages = [*self.trainings, *(["evaluate"] if self.evaluation is not None else [])]
        found: dict[str, tuple[int, int]] = {}
        for i, stage in enumerate(stages):
            share = seconds * SHARES[stage] / sum(SHARES[name] for name in stages[i:])
            if stage == "evaluate":
                assert self.evaluation is not None
                room = MARGIN["evaluate"] * share / self.seconds_per_pass
                found[stage] = (evaluation_that_fits(self.evaluation, self.images, room)[0], self.images)
                continue
            whole, each = self.trainings[stage]
            updates = min(whole, max(1, int(MARGIN["train"] * share / each)))
            found[stage] = (updates, whole)
            # The time that a stage does not need goes to the later ones.
            seconds -= min(share, updates * each / MARGIN["train"])
        return found

    def sentence(self, seconds: float) -> str:
        """The plan, and whether it resolves anything."""
        found = self.fits(seconds)
        parts = [f"{stage} {n:,} of {of:,} updates" for stage, (n, of) in found.items() if stage != "evaluate"]
        if "evaluate" in found:
            parts.append("{:,} of {:,} images attacked".format(*found["evaluate"]))
        text = f"About {spoken(seconds)} hold: {', '.join(parts)}."
        if not too_little(found):
            return text
        enough = next((t for t in TIMES if t > seconds and not too_little(self.fits(t))), None)
        longer = "not even a week would be enough" if enough is None else f"{spoken(enough)} would"
        return f"{text} This resolves nothing; {longer}."


def too_little(found: Mapping[str, tuple[int, int]]) -> bool:
    """Whether a plan is too small for its result to say anything on the recipe."""
    return any(n < (min(of, IMAGES) if stage == "evaluate" else ENOUGH * of) for stage, (n, of) in found.items())


def spoken(seconds: float) -> str:
    """A time as a budget is written: 20s, 40m, 1.5h."""
    if seconds < 60:
        return f"{seconds:.3g}s"
    return f"{seconds / 60:.3g}m" if seconds < 3600 else f"{seconds / 3600:.3g}h"


def seconds_per_update(config: TrainingConfig, train: Callable[..., Any], limit: float, group: Group) -> float:
    """How long an update takes: the mean of three after a first one, or that one if it took longer than `limit`."""
    start = time.monotonic()
    train(config=replace(config, updates=1, evaluate_every=0))
    # All processes train together, and so must decide alike.
    first: float = group.gather(time.monotonic() - start)[0]
    if first > limit:
        return first
    start = time.monotonic()
    train(config=replace(config, updates=3, evaluate_every=0))
    return max(1e-6, (time.monotonic() - start) / 3)


def seconds_of_passes(
    systems: Mapping[str, nn.Module], part: Dataset, steps: int = 2, draws: int = 4
) -> tuple[int, dict[str, float]]:
    """Passes of images with their gradient through a system, and the seconds that these take in each system."""
    times: dict[bool, float] = {}
    for name in ("rt_only", "finetuned"):
        attack = PGD(systems[name].to(part.images.device), steps=steps, eot_iter=draws)
        # Warm-up: the first pass allocates memory and compiles kernels.
        for _ in range(2):
            start = time.monotonic()
            attack(part.images, part.labels).cpu()
            times[name == "finetuned"] = time.monotonic() - start
    seconds = {name: times[name not in ("classifier", "rt_only")] for name in systems}
    return len(part) * steps * draws, seconds
