"""A recipe from its images to its report, in one folder and in stages that a stopped run need not repeat.

    <out>/run.json                    the run's identity: recipe, seed, images
    <out>/classifier.safetensors      the classifier, given or trained
    <out>/pretrained.safetensors      the purifier trained on clean images, or the given one
    <out>/discriminator.safetensors   its discriminator, where a GAN term has a weight
    <out>/finetuned.safetensors       the purifier trained on adversarial images
    <out>/<ablation>.safetensors      the same, trained on adversarial images of the classifier alone, if asked for
    <out>/defense.safetensors         the classifier, the fine-tuned purifier and the transform: see load_defense
    <out>/evaluate_<system>/          the evaluation of each system, with a report of its own
    <out>/metrics.jsonl               losses of every epoch of the trainings; of the ablation, metrics-ablation.jsonl
    <out>/report.json, report.html    all verdicts; gallery.png
    <out>/tensorboard/                if asked for, logs of the trainings
    <out>/plan.json                   under a budget, its plan
    <out>/<stage>.pt                  the checkpoint of a training that has not ended

A stage is finished when its file exists; files are written atomically. The next stage starts from the file, not from
memory, so that a run that was killed and resumed ends with the same bits as an uninterrupted one.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._core.checks import check_choice, check_device, check_integer
from .._core.distributed import Group, process_group
from .._core.files import claim_folder, describe_module
from ..checkpoints import load_model, save_defense, save_model
from ..classifiers.zoo import match_classes, sized
from ..data import Dataset
from ..defense import Defense
from ..evaluation.evaluate import parse_budget
from ..randomness import derive_seed
from ..training import TrainingConfig, finetune, pretrain, train_classifier
from ..training.metrics import summary_writer
from .budget import TRIAL, Budget
from .evaluation import EvaluationConfig
from .forecast import Forecast, seconds_of_passes, seconds_per_update
from .networks import Network, build_networks, check_networks, resized
from .schema import Recipe
from .smaller import fitted, halved, spoken_halvings
from .verdicts import ABLATION, write_verdicts

STAGES = ("classifier", "pretrain", "finetune", "evaluate")
# Images of the evaluations within a training.
HELD_OUT = 512


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    until: str = "evaluate",
    device: str | torch.device = "auto",
    seed: int = 0,
    budget: float | str | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    trust: bool = False,
) -> dict[str, Any] | None:
    """Train a classifier (or take the given one), pre-train, fine-tune, and evaluate the defense and its parts.

    The same call resumes a run that was stopped or killed; a call with a later stage continues one that ended early.
    Under torchrun every process does its part of the trainings and of the evaluation, in a common folder; rank 0
    writes.

    Args:
        recipe: Recipe, such as of load_recipe.
        out: folder of the run: new, empty, or of this run.
        until: the last stage: "classifier", "pretrain", "finetune" or "evaluate".
        device: where to compute; "auto" takes a GPU if there is one.
        seed: key of all randomness: weights, data order, noise, masks, attacks and verdict.
        budget: seconds, or text such as "90s", "45m", "2h", in which a reduced form of the recipe is to end: with fewer
            updates and images, and perhaps a lighter protocol (docs/training.md); the report says which. The plan
            depends on the speed of this machine; the result of a given plan does not.
        tensorboard: write logs of the trainings for TensorBoard, too, to <out>/tensorboard.
        progress: show progress bars with the time left.
        trust: run the program in the classifier's file; see load_classifier.

    Returns:
        The contents of report.json; None if the run ended before the evaluation.

    Raises:
        ValueError: `out` belongs to another run or holds something else, and is left unchanged; or networks, transform
            and images do not fit one another.
    """
    check_integer("run_recipe", "seed", seed, low=0, high=2**63 - 1)
    check_choice("run_recipe", "until", until, STAGES)
    chosen = check_device("run_recipe", "device", str(device))
    seconds = None if budget is None else parse_budget(budget, "run_recipe")
    if tensorboard:
        summary_writer()
    with process_group() as group:
        options: dict[str, Any] = {"seconds": seconds, "tensorboard": tensorboard, "progress": progress, "trust": trust}
        return _Pipeline(recipe, Path(out), chosen, seed, group, until, **options).run()


class _Pipeline:
    """One run; see the module."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: torch.device,
        seed: int,
        group: Group,
        until: str,
        *,
        seconds: float | None,
        tensorboard: bool,
        progress: bool,
        trust: bool,
    ) -> None:
        start = time.monotonic()
        self.tensorboard = out / "tensorboard" if tensorboard else None
        if recipe.classifier.path is not None and recipe.classifier.size is None:
            recipe = replace(recipe, data=sized("run_recipe", recipe.classifier.path, recipe.data))
        self.recipe, self.out, self.device, self.seed = recipe, out, device, seed
        self.progress, self.group, self.until = progress, group, until
        self.say: Callable[[str], object] | None = print if progress and group.rank == 0 else None
        train, held_out = recipe.data.load(self.say)
        if recipe.classifier.path is not None:
            train, held_out = (match_classes("run_recipe", recipe.classifier.path, part) for part in (train, held_out))
            assert isinstance(held_out, Dataset)
        self.train = train.to(device)
        self.test = recipe.evaluation.part(held_out).to(device)
        self.transform = recipe.transform.build()
        self.networks = build_networks(recipe, self.train, seed, device, trust)
        check_networks(recipe, self.networks, self.train, seed)
        if group.rank == 0:
            images = f"{train.description()} {held_out.description()}"
            header = {**asdict(recipe), "seed": seed, "images": images}
            if given := [kind for kind in self.networks if getattr(recipe, kind).path is not None]:
                header["weights"] = {kind: describe_module(self.networks[kind].module) for kind in given}
            known = (out / "run.json").exists()
            claim_folder("run_recipe", out, header if seconds is None else {**header, "budget": seconds})
            if known and self.say is not None:
                self.say(f"Going on with the run in {out}")
        group.gather(None)
        self.budget: Budget | None = None
        self.forecast: Forecast | None = None
        if seconds is not None:
            skipped = {"classifier": not recipe.classifier.trained, "pretrain": recipe.purifier.path is not None}
            stages = [stage for stage in STAGES if not skipped.get(stage)]
            if recipe.ablation:
                stages.insert(stages.index("finetune") + 1, "ablation")
            self.budget = Budget(seconds, start, out / "plan.json", stages, group)
            self._plan(seconds, stages)

    def run(self) -> dict[str, Any] | None:
        """The stages up to the last one; the contents of report.json."""
        last = STAGES.index(self.until)
        classifier = self.classifier()
        if last >= STAGES.index("pretrain"):
            self.pretrain()
        if last >= STAGES.index("finetune"):
            self.finetune(classifier)
        return self.evaluate(classifier) if self.until == "evaluate" else None

    def classifier(self) -> nn.Module:
        """The classifier that the other stages leave as it is."""
        source, module = self.recipe.classifier, self.networks["classifier"].module

        def make() -> None:
            if source.trained:
                self._train("classifier", source.training, self._fit_classifier, (module,))
            self._save("classifier", "classifier", module)

        self._stage("classifier", make, "classifier")
        classifier = resized(self.recipe, self._load("classifier", "classifier"))
        if self.say is not None:
            with torch.no_grad():
                classes = torch.cat([classifier(part).argmax(dim=1) for part in self.test.images.split(256)])
            accuracy = float((classes == self.test.labels).float().mean())
            self.say(f"Accuracy of the classifier on {len(self.test):,} held-out images: {accuracy:.3f}")
        return classifier

    def pretrain(self) -> None:
        """Train the purifier and its discriminator, if there is one, on clean images."""
        modules = {kind: network.module for kind, network in self.networks.items() if kind != "classifier"}

        def make() -> None:
            if self.recipe.purifier.path is None:
                self._train("pretrain", self.recipe.pretrain, self._fit_purifier, tuple(modules.values()))
            # The stage is finished with its last file.
            if "discriminator" in modules:
                self._save("discriminator", "discriminator", modules["discriminator"])
            self._save("pretrained", "purifier", modules["purifier"])

        self._stage("pretrain", make, "pretrained")

    def finetune(self, classifier: nn.Module) -> None:
        """Train the pre-trained purifier on adversarial images; and another copy for the ablation."""

        def make(name: str, config: TrainingConfig, file: str) -> None:
            purifier = self._load("pretrained", "purifier")
            judges = [self._load(kind, kind) for kind in ("discriminator",) if kind in self.networks]
            self._train(name, config, functools.partial(self._fit_defense, classifier), (purifier, *judges))
            self._save(file, "purifier", purifier)

        self._stage("finetune", lambda: make("finetune", self.recipe.finetune, "finetuned"), "finetuned")
        if self.recipe.ablation:
            self._stage("ablation", lambda: make("ablation", self._ablation(), ABLATION), ABLATION)
        self._save_defense(classifier)

    def _ablation(self) -> TrainingConfig:
        return replace(self.recipe.finetune, attacked="classifier", attack_draw="own")

    def _fit_classifier(self, classifier: nn.Module, **options: Any) -> None:
        # A classifier that is trained on adversarial images meets them as the defense will, behind the transform.
        transform = None if self.recipe.classifier.training.attack == "none" else self.transform
        train_classifier(resized(self.recipe, classifier), *self.train.training(), transform=transform, **options)

    def _fit_purifier(self, purifier: nn.Module, judge: nn.Module | None = None, **options: Any) -> None:
        pretrain(purifier, self.transform, self.train.training()[0], discriminator=judge, **options)

    def _fit_defense(
        self, classifier: nn.Module, purifier: nn.Module, judge: nn.Module | None = None, **options: Any
    ) -> None:
        defense = Defense(self.transform, purifier, classifier)
        finetune(defense, *self.train.training(), discriminator=judge, **options)

    def _plan(self, seconds: float, stages: Sequence[str]) -> None:
        """Choose the size of the networks under the budget, and say what fits; a resumed run keeps to its plan."""
        assert self.budget is not None
        if not self.budget.plan:

            def forecast(recipe: Recipe) -> Forecast:
                networks = build_networks(recipe, self.train, self.seed, self.device)
                return self._forecast(recipe, networks, seconds, stages)

            _, self.forecast, halvings = fitted(self.recipe, seconds, forecast, self.group)
            sentence = self.group.gather(self.forecast.sentence(seconds))[0]
            if halvings:
                self.budget.keep_halvings(halvings)
                sentence += f" The channels of the networks that it trains are {spoken_halvings(halvings)}."
            if self.say is not None:
                self.say(sentence)
        for _ in range(self.budget.halvings):
            smaller = halved(self.recipe)
            assert smaller is not None
            self.recipe = smaller
        if self.budget.halvings:
            self.networks = build_networks(self.recipe, self.train, self.seed, self.device)

    def _forecast(
        self, recipe: Recipe, networks: Mapping[str, Network], seconds: float, stages: Sequence[str]
    ) -> Forecast:
        """The costs of the run of a recipe, measured on untrained copies of its networks."""
        classifier, *others = (network.module for network in networks.values())
        frozen = resized(recipe, copy.deepcopy(classifier).eval())
        fit_defense = functools.partial(self._fit_defense, frozen)
        trainings: dict[str, tuple[TrainingConfig, Callable[..., None], Sequence[nn.Module]]] = {
            "classifier": (recipe.classifier.training, self._fit_classifier, [classifier]),
            "pretrain": (recipe.pretrain, self._fit_purifier, others),
            "finetune": (recipe.finetune, fit_defense, others),
            "ablation": (self._ablation(), fit_defense, others),
        }
        found = {}
        for name in stages:
            if name in trainings:
                config, fit, parts = trainings[name]
                train = functools.partial(fit, *copy.deepcopy(parts), seed=self.seed, progress=False)
                each = seconds_per_update(config, train, seconds / 50, self.group)
                found[name] = (config.total(len(self.train)), each)
        if "evaluate" not in stages:
            return Forecast(found, None, 0, 0.0)
        systems = self._systems(frozen, dict.fromkeys(("pretrained", "finetuned"), others[0]))
        passes, took = seconds_of_passes(systems, self._first(8), steps=1, draws=1)
        each = sum(took.values()) / passes / self.group.size
        return Forecast(found, recipe.evaluation, len(self.test), each, (passes, took))

    def evaluate(self, classifier: nn.Module) -> dict[str, Any]:
        """Judge the classifier alone and every defense in front of it on the same images, and write the report."""
        config = self.recipe.evaluation
        purifiers = {name: self._load(name, "purifier") for name in ("pretrained", "finetuned")}
        if self.recipe.ablation:
            purifiers[ABLATION] = self._load(ABLATION, "purifier")
        systems = self._systems(classifier, purifiers)
        if self.budget is not None:
            config = self.budget.evaluate(config, len(self.test), lambda: self._speed(systems))
        reports = {name: self._judge(name, system.to(self.device), config) for name, system in systems.items()}
        options: dict[str, Any] = {"config": config, "test": self.test, "systems": systems, "reports": reports}
        if self.budget is not None:
            options["reduced"] = self.budget.reduced(self.recipe, len(self.train), config)
        return write_verdicts(self.out, self.recipe, self.seed, self.budget, self.group, **options)

    def _systems(self, classifier: nn.Module, purifiers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The classifier alone, the transform in front of it, and the defenses."""
        alone = Defense(self.transform, None, classifier)
        defenses = {name: Defense(self.transform, purifier, classifier) for name, purifier in purifiers.items()}
        return {"classifier": classifier, "rt_only": alone, **defenses}

    def _judge(self, name: str, system: nn.Module, config: EvaluationConfig) -> dict[str, Any]:
        """The evaluation's report of one system."""
        if not isinstance(system, Defense):
            config = replace(config, randomness="fresh")
        if name not in ("pretrained", "finetuned"):
            # The report's claims rest on the defenses.
            config = replace(config, diagnostics=False)
        return config.run(
            system,
            self.test.take(slice(0, config.images)),
            seed=self.seed,
            out=self.out / f"evaluate_{name}",
            budget=None if self.budget is None else self.budget.limit(name),
            title=name,
            progress=self.progress,
        ).to_dict()

    def _stage(self, name: str, make: Callable[[], None], file: str) -> None:
        """Run a stage unless its last file exists."""
        # Rank 0 decides: another rank might check after rank 0 has written the file.
        if not self.group.gather((self.out / f"{file}.safetensors").exists())[0]:
            make()
            if self.budget is not None:
                self.budget.finish(name)
        if self.group.rank == 0:
            (self.out / f"{name}.pt").unlink(missing_ok=True)
        # Barrier: no rank reads a file before it is written.
        self.group.gather(None)

    def _train(
        self, name: str, config: TrainingConfig, train: Callable[..., None], networks: tuple[nn.Module, ...]
    ) -> None:
        """Train the networks by `train`, within the budget if there is one."""
        # The two fine-tunings differ only in the model under attack.
        seed = derive_seed(self.seed, "finetune" if name == "ablation" else name)
        own = "-ablation" if name == "ablation" else ""
        held_out = self.test.take(slice(0, HELD_OUT))
        if self.budget is not None:

            def measure(trial: TrainingConfig) -> None:
                train(*copy.deepcopy(networks), config=trial, seed=seed, progress=False)

            # The ablation has as many updates as the fine-tuning.
            planned = "finetune" if name == "ablation" else name
            known = None if self.forecast is None else self.forecast.trainings[planned][1]
            config = self.budget.train(planned, config, len(self.train), measure, known)
        train(
            *networks,
            config=config,
            seed=seed,
            held_out=(held_out.images, held_out.labels),
            checkpoint=self.out / f"{name}.pt",
            metrics=self.out / f"metrics{own}.jsonl",
            tensorboard=None if self.tensorboard is None else self.tensorboard.with_name(f"tensorboard{own}"),
            progress=self.progress,
        )

    def _speed(self, systems: dict[str, nn.Module]) -> tuple[int, Mapping[str, float]]:
        """See seconds_of_passes; the forecast's numbers if measuring again would take more than a share of the time."""
        assert self.budget is not None
        if self.forecast is not None and self.forecast.measured is not None:
            passes, took = self.forecast.measured
            left = self.group.gather(self.budget.left())[0]
            # Two systems are measured twice, with 32 images, two steps and four draws.
            if 2 * 32 * 2 * 4 * (took["rt_only"] + took["finetuned"]) / passes > TRIAL * left:
                return passes, took
        return seconds_of_passes(systems, self._first(32))

    def _first(self, count: int) -> Dataset:
        """The first images of the evaluation, at most as many as it attacks together."""
        return self.test.take(slice(0, min(count, self.recipe.evaluation.batch_size)))

    def _save(self, file: str, kind: str, module: nn.Module) -> None:
        if self.group.rank == 0:
            network = self.networks[kind]
            about: dict[str, Any] = {}
            if kind == "classifier":
                side = self.recipe.classifier.size
                shape = self.train.shape if side is None else (self.train.shape[0], side, side)
                about["metadata"] = {"classes": self.train.classes, "shape": shape}
            if kind == "purifier":
                about["transform"] = self.transform
            options = {} if network.name is None else network.options
            save_model(self.out / f"{file}.safetensors", module, kind, network.name, **about, **options)

    def _save_defense(self, classifier: nn.Module) -> None:
        path = self.out / "defense.safetensors"
        if self.group.rank == 0 and not path.exists():
            about = {"classes": self.train.classes, "shape": self.train.shape, "images": self.train.description()}
            threat = {"norm": self.recipe.finetune.norm, "eps": self.recipe.finetune.eps}
            defense = Defense(self.transform, self._load("finetuned", "purifier"), classifier)
            save_defense(path, defense, metadata=about | threat | {"recipe": asdict(self.recipe), "seed": self.seed})
        self.group.gather(None)

    def _load(self, file: str, kind: str) -> nn.Module:
        return load_model(self.out / f"{file}.safetensors", kind).to(self.device)
