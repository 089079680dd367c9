"""The networks of a recipe: built with keyed weights, or read from files, and checked against one another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._core.checks import check_fits, message
from ..attacks import frozen
from ..checkpoints import load_model
from ..classifiers import Resized, build_classifier
from ..classifiers.kinds import CHECKPOINT, kind_of
from ..classifiers.zoo import load_classifier
from ..data import Dataset, Files
from ..defense import Defense
from ..purifiers import DISCRIMINATORS, build_purifier
from ..randomness import derive_seed, seeded
from ..training import PretrainStep
from ..transforms import describe_transform, show_transform
from .schema import Recipe


@dataclass
class Network:
    """A network and its architecture; a module from a file or package records its own, and `name` is None."""

    module: nn.Module
    name: str | None
    options: dict[str, Any]


def build_networks(
    recipe: Recipe, data: Dataset | Files, seed: int, device: torch.device, trust: bool = False
) -> dict[str, Network]:
    """The networks as the first stage of each finds them: "classifier", "purifier" and perhaps "discriminator".

    `trust` is that of load_classifier.

    Raises:
        ValueError: options that an architecture does not have, or a file that cannot be read.
    """
    source = recipe.classifier
    shape = CHECKPOINT.sizes(data)
    sources: dict[str, tuple[str, dict[str, Any], Callable[..., nn.Module]]] = {
        "classifier": (source.name, {**shape, **source.options}, build_classifier),
        "purifier": (recipe.purifier.name, recipe.purifier.options, build_purifier),
    }
    if recipe.pretrain.gan_weight or recipe.finetune.gan_weight:
        judge = recipe.discriminator
        sources["discriminator"] = (judge.name, judge.options, lambda name, **options: DISCRIMINATORS[name](**options))
    for kind in ("purifier", "discriminator"):
        if kind in sources and (path := getattr(recipe, kind).path) is not None:
            sources[kind] = ("", {}, functools.partial(load_model, path, kind))
    if source.path is not None:
        given = kind_of(source.path)
        further: dict[str, Any] = {key: getattr(source, key) for key in ("weights", "key", "normalize")}
        # A preset's options of the network that it would train mean nothing for a network that states its own.
        options = {**given.sizes(data), **source.options} if "options" in given.takes else {}
        name = source.name if "architecture" in given.takes else ""
        sources["classifier"] = (name, options, functools.partial(load_classifier, source.path, trust=trust, **further))
    networks = {}
    for kind, (name, options, build) in sources.items():
        with seeded(derive_seed(seed, f"init {kind}")):
            try:
                module = build(name, **options) if name else build(**options)
            except TypeError as error:
                expected = f"{name or getattr(recipe, kind).path} with options of it"
                raise ValueError(message("run_recipe", kind, expected, f"{options} ({error})")) from error
        if kind == "classifier" and source.trained:
            # A given one comes frozen.
            module.requires_grad_(True)
        networks[kind] = Network(module.to(device), None if getattr(recipe, kind).path else name, options)
    return networks


def check_networks(recipe: Recipe, networks: dict[str, Network], data: Dataset | Files, seed: int) -> None:
    """Raise if the networks do not fit the images or one another."""
    transform = recipe.transform.build()
    classifier, purifier = (networks[kind].module for kind in ("classifier", "purifier"))
    judge = networks["discriminator"].module if "discriminator" in networks else None
    trained = getattr(purifier, "trained_under", None)
    if trained not in (None, describe_transform(transform)):
        expected = f"one that was trained under {transform}, the recipe's"
        given = f"{recipe.purifier.path}, trained under {show_transform(trained)}"
        raise ValueError(message("run_recipe", "purifier.path", expected, given))
    classifier, count = resized(recipe, classifier), len(data.classes)
    image = data.take(slice(0, 1)).floats().images
    PretrainStep(transform, purifier, judge, recipe.pretrain, seed).check(image)
    defense = Defense(transform, purifier, classifier)
    with torch.no_grad(), frozen(defense), frozen(judge), check_fits("run_recipe", "images", image):
        purified = defense.purify(image, draw=0)
        if judge is not None:
            judge(purified, purified[:, :1])
        classifier(image)
        classes = classifier(purified).shape[1]
    if classes < count:
        raise ValueError(message("run_recipe", "classifier", f"one of the data's {count} classes", classes))


def resized(recipe: Recipe, classifier: nn.Module) -> nn.Module:
    """The classifier at the size at which the recipe has it work."""
    size = recipe.classifier.size
    return classifier if size is None else Resized(classifier, size)
