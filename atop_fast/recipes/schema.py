"""Recipes: everything that a training from images to a report depends on, as dataclasses and as YAML files."""

from __future__ import annotations

import importlib.resources
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from .._core.checks import check_choice, check_integer, message
from .._core.yaml import parse_yaml
from ..classifiers import CLASSIFIERS
from ..classifiers.programs import names_program
from ..purifiers import DISCRIMINATORS, PURIFIERS
from ..training import ClassifierConfig, FinetuneConfig, PretrainConfig
from .evaluation import EvaluationConfig
from .options import DataConfig, TransformConfig

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ClassifierSource:
    """The classifier to defend.

    Attributes:
        path: trained weights: a .safetensors file of atop-fast, or a checkpoint of torch.save with architecture `name`;
            or FILE.py:Class, "torchvision:<name>" or "timm:<name>" with `weights`, or another classifier that
            load_classifier takes; none trains one.
        weights: file of the weights of a FILE.py:Class or of a torchvision or timm model.
        normalize: mean and standard deviation by which the network expects its input to be normalized: imagenet,
            cifar10, cifar100, mnist, half or MEAN/STD; by default those of its package, or none.
        key: of a checkpoint that holds several networks: the dictionary, or the prefix of the names.
        name: architecture, a name of build_classifier.
        options: of the architecture; channels and classes are those of the data unless given.
        size: side in pixels at which it works; images of another size are resized to it. None does not resize.
        finetune: train the given classifier further, such as on adversarial images; False takes it as it is.
        training: options of its training.
    """

    path: str | None = None
    weights: str | None = None
    normalize: str | None = None
    key: str | None = None
    name: str = "resnet18"
    options: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    finetune: bool = False
    training: ClassifierConfig = ClassifierConfig(augment=True)

    def __post_init__(self) -> None:
        check_choice("ClassifierSource", "name", self.name, list(CLASSIFIERS))
        if self.size is not None:
            check_integer("ClassifierSource", "size", self.size, low=1)
        if self.finetune and self.path is None:
            raise ValueError(message("ClassifierSource", "path", "the classifier that `finetune` starts from", None))

    @property
    def trained(self) -> bool:
        """Whether the recipe trains it."""
        return self.path is None or self.finetune


@dataclass(frozen=True)
class PurifierSource:
    """The purifier.

    Attributes:
        path: pre-trained weights: a purifier's .safetensors file, which also says its architecture; none trains one.
        name: architecture, a name of build_purifier.
        options: of the architecture.
    """

    path: str | None = None
    name: str = "unet"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("PurifierSource", "name", self.name, list(PURIFIERS))


@dataclass(frozen=True)
class DiscriminatorSource:
    """The discriminator.

    Attributes:
        path: its weights for a purifier that is pre-trained; none starts with new ones.
        name: architecture: sn_patch (SNPatchDiscriminator).
        options: of the architecture: channels, width, depth.
    """

    path: str | None = None
    name: str = "sn_patch"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("DiscriminatorSource", "name", self.name, list(DISCRIMINATORS))


@dataclass(frozen=True)
class Recipe:
    """A training from images to a report; see run_recipe.

    Attributes:
        data: images and their split.
        transform: the random transform.
        classifier: the classifier to defend, given or to train.
        purifier, discriminator: the networks.
        pretrain, finetune: the two trainings of the purifier.
        evaluation: how the result is judged.
        ablation: also fine-tune on adversarial images of the classifier alone, as the public code does, and judge it.
        notes: text that the report quotes.
    """

    data: DataConfig = DataConfig()
    transform: TransformConfig = TransformConfig()
    classifier: ClassifierSource = ClassifierSource()
    purifier: PurifierSource = PurifierSource()
    discriminator: DiscriminatorSource = DiscriminatorSource()
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ablation: bool = False
    notes: str = ""


def preset_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = importlib.resources.files("atop_fast.recipes").joinpath("presets")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_recipe(preset: str | Path, *, trust: bool = False) -> Recipe:
    """A recipe by the name of a preset, or from a YAML file.

    A file has the fields of Recipe as keys. With `base`, the name of a preset or the path of another file (relative to
    it), it says only what differs from that; `options` of a network are replaced as a whole.

    Args:
        preset: a name in preset_names(), or the path of a file that ends in .yaml or .yml.
        trust: accept a recipe that names a FILE.py:Class as its classifier, which a run executes.

    Raises:
        ValueError: no such preset or file, or one that is no recipe: the message names the file and the key; or it
            names a program without `trust`.
    """
    content, where = _read(preset, ())
    try:
        _check_keys(Recipe, content, "")
    except ValueError as error:
        raise ValueError(message("load_recipe", "preset", "a recipe", f"{where} ({error})")) from error
    # Imported here, as the rest of the package works without it.
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    try:
        recipe = Recipe(**parser.instantiate(parser.parse_object(content)).as_dict())
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(message("load_recipe", "preset", "a recipe", f"{where} ({reason})")) from error
    if not trust and names_program(recipe.classifier.path or ""):
        expected = f"given (--trust on the command line) to run {recipe.classifier.path}, which {where} names"
        raise ValueError(message("load_recipe", "trust", expected, None))
    return recipe


def _read(preset: str | Path, seen: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """The content of a preset or file merged over that of its base, and its name in messages."""
    path = Path(preset)
    is_file = path.suffix in SUFFIXES
    if not is_file and str(preset) not in preset_names():
        expected = f"the path of a YAML file, or one of {', '.join(map(repr, preset_names()))}"
        raise ValueError(message("load_recipe", "preset", expected, repr(str(preset))))
    package = importlib.resources.files("atop_fast.recipes")
    where = str(path) if is_file else f"presets/{preset}.yaml"
    same = str(path.resolve()) if is_file else where
    if same in seen:
        raise ValueError(message("load_recipe", "preset", "a recipe", f"{where} (its base is itself)"))
    try:
        text = path.read_text("utf-8") if is_file else package.joinpath(where).read_text("utf-8")
        content = parse_yaml(text)
        if not isinstance(content, dict):
            raise ValueError("it holds no keys")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(message("load_recipe", "preset", "a readable recipe", f"{where} ({reason})")) from error
    base = content.pop("base", None)
    if base is None:
        return content, where
    beside = is_file and Path(str(base)).suffix in SUFFIXES
    below = _read(path.parent / base if beside else str(base), (*seen, same))[0]
    return _over(below, content), where


def _check_keys(section: type, content: Mapping[Any, Any], prefix: str) -> None:
    """Raise unless every key is a field of the dataclass, and its value again keys where that is a dataclass.

    jsonargparse would also take the path of a file for a section, and import what a key `class_path` names.
    """
    fields = typing.get_type_hints(section)
    for key, value in content.items():
        if key not in fields:
            raise ValueError(f"Option {prefix}{key!s} is not accepted")
        if is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key} holds no keys")
            _check_keys(fields[key], value, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif isinstance(value, dict) and (others := [k for k in value if not isinstance(k, str)]):
            raise ValueError(f"Option {prefix}{key}.{others[0]!s} is no name")


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = below.get(key)
        both = isinstance(old, dict) and isinstance(value, dict) and key != "options"
        merged[key] = _over(old, value) if both else value  # type: ignore[arg-type]
    return merged
