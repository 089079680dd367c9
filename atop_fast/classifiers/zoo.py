"""Classifiers from files and by name: files of save_model, and models of RobustBench, torchvision and timm."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .._core.checks import check_choice, message
from .._core.files import load_weights, read_state, unwrapped
from ..checkpoints import CLASSES, find_defense, load_defense, load_model, read_header, read_metadata
from ..data import Dataset, Files
from ..defense import Defense
from ..recipes.options import GivenTransform
from ..transforms import RandomTransform, describe_transform
from . import CLASSIFIERS, Normalized, WideResNet, build_classifier

# A network, and the mean and standard deviation by which its input is normalized.
Model = tuple[nn.Module, Sequence[float], Sequence[float]]

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
# Models ported from elsewhere that convert torchvision's normalization to their own; published files require this.
PORTED = ("googlenet", "inception_v3")
# Keys of the network's state dict in common checkpoints.
STATE_DICTS = ("state_dict", "model_state_dict", "model", "net")


def load_classifier(
    name_or_path: str | Path,
    architecture: str | None = None,
    *,
    weights: str | Path | None = None,
    key: str | None = None,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    folder: str | Path = "models",
    download: bool = False,
    **options: object,
) -> nn.Module:
    """Load a trained classifier from images in [0, 1] to logits, on the CPU and in evaluation mode.

    - A path that ends in .safetensors: a file of save_model.
    - With `architecture`: the path of a checkpoint of torch.save, such as RobustBench's: a state dict, alone or as
      {"state_dict": ...} or "model", "net", "model_state_dict". Prefixes that torch.compile, DataParallel,
      AveragedModel and Lightning add to the names are removed. Every parameter must fit. Only tensors are
      read; a file that holds other objects is refused, and no code in it runs.
    - "torchvision:<name>" or "timm:<name>", such as "torchvision:resnet50" or "timm:vit_tiny_patch16_224": the package
      builds the network, and its weights are read from the file `weights`, as with `architecture` or as .safetensors,
      or downloaded. The result is a Normalized with the mean and standard deviation that the package specifies.
    - Otherwise: the name of a model in RobustBench's zoo (Croce et al., NeurIPS 2021), such as "Standard" or
      "Wang2023Better_WRN-28-10"; the package robustbench builds it, and its weights are read from
      <folder>/<dataset>/<threat_model>/<name>.pt, the location that robustbench uses.

    Args:
        name_or_path: see above.
        architecture: architecture of the checkpoint, a name of build_classifier, e.g. "wrn_28_10" or "resnet18".
        weights: weights file of a torchvision or timm model.
        key: selects one of several networks in a checkpoint: a dictionary or a prefix of the names, such as "ema".
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
    package, _, name = str(name_or_path).partition(":")
    if package in PACKAGES:
        return _from_package(package, name, weights, download, options, key)
    if weights is not None:
        expected = f"None, except for names that begin with {' or '.join(f'{key}:' for key in PACKAGES)}"
        raise ValueError(message("load_classifier", "weights", expected, weights))
    file = Path(name_or_path)
    if architecture is not None:
        check_choice("load_classifier", "architecture", architecture, list(CLASSIFIERS))
        return _with_weights(build_classifier(architecture, **options), file, key=key)
    if key is not None:
        expected = "None, except for a checkpoint with `architecture` or `weights`"
        raise ValueError(message("load_classifier", "key", expected, repr(key)))
    if file.suffix == ".safetensors":
        return load_model(file, "classifier")
    if file.suffix or file.exists():
        expected = f"the architecture of {file}: one of {', '.join(map(repr, CLASSIFIERS))}"
        raise ValueError(message("load_classifier", "architecture", expected, None))
    return _from_robustbench(str(name_or_path), dataset, threat_model, Path(folder), download)


@dataclass(frozen=True)
class System:
    """The system that a command evaluates or trains, as specified by its options.

    Attributes:
        classifier, architecture, weights, key: `name_or_path`, `architecture`, `weights` and `key` of load_classifier.
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

    def load(self, function: str, data: Dataset | Files) -> tuple[nn.Module, Dataset | Files]:
        """Load the Defense or the bare classifier; also returns the data, with labels in the classifier's class order.

        Args:
            function: name for error messages.
            data: determines the channels and classes of a checkpoint with `architecture`, and the classes of a model
                with `weights`.

        Raises:
            ValueError: the options contradict each other, a file or the data; or a file cannot be read.
        """
        if (self.classifier is None) is (self.defense is None):
            expected = "given, or a defense, and not both"
            raise ValueError(message(function, "classifier", expected, f"{self.classifier} and {self.defense}"))
        if self.defense is not None:
            return self._defense(function, self.defense, data)
        assert self.classifier is not None
        data = match_classes(function, self.classifier, data)
        transform = self._transform(function)
        shape: dict[str, Any] = {} if self.weights is None else {"num_classes": len(data.classes)}
        if self.architecture is not None:
            shape = {"channels": data.shape[0], "classes": len(data.classes)}
        model = load_classifier(self.classifier, self.architecture, weights=self.weights, key=self.key, **shape)
        if transform is None:
            return model, data
        return Defense(transform, load_model(self.purifier, "purifier") if self.purifier else None, model), data

    def _transform(self, function: str) -> RandomTransform | None:
        stored = read_header(self.purifier).get("transform") if self.purifier else None
        transform = self.transform.resolve(function, stored, self.purifier)
        if self.purifier and transform is None:
            expected = f"given (name and options), as {self.purifier} does not say under which it was trained"
            raise ValueError(message(function, "transform", expected, None))
        return transform

    def _defense(self, function: str, name: str, data: Dataset | Files) -> tuple[nn.Module, Dataset | Files]:
        for option in ("purifier", "architecture", "weights", "key"):
            if value := getattr(self, option):
                raise ValueError(message(function, option, "left out for a defense, which has all of it", value))
        defense = load_defense(name)
        self.transform.resolve(function, describe_transform(defense.transform), name)
        return defense, match_classes(function, find_defense(function, name), data)


def match_classes(function: str, path: str | Path, data: Dataset | Files) -> Dataset | Files:
    """Reorder the data's labels to match the class names in the classifier's file, if it has any.

    Raises:
        ValueError: the classifier's file knows some of the data's class names, but not all.
    """
    classes = read_metadata(path).get(CLASSES) if Path(path).suffix == ".safetensors" else None
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
    package: str, name: str, weights: str | Path | None, download: bool, options: dict[str, object], key: str | None
) -> nn.Module:
    if (weights is None) is not download:
        expected = "a file of weights, or None with download=True, which fetches the package's own"
        raise ValueError(message("load_classifier", "weights", expected, f"{weights} with download={download}"))
    try:
        model, mean, std = PACKAGES[package](name, download, options)
    except ImportError as error:
        extra = {"torchvision": "vision", "timm": "zoo"}[package]
        raise _not_installed(f"{package}:{name}", package, extra, error) from error
    # For save_defense.
    model.architecture = (f"{package}:{name}", options)
    return Normalized(
        model if weights is None else _with_weights(model, Path(weights), "weights", key), mean, std
    ).eval()


def package_factory(name: str) -> Callable[..., nn.Module]:
    """The constructor of "torchvision:<name>" or "timm:<name>" without weights, which a file provides."""
    package, _, model = name.partition(":")

    def build(**options: Any) -> nn.Module:
        if unknown := options.keys() - {"num_classes"}:
            raise ValueError(f"{package}:{model} from a file takes no {sorted(unknown)[0]!r}")
        return PACKAGES[package](model, False, options)[0]

    return build


def _torchvision(name: str, download: bool, options: dict[str, Any]) -> Model:
    """torchvision's classifier `name`."""
    from torchvision import models

    if name not in models.list_models(module=models):
        expected = "'torchvision:' and one of torchvision.models.list_models(module=torchvision.models)"
        raise ValueError(message("load_classifier", "name_or_path", expected, repr(f"torchvision:{name}")))
    if name in PORTED and not download:
        options = {"transform_input": True, "init_weights": False, **options}
    statistics = models.get_model_weights(name).DEFAULT.transforms()
    model = models.get_model(name, weights="DEFAULT" if download else None, **options)
    return model, statistics.mean, statistics.std


def _timm(name: str, download: bool, options: dict[str, Any]) -> Model:
    """timm's classifier `name`."""
    import timm

    expected = "'timm:' and one of timm.list_models()"
    # Other names, such as hf-hub:user/model, would download a configuration.
    if not timm.is_model(name):
        raise ValueError(message("load_classifier", "name_or_path", expected, repr(f"timm:{name}")))
    try:
        model = timm.create_model(name, pretrained=download, **options)
    except RuntimeError as error:  # unknown weights, the part of the name after the dot
        raise ValueError(message("load_classifier", "name_or_path", expected, f"'timm:{name}' ({error})")) from error
    statistics = timm.data.resolve_model_data_config(model)
    return model, statistics["mean"], statistics["std"]


PACKAGES = {"torchvision": _torchvision, "timm": _timm}


def _from_robustbench(name: str, dataset: str, threat_model: str, folder: Path, download: bool) -> nn.Module:
    # ImageNet is not supported, because the zoo's constructors for it always download weights.
    check_choice("load_classifier", "dataset", dataset, ["cifar10", "cifar100"])
    check_choice("load_classifier", "threat_model", threat_model, ["Linf", "L2", "corruptions"])
    try:
        with _autoattack_is_pyautoattack():
            from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
            from robustbench.model_zoo.models import model_dicts
            from robustbench.utils import load_model as fetch_model
    except ImportError as error:
        raise _not_installed(name, "robustbench", "zoo", error) from error
    models = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat_model)]
    check_choice("load_classifier", "name_or_path", name, list(models))
    path = folder / dataset / threat_model / f"{name}.pt"
    if download and not path.is_file():
        fetched: nn.Module = fetch_model(
            model_name=name, model_dir=str(folder), dataset=dataset, threat_model=threat_model
        )
        return fetched.eval()
    # An ensemble or a timm model has no single file, and building it may download weights.
    if not path.is_file() or not isinstance(models[name]["gdrive_id"], str):
        expected = f"a model whose file is at {path}, or download=True"
        raise ValueError(message("load_classifier", "name_or_path", expected, repr(name)))
    return _with_weights(models[name]["model"](), path)


def _not_installed(name: str, package: str, extra: str, error: ImportError) -> ImportError:
    expected = f"pip install 'atop-fast[{extra}]' ({error})"
    return ImportError(f"load_classifier: {name!r} needs the package {package}: {expected}")


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


@contextlib.contextmanager
def _autoattack_is_pyautoattack() -> Iterator[None]:
    """Alias `autoattack` to pyautoattack in the block if autoattack is not installed.

    robustbench 1.1.1 on PyPI depends on pyautoattack but imports it under its GitHub name, so that a plain installation
    cannot be imported.
    """
    if importlib.util.find_spec("autoattack") or not importlib.util.find_spec("pyautoattack"):
        yield
        return
    sys.modules["autoattack"] = importlib.import_module("pyautoattack")
    try:
        yield
    finally:
        for module in [name for name in sys.modules if name.partition(".")[0] == "autoattack"]:
            del sys.modules[module]
