"""A recipe from its images to its report, in one folder and in stages that a stopped run need not repeat.

    <out>/run.json                    which run it is: recipe, seed, images
    <out>/classifier.safetensors      the classifier, given or trained
    <out>/pretrained.safetensors      the purifier trained on clean images, and its discriminator.safetensors
    <out>/finetuned.safetensors       the purifier trained on adversarial images
    <out>/evaluate_<which>/           the evaluation of both purifiers, each with a report of its own
    <out>/metrics.jsonl               losses of every epoch of the trainings
    <out>/report.json, report.html    both verdicts
    <out>/<stage>.pt                  the checkpoint of a training that has not ended

A stage is finished when its file is there, which appears at once and whole. The next one starts from the file, not from
what is in memory, so that a run that was killed ends with the bits of one that was not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_device, check_fits, check_integer, message
from ._files import claim_folder, describe
from .attacks import frozen
from .checkpoints import load_model, read_header, save_model
from .classifiers import build_classifier
from .defense import Defense
from .distributed import Group, process_group
from .evaluation import PROTOCOLS, evaluate
from .evaluation.report import versions, write_report
from .ops import resize
from .purifiers import DISCRIMINATORS, build_purifier
from .randomness import derive_seed, seeded
from .recipe import Recipe
from .training import PretrainStep, finetune, pretrain, train_classifier
from .zoo import load_classifier

NOTES = (
    "pretrained: the purifier has seen clean images only. finetuned: AToP, trained on adversarial images. Every column "
    "but clean, robust and eight_bit is one attack; robust takes each image's worst candidate, and eight_bit rounds it "
    "to what a file can hold.",
    "The folders evaluate_pretrained and evaluate_finetuned have a full report each, and the adversarial images.",
)


@dataclass
class _Network:
    """A network and how to build it."""

    module: nn.Module
    name: str
    options: dict[str, Any]


class Resized(nn.Module):
    """A classifier that sees all images at its own size.

    Args:
        classifier: the classifier.
        size: side in pixels; images of another size are resized bilinearly (antialiased where they shrink).
    """

    def __init__(self, classifier: nn.Module, size: int) -> None:
        super().__init__()
        self.classifier, self.size = classifier, (size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, classes)."""
        return self.classifier(x if tuple(x.shape[2:]) == self.size else resize(x, self.size, antialias=True))

    def extra_repr(self) -> str:
        return f"size={self.size}"


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
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
        progress: show progress bars with the time left.

    Returns:
        The contents of report.json.

    Raises:
        ValueError: `out` of another run or with something else in it: nothing is changed; or networks, transform and
            images that do not fit one another.
    """
    check_integer("run_recipe", "seed", seed, low=0, high=2**63 - 1)
    place = check_device("run_recipe", "device", str(device))
    with process_group() as group:
        return _Pipeline(recipe, Path(out), place, seed, progress, group).run()


class _Pipeline:
    """One run; see the module."""

    def __init__(
        self, recipe: Recipe, out: Path, device: torch.device, seed: int, progress: bool, group: Group
    ) -> None:
        self.recipe, self.out, self.device, self.seed = recipe, out, device, seed
        self.progress, self.group = progress, group
        train, held_out = recipe.data.load()
        self.train = train.to(device)
        plan = PROTOCOLS[recipe.evaluation.protocol]
        self.test = held_out.take(slice(0, recipe.evaluation.images or plan.images)).to(device)
        self.transform = recipe.transform.build()
        self.networks = self._build()
        self._check()
        if group.rank == 0:
            images = describe(train.images, train.labels, held_out.images, held_out.labels)
            claim_folder("run_recipe", out, {**asdict(recipe), "seed": seed, "images": images})
        group.gather(None)

    def run(self) -> dict[str, Any]:
        """All stages; the contents of report.json."""
        classifier = self.classifier()
        self.pretrain()
        self.finetune(classifier)
        reports = {which: self.evaluate(which, classifier) for which in ("pretrained", "finetuned")}
        threat = {key: reports["finetuned"][key] for key in ("norm", "eps")}
        data = {
            "seed": self.seed,
            "threat_model": threat,
            "systems": {which: _verdicts(report) for which, report in reports.items()},
            "protocol": self.recipe.evaluation.protocol,
            "recipe": asdict(self.recipe),
            "versions": versions(),
        }
        if self.group.rank == 0:
            write_report(self.out, "atop_fast: AToP from images to verdict", data, NOTES)
        self.group.gather(None)
        return data

    def classifier(self) -> nn.Module:
        """The classifier that the other stages leave as it is."""
        source = self.recipe.classifier

        def make() -> None:
            if source.path is None:
                train_classifier(
                    self._at_its_size(self.networks["classifier"].module),
                    self.train.images,
                    self.train.labels,
                    config=source.training,
                    **self._options("classifier"),
                )
            self._save("classifier", "classifier")

        self._stage("classifier", make, "classifier")
        return self._at_its_size(self._load("classifier", "classifier"))

    def pretrain(self) -> None:
        """Train the purifier and its discriminator on clean images."""

        def make() -> None:
            pretrain(
                self.networks["purifier"].module,
                self.transform,
                self.train.images,
                discriminator=self.networks["discriminator"].module,
                config=self.recipe.pretrain,
                **self._options("pretrain"),
            )
            # The stage is finished with its last file.
            self._save("discriminator", "discriminator")
            self._save("pretrained", "purifier")

        self._stage("pretrain", make, "pretrained")

    def finetune(self, classifier: nn.Module) -> None:
        """Train the pre-trained purifier on adversarial images."""

        def make() -> None:
            purifier = self._load("pretrained", "purifier")
            finetune(
                Defense(self.transform, purifier, classifier),
                self.train.images,
                self.train.labels,
                discriminator=self._load("discriminator", "discriminator"),
                config=self.recipe.finetune,
                **self._options("finetune"),
            )
            self.networks["purifier"].module = purifier
            self._save("finetuned", "purifier")

        self._stage("finetune", make, "finetuned")

    def evaluate(self, which: str, classifier: nn.Module) -> dict[str, Any]:
        """The evaluation's report of the defence with the "pretrained" or the "finetuned" purifier."""
        config = self.recipe.evaluation
        return evaluate(
            Defense(self.transform, self._load(which, "purifier"), classifier).to(self.device),
            self.test.images,
            self.test.labels,
            protocol=config.protocol,
            norm=config.norm,
            eps=config.eps,
            seed=self.seed,
            draws=config.draws,
            selection_draws=config.selection_draws,
            batch_size=config.batch_size,
            out=self.out / f"evaluate_{which}",
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

    def _options(self, name: str) -> dict[str, Any]:
        return {
            "seed": derive_seed(self.seed, name),
            "checkpoint": self.out / f"{name}.pt",
            "metrics": self.out / "metrics.jsonl",
            "progress": self.progress,
        }

    def _save(self, file: str, kind: str) -> None:
        if self.group.rank == 0:
            network = self.networks[kind]
            save_model(self.out / f"{file}.safetensors", network.module, kind, network.name, **network.options)

    def _load(self, file: str, kind: str) -> nn.Module:
        return load_model(self.out / f"{file}.safetensors", kind).to(self.device)

    def _at_its_size(self, classifier: nn.Module) -> nn.Module:
        size = self.recipe.classifier.size
        return classifier if size is None else Resized(classifier, size)

    def _build(self) -> dict[str, _Network]:
        """The networks as the first stage of each finds them."""
        recipe, source = self.recipe, self.recipe.classifier
        shape = {"channels": self.train.images.shape[1], "classes": len(self.train.classes)}
        sources: dict[str, tuple[str, dict[str, Any], Callable[..., nn.Module]]] = {
            "classifier": (source.name, {**shape, **source.options}, build_classifier),
            "purifier": (recipe.purifier.name, recipe.purifier.options, build_purifier),
            "discriminator": (
                recipe.discriminator.name,
                recipe.discriminator.options,
                lambda name, **options: DISCRIMINATORS[name](**options),
            ),
        }
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
        classifier, purifier, judge = (
            self.networks[kind].module for kind in ("classifier", "purifier", "discriminator")
        )
        classifier, image, count = self._at_its_size(classifier), self.train.images[:1], len(self.train.classes)
        PretrainStep(self.transform, purifier, judge, self.recipe.pretrain, self.seed).check(image)
        defense = Defense(self.transform, purifier, classifier)
        with torch.no_grad(), frozen(defense), frozen(judge), check_fits("run_recipe", "images", image):
            purified = defense.purify(image, draws=0)
            judge(purified, purified[:, :1])
            classifier(image)
            classes = classifier(purified).shape[1]
        if classes < count:
            raise ValueError(message("run_recipe", "classifier", f"one of the data's {count} classes", classes))


def _verdicts(report: dict[str, Any]) -> dict[str, Any]:
    """The columns of a report's table."""
    return {**{name: report[name] for name in ("clean", "robust", "eight_bit")}, **report["attacks"]}
