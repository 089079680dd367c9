"""A recipe from its images to its report, in one folder and in stages that a stopped run need not repeat.

    <out>/run.json                    which run it is: recipe, seed, images
    <out>/classifier.safetensors      the classifier, given or trained
    <out>/pretrained.safetensors      the purifier trained on clean images
    <out>/discriminator.safetensors   its discriminator, where a GAN term has a weight
    <out>/finetuned.safetensors       the purifier trained on adversarial images
    <out>/defense.safetensors         the classifier, the fine-tuned purifier and the transform: see load_defense
    <out>/evaluate_<which>/           the evaluation of both purifiers, each with a report of its own
    <out>/metrics.jsonl               losses of every epoch of the trainings
    <out>/report.json, report.html    both verdicts
    <out>/tensorboard/                if asked for, logs of the trainings
    <out>/plan.json                   under a budget, what fits into it
    <out>/<stage>.pt                  the checkpoint of a training that has not ended

A stage is finished when its file is there, which appears at once and whole. The next one starts from the file, not from
what is in memory, so that a run that was killed ends with the bits of one that was not.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._core.checks import check_device, check_fits, check_integer, message
from .._core.distributed import Group, process_group
from .._core.files import claim_folder
from ..attacks import PGD, frozen
from ..checkpoints import load_model, read_header, save_defense, save_model
from ..classifiers import Resized, build_classifier
from ..classifiers.zoo import load_classifier, match_classes
from ..data import Dataset
from ..defense import Defense
from ..evaluation import PROTOCOLS, evaluate
from ..evaluation.evaluate import parse_budget
from ..evaluation.report import training_picture, versions, write_report
from ..purifiers import DISCRIMINATORS, build_purifier
from ..randomness import derive_seed, seeded
from ..training import PretrainStep, TrainingConfig, finetune, pretrain, train_classifier
from ..training.metrics import read_metrics, summary_writer
from .budget import Budget
from .schema import EvaluationConfig, Recipe

NOTES = (
    "pretrained: the purifier has seen clean images only. finetuned: AToP, trained on adversarial images. Every column "
    "but clean, robust and eight_bit is one attack; robust takes each image's worst candidate, and eight_bit rounds it "
    "to what a file can hold.",
    "The folders evaluate_pretrained and evaluate_finetuned have a full report each, and the adversarial images.",
)
# Images of the evaluations within a training.
HELD_OUT = 512
INCOMPLETE = "evaluate_{}: the time ended before every image was attacked: the robust accuracy is an upper bound."


@dataclass
class _Network:
    """A network and how to build it."""

    module: nn.Module
    name: str
    options: dict[str, Any]


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
    budget: float | str | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a classifier (or take the given one), pre-train, fine-tune, and evaluate the defence after both.

    A call that was stopped or killed is taken up by the same call. Under torchrun every process does its part of the
    trainings and of the evaluation, in a common folder; rank 0 writes.

    Args:
        recipe: Recipe, such as of load_recipe.
        out: folder of the run: new, empty, or of this run.
        device: where to compute.
        seed: key of all randomness: weights, data order, noise, masks, attacks and verdict.
        budget: seconds, or text such as "90s", "45m", "2h", in which a reduced form of the recipe is to end: with fewer
            updates and images, and perhaps a lighter protocol (docs/training.md); the report says which. What is
            planned depends on the speed of this machine; the result, for one plan, does not.
        tensorboard: write logs of the trainings for TensorBoard, too, to <out>/tensorboard.
        progress: show progress bars with the time left.

    Returns:
        The contents of report.json.

    Raises:
        ValueError: `out` of another run or with something else in it: nothing is changed; or networks, transform and
            images that do not fit one another.
    """
    check_integer("run_recipe", "seed", seed, low=0, high=2**63 - 1)
    place = check_device("run_recipe", "device", str(device))
    seconds = None if budget is None else parse_budget(budget, "run_recipe")
    if tensorboard:
        summary_writer()
    with process_group() as group:
        options: dict[str, Any] = {"seconds": seconds, "tensorboard": tensorboard, "progress": progress}
        return _Pipeline(recipe, Path(out), place, seed, group, **options).run()


class _Pipeline:
    """One run; see the module."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: torch.device,
        seed: int,
        group: Group,
        *,
        seconds: float | None,
        tensorboard: bool,
        progress: bool,
    ) -> None:
        start = time.monotonic()
        self.tensorboard = out / "tensorboard" if tensorboard else None
        self.recipe, self.out, self.device, self.seed = recipe, out, device, seed
        self.progress, self.group = progress, group
        train, held_out = recipe.data.load(print if progress and group.rank == 0 else None)
        if recipe.classifier.path is not None:
            train, held_out = (match_classes("run_recipe", recipe.classifier.path, part) for part in (train, held_out))
            assert isinstance(held_out, Dataset)
        self.train = train.to(device)
        plan = PROTOCOLS[recipe.evaluation.protocol]
        self.test = held_out.take(slice(0, recipe.evaluation.images or plan.images)).to(device)
        self.transform = recipe.transform.build()
        self.networks = self._build()
        self._check()
        if group.rank == 0:
            images = f"{train.description()} {held_out.description()}"
            header = {**asdict(recipe), "seed": seed, "images": images}
            claim_folder("run_recipe", out, header if seconds is None else {**header, "budget": seconds})
        group.gather(None)
        self.budget: Budget | None = None
        if seconds is not None:
            stages = ["pretrain", "finetune", "evaluate"]
            if recipe.classifier.path is None:
                stages.insert(0, "classifier")
            self.budget = Budget(seconds, start, out / "plan.json", stages, group)

    def run(self) -> dict[str, Any]:
        """All stages; the contents of report.json."""
        classifier = self.classifier()
        self.pretrain()
        self.finetune(classifier)
        self._save_defense(classifier)
        config = self.recipe.evaluation
        if self.budget is not None:
            config = self.budget.evaluate(config, len(self.test), lambda: self._measure(classifier))
        reports = {which: self.evaluate(which, classifier, config) for which in ("pretrained", "finetuned")}
        threat = {key: reports["finetuned"][key] for key in ("norm", "eps")}
        data = {
            "seed": self.seed,
            "threat_model": threat,
            "systems": {which: _verdicts(report) for which, report in reports.items()},
            "protocol": config.protocol,
            "recipe": asdict(self.recipe),
            "versions": versions(),
        }
        notes = list(NOTES)
        if self.budget is not None:
            data["budget"] = self.budget.plan
            notes = [*self.budget.notes(self.recipe.evaluation), *notes]
            notes += [INCOMPLETE.format(which) for which, report in reports.items() if not report["complete"]]
        if self.group.rank == 0:
            curves = training_picture(read_metrics(self.out / "metrics.jsonl"))
            write_report(self.out, "atop_fast: AToP from images to verdict", data, notes, curves=curves)
        self.group.gather(None)
        return data

    def classifier(self) -> nn.Module:
        """The classifier that the other stages leave as it is."""
        source = self.recipe.classifier

        # A classifier that is trained on adversarial images meets them as the defence will, behind the transform.
        transform = None if source.training.attack == "none" else self.transform

        def train(classifier: nn.Module, **options: Any) -> None:
            options["transform"] = transform
            train_classifier(self._at_its_size(classifier), *self.train.training(), **options)

        def make() -> None:
            if source.path is None:
                self._train("classifier", source.training, train, (self.networks["classifier"].module,))
            self._save("classifier", "classifier")

        self._stage("classifier", make, "classifier")
        return self._at_its_size(self._load("classifier", "classifier"))

    def pretrain(self) -> None:
        """Train the purifier and its discriminator, if there is one, on clean images."""

        def train(purifier: nn.Module, judge: nn.Module | None = None, **options: Any) -> None:
            pretrain(purifier, self.transform, self.train.training()[0], discriminator=judge, **options)

        def make() -> None:
            kinds = [kind for kind in ("purifier", "discriminator") if kind in self.networks]
            self._train("pretrain", self.recipe.pretrain, train, tuple(self.networks[kind].module for kind in kinds))
            # The stage is finished with its last file.
            if "discriminator" in self.networks:
                self._save("discriminator", "discriminator")
            self._save("pretrained", "purifier")

        self._stage("pretrain", make, "pretrained")

    def finetune(self, classifier: nn.Module) -> None:
        """Train the pre-trained purifier on adversarial images."""

        def train(purifier: nn.Module, judge: nn.Module | None = None, **options: Any) -> None:
            defense = Defense(self.transform, purifier, classifier)
            finetune(defense, *self.train.training(), discriminator=judge, **options)

        def make() -> None:
            purifier = self._load("pretrained", "purifier")
            judges = [self._load(kind, kind) for kind in ("discriminator",) if kind in self.networks]
            self._train("finetune", self.recipe.finetune, train, (purifier, *judges))
            self.networks["purifier"].module = purifier
            self._save("finetuned", "purifier")

        self._stage("finetune", make, "finetuned")

    def evaluate(self, which: str, classifier: nn.Module, config: EvaluationConfig) -> dict[str, Any]:
        """The evaluation's report of the defence with the "pretrained" or the "finetuned" purifier."""
        part = self.test.take(slice(0, config.images))
        return evaluate(
            Defense(self.transform, self._load(which, "purifier"), classifier).to(self.device),
            part.images,
            part.labels,
            protocol=config.protocol,
            norm=config.norm,
            eps=config.eps,
            seed=self.seed,
            draws=config.draws,
            selection_draws=config.selection_draws,
            batch_size=config.batch_size,
            out=self.out / f"evaluate_{which}",
            budget=None if self.budget is None else self.budget.limit(which == "pretrained"),
            diagnostics=None if config.diagnostics else (),
            title=which,
            progress=self.progress,
        ).to_dict()

    def _stage(self, name: str, make: Callable[[], None], file: str) -> None:
        """Do a stage unless its last file is there."""
        # Rank 0 decides: another one may look when it has gone on.
        if not self.group.gather((self.out / f"{file}.safetensors").exists())[0]:
            make()
        if self.group.rank == 0:
            (self.out / f"{name}.pt").unlink(missing_ok=True)
        # Nobody reads a file before it is written.
        self.group.gather(None)

    def _train(
        self, name: str, config: TrainingConfig, train: Callable[..., None], networks: tuple[nn.Module, ...]
    ) -> None:
        """Let `train` change the networks; as far as the budget goes, if there is one."""
        seed = derive_seed(self.seed, name)
        held_out = self.test.take(slice(0, HELD_OUT))
        if self.budget is not None:

            def measure(trial: TrainingConfig) -> None:
                train(*copy.deepcopy(networks), config=trial, seed=seed, progress=False)

            config = self.budget.train(name, config, len(self.train), measure)
        train(
            *networks,
            config=config,
            seed=seed,
            held_out=(held_out.images, held_out.labels),
            checkpoint=self.out / f"{name}.pt",
            metrics=self.out / "metrics.jsonl",
            tensorboard=self.tensorboard,
            progress=self.progress,
        )

    def _measure(self, classifier: nn.Module, images: int = 32, steps: int = 2, draws: int = 4) -> tuple[int, float]:
        """Passes of images with their gradient through the defence, and the seconds that these took."""
        defense = Defense(self.transform, self._load("finetuned", "purifier"), classifier).to(self.device)
        part = self.test.take(slice(0, min(images, self.recipe.evaluation.batch_size)))
        attack = PGD(defense, steps=steps, eot_iter=draws)
        seconds = 0.0
        # The first time, memory is laid out and kernels are made.
        for _ in range(2):
            start = time.monotonic()
            attack(part.images, part.labels).cpu()
            seconds = time.monotonic() - start
        return len(part) * steps * draws, seconds

    def _save(self, file: str, kind: str) -> None:
        if self.group.rank == 0:
            network = self.networks[kind]
            about: dict[str, Any] = {}
            if kind == "classifier":
                about["metadata"] = {"classes": self.train.classes, "shape": self.train.shape}
            if kind == "purifier":
                about["transform"] = self.transform
            save_model(self.out / f"{file}.safetensors", network.module, kind, network.name, **about, **network.options)

    def _save_defense(self, classifier: nn.Module) -> None:
        path = self.out / "defense.safetensors"
        if self.group.rank == 0 and not path.exists():
            about = {"classes": self.train.classes, "shape": self.train.shape, "images": self.train.description()}
            threat = {"norm": self.recipe.finetune.norm, "eps": self.recipe.finetune.eps}
            defense = Defense(self.transform, self._load("finetuned", "purifier"), classifier)
            save_defense(path, defense, **about, **threat, recipe=asdict(self.recipe), seed=self.seed)
        self.group.gather(None)

    def _load(self, file: str, kind: str) -> nn.Module:
        return load_model(self.out / f"{file}.safetensors", kind).to(self.device)

    def _at_its_size(self, classifier: nn.Module) -> nn.Module:
        size = self.recipe.classifier.size
        return classifier if size is None else Resized(classifier, size)

    def _build(self) -> dict[str, _Network]:
        """The networks as the first stage of each finds them."""
        recipe, source = self.recipe, self.recipe.classifier
        shape = {"channels": self.train.shape[0], "classes": len(self.train.classes)}
        sources: dict[str, tuple[str, dict[str, Any], Callable[..., nn.Module]]] = {
            "classifier": (source.name, {**shape, **source.options}, build_classifier),
            "purifier": (recipe.purifier.name, recipe.purifier.options, build_purifier),
        }
        if recipe.pretrain.gan_weight or recipe.finetune.gan_weight:
            sources["discriminator"] = (
                recipe.discriminator.name,
                recipe.discriminator.options,
                lambda name, **options: DISCRIMINATORS[name](**options),
            )
        if source.path is not None and source.path.endswith(".safetensors"):
            path, header = source.path, read_header(source.path)
            sources["classifier"] = (header["name"], header["options"], lambda *_, **__: load_model(path, "classifier"))
        elif source.path is not None:
            sources["classifier"] = (*sources["classifier"][:2], functools.partial(load_classifier, source.path))
        networks = {}
        for kind, (name, options, build) in sources.items():
            with seeded(derive_seed(self.seed, f"init {kind}")):
                try:
                    module = build(name, **options)
                except TypeError as error:
                    given = f"{options} ({error})"
                    raise ValueError(message("run_recipe", kind, f"{name} with options of it", given)) from error
            networks[kind] = _Network(module.to(self.device), name, options)
        return networks

    def _check(self) -> None:
        """Raise before anything is written if the networks do not fit the images or one another."""
        classifier, purifier = (self.networks[kind].module for kind in ("classifier", "purifier"))
        judge = self.networks["discriminator"].module if "discriminator" in self.networks else None
        classifier, count = self._at_its_size(classifier), len(self.train.classes)
        image = self.train.take(slice(0, 1)).floats().images
        PretrainStep(self.transform, purifier, judge, self.recipe.pretrain, self.seed).check(image)
        defense = Defense(self.transform, purifier, classifier)
        with torch.no_grad(), frozen(defense), frozen(judge), check_fits("run_recipe", "images", image):
            purified = defense.purify(image, draws=0)
            if judge is not None:
                judge(purified, purified[:, :1])
            classifier(image)
            classes = classifier(purified).shape[1]
        if classes < count:
            raise ValueError(message("run_recipe", "classifier", f"one of the data's {count} classes", classes))


def _verdicts(report: dict[str, Any]) -> dict[str, Any]:
    """The columns of a report's table."""
    return {**{name: report[name] for name in ("clean", "robust", "eight_bit")}, **report["attacks"]}
