"""Networks by name of the packages torchvision, timm and robustbench, which are imported when a name asks for them."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from .._core.checks import check_choice, message

# A network, and the mean and standard deviation by which its input is normalized.
Loaded = tuple[nn.Module, Sequence[float], Sequence[float]]

# Models ported from elsewhere that convert torchvision's normalization to their own; published files require this.
PORTED = ("googlenet", "inception_v3")
ROBUSTBENCH = "robustbench"


def package_factory(name: str) -> Callable[..., nn.Module]:
    """The constructor of "torchvision:<name>" or another package's model without weights, which a file provides."""
    package, _, model = name.partition(":")
    if package == ROBUSTBENCH:
        dataset, threat_model, model = model.split("/")
        constructor = robustbench_model(model, dataset, threat_model)[0]
        if constructor is None:
            raise ValueError(f"{name} has no single file of weights")
        return constructor

    def build(**options: Any) -> nn.Module:
        if unknown := options.keys() - {"num_classes"}:
            raise ValueError(f"{package}:{model} from a file takes no {sorted(unknown)[0]!r}")
        return PACKAGES[package](model, False, options)[0]

    return build


def _torchvision(name: str, download: bool, options: dict[str, Any]) -> Loaded:
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


def _timm(name: str, download: bool, options: dict[str, Any]) -> Loaded:
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


def robustbench_model(
    name: str, dataset: str, threat_model: str
) -> tuple[Callable[[], nn.Module] | None, Callable[..., nn.Module]]:
    """The constructor of a model, None if it might download weights; and robustbench's function that does."""
    # ImageNet is not supported, because the zoo's constructors for it always download weights.
    check_choice("load_classifier", "dataset", dataset, ["cifar10", "cifar100"])
    check_choice("load_classifier", "threat_model", threat_model, ["Linf", "L2", "corruptions"])
    try:
        with autoattack_is_pyautoattack():
            from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
            from robustbench.model_zoo.models import model_dicts
            from robustbench.utils import load_model as fetch_model
    except ImportError as error:
        raise not_installed(name, "robustbench", "zoo", error) from error
    models = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat_model)]
    if name not in models:
        close = difflib.get_close_matches(name, models, n=3, cutoff=0.4) or list(models)[:3]
        expected = f"an existing file, or one of the {len(models)} models of RobustBench for {dataset} and "
        expected += f"{threat_model}, such as {', '.join(close)}"
        raise ValueError(message("load_classifier", "name_or_path", expected, repr(name)))
    entry = models[name]
    # An ensemble or a timm model has no single file.
    return entry["model"] if isinstance(entry["gdrive_id"], str) else None, fetch_model


def not_installed(name: str, package: str, extra: str, error: ImportError) -> ImportError:
    expected = f"pip install 'atop-fast[{extra}]' ({error})"
    return ImportError(f"load_classifier: {name!r} needs the package {package}: {expected}")


@contextlib.contextmanager
def autoattack_is_pyautoattack() -> Iterator[None]:
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
