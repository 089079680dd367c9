"""Classifiers from files and by name: files of save_model, RobustBench's checkpoints, and its model zoo."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from ._checks import check_choice, message
from ._files import read_state
from .checkpoints import load_model
from .classifiers import CLASSIFIERS, WideResNet, build_classifier

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
# Wrappers whose names stand before those of the network: DataParallel, and RobustBench's normalising modules.
PREFIXES = ("module.", "model.")


def load_classifier(
    name_or_path: str | Path,
    architecture: str | None = None,
    *,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    folder: str | Path = "models",
    download: bool = False,
    **options: object,
) -> nn.Module:
    """A trained classifier, on the CPU and in evaluation mode, from images in [0, 1] to logits.

    - A path that ends in .safetensors: a file of save_model.
    - With `architecture`: the path of a checkpoint of torch.save, such as RobustBench's: a state dict, alone or as
      {"state_dict": ...}, its names with or without "module." and "model." before them. Every parameter must fit. Only
      tensors are read; a file that holds other objects is refused, and no code in it runs.
    - Otherwise: the name of a model of RobustBench's zoo (Croce et al., NeurIPS 2021), such as "Standard" or
      "Wang2023Better_WRN-28-10"; the package robustbench builds it, and its file is read from
      <folder>/<dataset>/<threat_model>/<name>.pt, where that package keeps it.

    Args:
        name_or_path: see above.
        architecture: of the checkpoint, a name of build_classifier, e.g. "wrn_28_10" or "resnet18".
        dataset, threat_model: of a named model: "cifar10" or "cifar100"; "Linf", "L2" or "corruptions".
        folder: of the files of named models.
        download: let robustbench fetch a named model that is not in `folder`; nothing is fetched otherwise.
        options: of the architecture, e.g. deepmind=True, activation="silu" (see WideResNet).

    Raises:
        ImportError: a name, and robustbench is not installed.
        ValueError: no such file or name, a file with other objects than tensors, or one whose weights do not fit.
    """
    path = Path(name_or_path)
    if architecture is not None:
        check_choice("load_classifier", "architecture", architecture, list(CLASSIFIERS))
        return _with_weights(build_classifier(architecture, **options), path)
    if path.suffix == ".safetensors":
        return load_model(path, "classifier")
    if path.suffix or path.exists():
        expected = f"the architecture of {path}: one of {', '.join(map(repr, CLASSIFIERS))}"
        raise ValueError(message("load_classifier", "architecture", expected, None))
    return _from_robustbench(str(name_or_path), dataset, threat_model, Path(folder), download)


def _from_robustbench(name: str, dataset: str, threat_model: str, folder: Path, download: bool) -> nn.Module:
    # ImageNet is left out: the zoo's constructors for it fetch weights, asked or not.
    check_choice("load_classifier", "dataset", dataset, ["cifar10", "cifar100"])
    check_choice("load_classifier", "threat_model", threat_model, ["Linf", "L2", "corruptions"])
    try:
        with _autoattack_is_pyautoattack():
            from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
            from robustbench.model_zoo.models import model_dicts
            from robustbench.utils import load_model as fetch_model
    except ImportError as error:
        expected = f"pip install 'atop-fast[zoo]' ({error})"
        raise ImportError(f"load_classifier: {name!r} needs the package robustbench: {expected}") from error
    models = model_dicts[BenchmarkDataset(dataset)][ThreatModel(threat_model)]
    check_choice("load_classifier", "name_or_path", name, list(models))
    path = folder / dataset / threat_model / f"{name}.pt"
    if download and not path.is_file():
        fetched: nn.Module = fetch_model(
            model_name=name, model_dir=str(folder), dataset=dataset, threat_model=threat_model
        )
        return fetched.eval()
    # A model in several files, or one of timm, has no single file, and building it may fetch weights.
    if not path.is_file() or not isinstance(models[name]["gdrive_id"], str):
        expected = f"a model whose file is at {path}, or download=True"
        raise ValueError(message("load_classifier", "name_or_path", expected, repr(name)))
    return _with_weights(models[name]["model"](), path)


def _with_weights(model: nn.Module, path: Path) -> nn.Module:
    state = read_state("load_classifier", "name_or_path", path, "state_dict")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if isinstance(model, WideResNet):
        # Weights of a stage that TRADES' networks create and never run.
        state = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}
        if model.deepmind:
            state = {_rename(key): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        expected = f"a checkpoint whose weights fit {type(model).__name__}"
        raise ValueError(message("load_classifier", "name_or_path", expected, f"{path} ({reason})")) from error
    return model.eval()


def _rename(key: str) -> str:
    for pattern, replacement in DEEPMIND_NAMES:
        key = re.sub(pattern, replacement, key)
    return key


@contextlib.contextmanager
def _autoattack_is_pyautoattack() -> Iterator[None]:
    """Inside, `import autoattack` finds pyautoattack where there is no autoattack.

    robustbench 1.1.1 on PyPI depends on pyautoattack, but imports it by the name that it has on GitHub, and so cannot
    be imported as it installs.
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
