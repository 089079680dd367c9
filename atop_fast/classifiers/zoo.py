"""Classifiers from files and by name: files of save_model, users' classes and archives, and models of packages."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from .._core.checks import check_choice, message
from .._core.files import identify, load_weights, read_state, unwrapped
from ..checkpoints import CLASSES, EPS, NORM, SHAPE, find_defense, load_defense, load_model, read_header, read_metadata
from ..data import Dataset, Files
from ..defense import Defense
from ..randomness import seeded
from ..recipes.options import DataConfig, GivenTransform
from ..transforms import RandomTransform, describe_transform
from . import CLASSIFIERS, Normalized, WideResNet, build_classifier
from .kinds import ARCHIVE, CHECKPOINT, MODEL_FILE, PACKAGE, PROGRAM, SHIPPED, kind_of
from .normalized import parse_normalization
from .packages import PACKAGES, ROBUSTBENCH, not_installed, robustbench_model
from .programs import load_archive, load_program

# DeepMind's parameter names and those of WideResNet.
DEEPMIND_NAMES = (
    (r"^init_conv\.", "conv1."),
    (r"^layer\.(\d)\.block\.", lambda match: f"block{int(match[1]) + 1}.layer."),
    (r"\.batchnorm_0\.", ".bn1."),
    (r"\.batchnorm_1\.", ".bn2."),
    (r"\.conv_0\.", ".conv1."),
    (r"\.conv_1\.", ".conv2."),
    (r"\.shortcut\.", ".convShortcut."),
    (r"^batchnorm\.", "bn1."),
    (r"^logits\.", "fc."),
)
# Parameter names in the published files of torchvision's DenseNets, which come from an older version.
DENSENET_NAMES = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.")
# Keys of the network's state dict in common checkpoints.
STATE_DICTS = ("state_dict", "model_state_dict", "model", "net")


def load_classifier(
    name_or_path: str | Path,
    architecture: str | None = None,
    *,
    weights: str | Path | None = None,
    key: str | None = None,
    normalize: str | None = None,
    trust: bool = False,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    folder: str | Path = "models",
    download: bool = False,
    **options: object,
) -> nn.Module:
    """Load a trained classifier from images in [0, 1] to logits, on the CPU and in evaluation mode.

    - A path that ends in .safetensors: a file of save_model.
    - A name in list_defenses(): the classifier of a defense that ships with the package.
    - "FILE.py:Class": the class, or function, builds the network, and `weights` is the file of its state dict. Naming
      the file runs it.
    - The path of an archive of TorchScript or torch.export, with `trust`: torch's loaders run code from it.
    - With `architecture`: the path of a checkpoint of torch.save, such as RobustBench's: a state dict, alone or as
      {"state_dict": ...} or "model", "net", "model_state_dict". Prefixes that torch.compile, DataParallel,
      AveragedModel and Lightning add to the names are removed. Every parameter must fit. Only tensors are
      read; a file that holds other objects is refused, and no code in it runs.
    - "torchvision:<name>" or "timm:<name>", such as "torchvision:resnet50" or "timm:vit_tiny_patch16_224": the package
      builds the network, and its weights are read from the file `weights`, as with `architecture` or as .safetensors,
      or downloaded. The result is a Normalized with the mean and standard deviation that the package specifies, unless
      `normalize` gives others.
    - Otherwise: the name of a model in RobustBench's zoo (Croce et al., NeurIPS 2021), such as "Standard" or
      "Wang2023Better_WRN-28-10", also as "robustbench:<name>" or "robustbench:<dataset>/<threat_model>/<name>"; the
      package robustbench builds it, and its weights are read from
      <folder>/<dataset>/<threat_model>/<name>.pt, the location that robustbench uses.

    Args:
        name_or_path: see above.
        architecture: architecture of the checkpoint, a name of build_classifier, e.g. "wrn_28_10" or "resnet18".
        weights: weights file of a torchvision or timm model, or of a FILE.py:Class.
        key: selects one of several networks in a checkpoint: a dictionary or a prefix of the names, such as "ema".
        normalize: mean and standard deviation by which the network expects its input to be normalized: "imagenet",
            "cifar10", "cifar100", "mnist", "half", or "MEAN/STD" such as "0.5,0.5,0.5/0.2,0.2,0.2". None means those
            that the package states, and otherwise that the network takes images in [0, 1].
        trust: run the program in a file: an archive, or a model file that carries the source of a class.
        dataset, threat_model: of a RobustBench model: "cifar10" or "cifar100"; "Linf", "L2" or "corruptions".
        folder: folder of RobustBench's files.
        download: allow robustbench to download a model that is not in `folder`, or torchvision or timm to download
            their default weights instead of reading `weights`; otherwise nothing is downloaded.
        options: options of the architecture, e.g. deepmind=True, activation="silu" (see WideResNet), or of the
            package's constructor, e.g. num_classes=10.

    Raises:
        ImportError: the package that a name refers to is not installed.
        ValueError: the file or name does not exist, the file holds objects other than tensors, or its weights do not
            fit; or neither or both of `weights` and `download` are given for a torchvision or timm model.
    """
    kind, file, name = kind_of(name_or_path, architecture), Path(name_or_path), str(name_or_path)
    given = {"architecture": architecture, "weights": weights, "key": key, "normalize": normalize}
    for option, value in {**given, "options": options or None, "download": download or None}.items():
        if value is not None and option not in kind.takes:
            raise ValueError(message("load_classifier", option, f"left out for {name}", repr(value)))
    unknown = kind is CHECKPOINT and architecture is None and not file.exists()
    if unknown or (kind in (CHECKPOINT, ARCHIVE, MODEL_FILE) and file.is_dir()):
        found = f"{name}, which does not exist" if unknown else f"{name} ({identify(file)})"
        raise ValueError(message("load_classifier", "name_or_path", "a file, or the name of a model", found))
    statistics = None if normalize is None else parse_normalization("load_classifier", normalize)
    if kind is PACKAGE:
        return _from_package(name, weights, download, options, key, statistics)
    if kind is PROGRAM:
        return _with_statistics(_from_program(name, weights, options, key), statistics)
    if kind is CHECKPOINT:
        return _with_statistics(_from_checkpoint(file, architecture, options, key), statistics)
    if kind is ARCHIVE:
        return _with_statistics(load_archive("load_classifier", file, trust), statistics)
    if kind is MODEL_FILE:
        return load_model(file, "classifier", trust=trust)
    if kind is SHIPPED:
        return load_defense(name).classifier
    *where, name = name.removeprefix(f"{ROBUSTBENCH}:").split("/")
    if where and len(where) != 2:
        raise ValueError(message("load_classifier", "name_or_path", f"{ROBUSTBENCH}:DATASET/NORM/NAME", name_or_path))
    dataset, threat_model = where or (dataset, threat_model)
    return _from_robustbench(name, dataset, threat_model, Path(folder), download)


def _with_statistics(model: nn.Module, statistics: tuple[Sequence[float], Sequence[float]] | None) -> nn.Module:
    return model if statistics is None else Normalized(model, *statistics).eval()


def _from_checkpoint(file: Path, architecture: str | None, options: Mapping[str, object], key: str | None) -> nn.Module:
    """A checkpoint of torch.save by its architecture."""
    if architecture is None:
        own = "or the classifier FILE.py:Class with this file as `weights`"
        expected = f"the architecture of {file}: one of {', '.join(map(repr, CLASSIFIERS))}; {own}"
        raise ValueError(message("load_classifier", "architecture", expected, None))
    check_choice("load_classifier", "architecture", architecture, list(CLASSIFIERS))
    return _with_weights(build_classifier(architecture, **options), file, key=key)


def _from_program(name: str, weights: str | Path | None, options: Mapping[str, object], key: str | None) -> nn.Module:
    """FILE.py:Class with its weights."""
    with seeded(0):
        model = load_program("load_classifier", name, options)
    if weights is None:
        if model.state_dict():
            expected = f"the file of the state dict of {name}, whose weights would be random"
            raise ValueError(message("load_classifier", "weights", expected, None))
        return model.eval()
    return _with_weights(model, Path(weights), "weights", key)


@dataclass(frozen=True)
class System:
    """The system that a command evaluates or trains, as specified by its options.

    Attributes:
        classifier, architecture, weights, key, normalize, trust: see load_classifier, which calls the first one
            `name_or_path`.
        purifier: a file of save_model; None leaves the classifier alone, or behind the given transform.
        defense: `path_or_name` of load_defense, instead of all of these.
        transform: the command's transform options.
    """

    classifier: str | None
    purifier: str | None
    defense: str | None
    transform: GivenTransform
    architecture: str | None = None
    weights: str | None = None
    key: str | None = None
    normalize: str | None = None
    trust: bool = False

    def sized(self, function: str, data: DataConfig) -> DataConfig:
        """The data's options with the size that the model's file states; see sized.

        Raises:
            ValueError: neither a classifier nor a defense is given, or both are, or the options contradict the file.
        """
        if (self.classifier is None) is (self.defense is None):
            given = "neither" if self.defense is None else "both"
            raise ValueError(message(function, "classifier", "given, or a defense, and not both", given))
        return sized(function, self.classifier if self.defense is None else find_defense(function, self.defense), data)

    def load(self, function: str, data: Dataset | Files) -> tuple[nn.Module, Dataset | Files]:
        """Load the Defense or the bare classifier; also returns the data, with labels in the classifier's class order.

        Args:
            function: name for error messages.
            data: determines the channels and classes of a checkpoint with `architecture`, and the classes of a model
                with `weights`.

        Raises:
            ValueError: the options contradict each other, a file or the data; or a file cannot be read.
        """
        if self.defense is not None:
            return self._defense(function, self.defense, data)
        assert self.classifier is not None
        transform = self._transform(function)
        model = self.alone(data)
        data = match_classes(function, self.classifier, data)
        if transform is None:
            return model, data
        return Defense(transform, load_model(self.purifier, "purifier") if self.purifier else None, model), data

    def alone(self, data: Dataset | Files, **further: object) -> nn.Module:
        """The classifier, with `further` options of its architecture."""
        assert self.classifier is not None
        options: dict[str, Any] = {"weights": self.weights, "key": self.key, "normalize": self.normalize}
        options |= {**kind_of(self.classifier, self.architecture).sizes(data), **further}
        return load_classifier(self.classifier, self.architecture, trust=self.trust, **options)

    def _transform(self, function: str) -> RandomTransform | None:
        stored = read_header(self.purifier).get("transform") if self.purifier else None
        transform = self.transform.resolve(function, stored, self.purifier)
        if self.purifier and transform is None:
            expected = f"given (name and options), as {self.purifier} does not say under which it was trained"
            raise ValueError(message(function, "transform", expected, None))
        return transform

    def _defense(self, function: str, name: str, data: Dataset | Files) -> tuple[nn.Module, Dataset | Files]:
        for option in ("purifier", "architecture", "weights", "key", "normalize"):
            if value := getattr(self, option):
                raise ValueError(message(function, option, "left out for a defense, which has all of it", value))
        defense = load_defense(name, trust=self.trust)
        self.transform.resolve(function, describe_transform(defense.transform), name)
        return defense, match_classes(function, find_defense(function, name), data)


def sized(function: str, path: str | Path | None, data: DataConfig) -> DataConfig:
    """The data's options with the image size and channels that a model's file states.

    Raises:
        ValueError: the options contradict the file.
    """
    shape = None if path is None else _stated(path).get(SHAPE)
    if shape is None or not data.folder:
        return data
    channels, height, width = shape
    side = height if height == width else None
    if data.size not in (None, side) or (data.grayscale and channels != 1):
        expected = f"left out, or as {path} states it: images of {channels}x{height}x{width}"
        raise ValueError(message(function, "data.size", expected, f"{data.size} with grayscale={data.grayscale}"))
    return replace(data, size=side, grayscale=channels == 1)


def _stated(path: str | Path) -> dict[str, Any]:
    """The statements on its data of a model's file, or of the file of a defense in the package."""
    if kind_of(path) is SHIPPED:
        path = find_defense("load_classifier", path)
    return read_metadata(path) if Path(path).suffix == ".safetensors" else {}


def other_threat(model: nn.Module, norm: str, eps: float) -> str:
    """A sentence if a defense's file states another threat model than the one that a command attacks by; or ""."""
    stated = getattr(model, "metadata", {})
    own_norm, own_eps = stated.get(NORM), stated.get(EPS)
    if own_norm is None or own_eps is None or (own_norm == norm and math.isclose(own_eps, eps, rel_tol=1e-3)):
        return ""
    return (
        f"The defense was trained for {own_norm}, eps {own_eps:.4g}, and is attacked in {norm}, eps {eps:.4g}; "
        f"--norm={own_norm} --eps={own_eps:.4g} attacks it as it was trained"
    )


def match_classes(function: str, path: str | Path, data: Dataset | Files) -> Dataset | Files:
    """Reorder the data's labels to match the class names in the classifier's file, if it has any.

    Raises:
        ValueError: the classifier's file knows some of the data's class names, but not all.
    """
    classes = _stated(path).get(CLASSES)
    if classes is None or tuple(classes) == data.classes:
        return data
    unknown = [name for name in data.classes if name not in classes]
    order = f"{' '.join(data.classes)} in the data, {' '.join(classes)} in {path}"
    if not unknown and len(set(classes)) == len(classes):
        warnings.warn(f"{function}: labels are put in the order of the classifier's classes ({order})", stacklevel=3)
        return data.relabeled(tuple(classes))
    if len(unknown) < len(data.classes):
        raise ValueError(message(function, "data", f"images of classes that {path} knows", f"{unknown[0]!r} ({order})"))
    warnings.warn(f"{function}: classes have other names, and are compared by their order ({order})", stacklevel=3)
    return data


def _from_package(
    name: str,
    weights: str | Path | None,
    download: bool,
    options: dict[str, object],
    key: str | None,
    statistics: tuple[Sequence[float], Sequence[float]] | None,
) -> nn.Module:
    if (weights is None) is not download:
        expected = "a file of weights, or None with download=True, which fetches the package's own"
        raise ValueError(message("load_classifier", "weights", expected, f"{weights} with download={download}"))
    package, _, network = name.partition(":")
    try:
        model, mean, std = PACKAGES[package](network, download, options)
    except ImportError as error:
        extra = {"torchvision": "vision", "timm": "zoo"}[package]
        raise not_installed(name, package, extra, error) from error
    # For save_defense.
    model.architecture = (name, options)
    model = model if weights is None else _with_weights(model, Path(weights), "weights", key)
    return Normalized(model, *(statistics or (mean, std))).eval()


def _from_robustbench(name: str, dataset: str, threat_model: str, folder: Path, download: bool) -> nn.Module:
    model, fetch_model = robustbench_model(name, dataset, threat_model)
    path = folder / dataset / threat_model / f"{name}.pt"
    if download and not path.is_file():
        fetched: nn.Module = fetch_model(
            model_name=name, model_dir=str(folder), dataset=dataset, threat_model=threat_model
        )
        return fetched.eval()
    if not path.is_file() or model is None:
        expected = f"a model whose file is at {path}, or download=True"
        raise ValueError(message("load_classifier", "name_or_path", expected, repr(name)))
    network = _with_weights(model(), path)
    # For save_model.
    network.architecture = (f"{ROBUSTBENCH}:{dataset}/{threat_model}/{name}", {})
    return network


def _with_weights(model: nn.Module, path: Path, argument: str = "name_or_path", key: str | None = None) -> nn.Module:
    state = read_state("load_classifier", argument, path, STATE_DICTS, key, offer_key=True)
    try:
        state = unwrapped(state, model.state_dict())
    except ValueError as error:
        raise ValueError(message("load_classifier", "key", f"given for {path}, as {error}", repr(key))) from error
    state = {DENSENET_NAMES.sub(r"\1\2.", key): value for key, value in state.items()}
    if isinstance(model, WideResNet):
        # TRADES' networks create this stage but never run it.
        state = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}
        if model.deepmind:
            state = {_rename(key): value for key, value in state.items()}
    try:
        load_weights(model, state)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        expected = f"a checkpoint whose weights fit {type(model).__name__}"
        raise ValueError(message("load_classifier", argument, expected, f"{path} ({reason})")) from error
    return model.eval()


def _rename(key: str) -> str:
    for pattern, replacement in DEEPMIND_NAMES:
        key = re.sub(pattern, replacement, key)
    return key
