"""A reduced form of a recipe that fits into a time budget.

The length of a training and the number of attacked images are planned once, when that stage begins, from the measured
speed of the machine. <out>/plan.json stores the plan, so that a resumed run follows it and ends with the same bits as
an uninterrupted one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .._core.distributed import Group
from .._core.files import write_text
from ..evaluation import PROTOCOLS
from ..training import FinetuneConfig, TrainingConfig
from .evaluation import EvaluationConfig
from .schema import Recipe

# Fine-tuning decides what a defense is worth.
SHARES = {"classifier": 1, "pretrain": 1, "finetune": 2, "ablation": 2, "evaluate": 1}
# Share of a stage's time that its plan uses: the machine may slow down, and files must be written.
MARGIN = {"train": 0.9, "evaluate": 0.8}
# Share of a training's time that is spent on measuring its updates.
TRIAL = 0.03
# Cost of a forward pass relative to one with the gradient of the images.
FORWARD = 0.4
# If the recipe's protocol can attack fewer images than this, the protocol "quick" takes its place.
IMAGES = 100

Config = TypeVar("Config", bound=TrainingConfig)


class Budget:
    """Divides the time among the stages.

    Args:
        seconds: of the whole run, from time.monotonic() = `start`.
        path: file of the plan.
        stages: the stages of the run, keys of SHARES.
        group: of the run's processes; the first one plans for all.
    """

    def __init__(self, seconds: float, start: float, path: Path, stages: Sequence[str], group: Group) -> None:
        self.path, self.stages, self.group = path, list(stages), group
        plan = json.loads(path.read_text(encoding="utf-8")) if group.rank == 0 and path.exists() else {}
        # stage -> "seconds", and its plan.
        self.plan: dict[str, dict[str, Any]] = group.gather(plan)[0]
        # When this process began the stages that it planned, by time.monotonic().
        self.begun: dict[str, float] = {}
        # Time planned by earlier processes of this run counts as spent.
        self.end = start + seconds - sum(stage["seconds"] for stage in self.plan.values())

    @property
    def halvings(self) -> int:
        """How often the networks that the run trains are halved; see smaller.fitted."""
        return int(self.plan.get("networks", {}).get("halvings", 0))

    def keep_halvings(self, halvings: int) -> None:
        """Plan the size of the networks."""
        self._keep("networks", 0.0, {"halvings": halvings})

    def finish(self, stage: str) -> None:
        """Count the time that a finished stage took, instead of its share, as spent in later processes."""
        if stage in self.begun:
            plan = {key: value for key, value in self.plan[stage].items() if key != "seconds"}
            self._keep(stage, time.monotonic() - self.begun.pop(stage), plan)

    def left(self) -> float:
        """Seconds until the end, at least a tenth of one."""
        return max(0.1, self.end - time.monotonic())

    def train(
        self,
        stage: str,
        config: Config,
        images: int,
        measure: Callable[[Config], object],
        forecast: float | None = None,
    ) -> Config:
        """The options of a training of as many updates as fit into its time, without evaluations in between.

        Args:
            stage: its name.
            config: of the whole training, on `images` images.
            measure: trains copies of the networks by given options.
            forecast: seconds of an update as measured before; taken as they are if measuring again, which needs four
                updates, would take more than its share of the time.
        """
        whole = config.total(images)
        if stage not in self.plan:
            seconds = self._seconds(stage)
            # All processes train together, and so must decide alike.
            forecast = self.group.gather(forecast)[0]
            if forecast is not None and 4 * forecast > TRIAL * seconds:
                each, spent = forecast, 0.0
            else:
                # The first updates of a process take longer than the others.
                trial = replace(config, updates=2, evaluate_every=0)
                first = self._timed(lambda: measure(trial)) / 2
                count = max(2, int(TRIAL * seconds / first))
                each = self._timed(lambda: measure(replace(trial, updates=count))) / count
                spent = 2 * first + count * each
            updates = max(1, int((MARGIN["train"] * seconds - spent) / each))
            self._keep(stage, seconds, {"updates": min(updates, whole), "of": whole})
        return self._short(stage, config, images)

    def evaluate(
        self, config: EvaluationConfig, images: int, measure: Callable[[], tuple[int, Mapping[str, float]]]
    ) -> EvaluationConfig:
        """The options of the evaluations, of as many images as fit into their time.

        Args:
            config: of the whole evaluation, of `images` images.
            measure: passes of images with their gradient, and the seconds that these take in each system.
        """
        if "evaluate" not in self.plan:
            seconds, start = self._seconds("evaluate"), time.monotonic()
            passes, took = measure()
            total = sum(took.values())
            room = MARGIN["evaluate"] * (seconds - (time.monotonic() - start)) * passes / total * self.group.size
            count, protocol = evaluation_that_fits(config, images, room)
            shares = {name: round(one / total, 4) for name, one in took.items()}
            self._keep("evaluate", seconds, {"images": count, "of": images, "protocol": protocol, "shares": shares})
        plan = self.plan["evaluate"]
        return replace(
            config if plan["protocol"] == config.protocol else _lighter(config),
            images=plan["images"],
            batch_size=min(config.batch_size, -(-plan["images"] // self.group.size)),
            diagnostics=False,
        )

    def reduced(self, recipe: Recipe, images: int, evaluation: EvaluationConfig) -> Recipe:
        """The recipe that the run follows, so that it can be repeated without a budget; trained on `images` images."""

        def short(stage: str, config: Config) -> Config:
            return self._short(stage, config, images) if stage in self.plan else config

        classifier = replace(recipe.classifier, training=short("classifier", recipe.classifier.training))
        pretrain, finetune = short("pretrain", recipe.pretrain), short("finetune", recipe.finetune)
        return replace(recipe, classifier=classifier, pretrain=pretrain, finetune=finetune, evaluation=evaluation)

    def limit(self, system: str) -> float:
        """Seconds after which the evaluation of a system starts no further attack.

        The plan leaves one margin for all systems, for those that turn out slower than measured.
        """
        plan = self.plan["evaluate"]
        shares: dict[str, float] = plan["shares"]
        names = list(shares)
        later = sum(shares[name] for name in names[names.index(system) + 1 :])
        return max(shares[system] * plan["seconds"], self.left() - MARGIN["evaluate"] * later * plan["seconds"])

    def notes(self, config: EvaluationConfig) -> list[str]:
        """The reductions, for the report; `config` is of the whole evaluation."""
        parts = [
            f"{stage}: {plan['updates']:,} of {plan['of']:,} updates"
            for stage, plan in self.plan.items()
            if "updates" in plan
        ]
        if self.halvings:
            times = " twice" if self.halvings > 1 else ""
            parts.insert(0, f"networks: channels halved{times}")
        plan = self.plan["evaluate"]
        protocol = plan["protocol"]
        instead = "" if protocol == config.protocol else f" by the protocol {protocol} instead of {config.protocol}"
        parts.append(f"evaluation: {plan['images']:,} of {plan['of']:,} images{instead}, without diagnostics")
        return ["Reduced to fit the budget: " + "; ".join(parts) + "."]

    def _short(self, stage: str, config: Config, images: int) -> Config:
        # The plan has no time for evaluations in between, which may take longer than the training.
        return replace(shorten(config, self.plan[stage]["updates"], images), evaluate_every=0)

    def _seconds(self, stage: str) -> float:
        """A stage's share of the time that is left to it and the stages after it."""
        after = self.stages[self.stages.index(stage) :]
        self.begun[stage] = time.monotonic()
        return self.group.gather(self.left())[0] * SHARES[stage] / sum(SHARES[name] for name in after)

    def _timed(self, work: Callable[[], object]) -> float:
        start = time.monotonic()
        work()
        return self.group.gather(max(1e-6, time.monotonic() - start))[0]

    def _keep(self, stage: str, seconds: float, plan: dict[str, Any]) -> None:
        self.plan[stage] = self.group.gather({"seconds": round(seconds, 1), **plan})[0]
        if self.group.rank == 0:
            write_text(self.path, json.dumps(self.plan, indent=2) + "\n")


def shorten(config: Config, updates: int, images: int) -> Config:
    """The options of a training of fewer updates on so many images.

    Options that count epochs or updates scale with the training: the end of the classification loss's warm-up, and the
    span of a moving average.
    """
    whole = config.total(images)
    part = updates / whole if whole else 1.0
    changes: dict[str, Any] = {"updates": updates, "epochs": -(-updates // -(-images // config.batch_size))}
    if 0 < part < 1:
        changes["ema_decay"] = config.ema_decay ** (1 / part)
    if isinstance(config, FinetuneConfig):
        changes["ce_from_epoch"] = min(int(part * config.ce_from_epoch), max(0, changes["epochs"] - 1))
    return replace(config, **changes)


def evaluation_that_fits(config: EvaluationConfig, images: int, passes: float) -> tuple[int, str]:
    """How many of the images can be attacked by so many passes with gradients, and by which protocol."""
    count, lighter = (min(images, max(1, int(passes / _passes(c)))) for c in (config, _lighter(config)))
    # The attacks of "quick" do not work in L1.
    kept = count >= min(images, IMAGES) or config.threat[0] == "L1"
    return (count, config.protocol) if kept else (lighter, "quick")


def _lighter(config: EvaluationConfig) -> EvaluationConfig:
    """The same evaluation by the protocol "quick"."""
    norm, eps = config.threat
    draws = config.draws or PROTOCOLS[config.protocol].draws
    return replace(config, protocol="quick", norm=norm, eps=eps, draws=draws)  # type: ignore[arg-type]


def _passes(config: EvaluationConfig) -> float:
    """About how many passes with gradients an image costs."""
    protocol = PROTOCOLS[config.protocol]
    attacks = 0
    for entry in protocol.attacks.values():
        options = {**entry.options, **(config.quick if entry.attack == "PGD" else {})}
        steps = options.get("steps", options.get("n_queries", 1)) * (2 if entry.attack == "PMA" else 1)
        attacks += steps * options.get("eot_iter", 1) * options.get("target_classes", 1)
    draws = config.draws or protocol.draws
    # Clean images and every attack's images get selection draws and a verdict; rounded images get a verdict.
    judged = (1 + len(protocol.attacks)) * (config.selection_draws + draws) + draws
    return attacks + FORWARD * judged
