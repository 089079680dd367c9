"""Model files: safetensors with the architecture in the header, so that a file loads without further options.

The header entry "atop_fast" is JSON. For a network, it holds kind, name and options and, for a purifier, the transform
under which it was trained; for a defense, it holds these for both networks, and the transform. "metadata" holds the
caller's additions.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ._core.checks import check_choice, check_integer, check_number, message
from ._core.files import below, identify, write_atomic
from .architectures import KINDS, check_class, find_kind, restore, specify
from .classifiers.programs import require_consent
from .defense import Defense
from .transforms import RandomTransform, describe_transform, restore_transform

# Metadata keys that commands read.
CLASSES, SHAPE, NORM, EPS = "classes", "shape", "norm", "eps"


def save_model(
    path: str | Path,
    module: nn.Module,
    kind: str | None = None,
    name: str | None = None,
    *,
    transform: RandomTransform | None = None,
    metadata: Mapping[str, Any] | None = None,
    **options: object,
) -> None:
    """Atomically write the weights and the architecture of a module.

    Args:
        path: file to write.
        module: the module. build_classifier, build_purifier, load_model and load_classifier record its architecture,
            also of a classifier inside Normalized or Resized; nothing else is then needed.
        kind: "classifier", "purifier" or "discriminator"; None finds it by the architecture.
        name: the architecture of a module that was built otherwise, e.g. "sn_patch".
        transform: for a purifier, the transform under which it was trained; by default the one recorded in training.
        metadata: further JSON-ready contents, such as classes=(...), the ordered names of a classifier's classes; see
            save_defense.
        options: the options of the architecture `name`.

    Raises:
        ValueError: the architecture is neither recorded nor given, kind or name are unknown, or `module` is not of the
            architecture's class, so that the file would describe another network. Add a class of your own to the
            registry of its kind, such as purifiers.PURIFIERS.
    """
    header: dict[str, Any]
    if name is None:
        if options:
            raise ValueError(message("save_model", "name", "given with options", f"None with {sorted(options)}"))
        kind = find_kind(module) if kind is None else check_choice("save_model", "kind", kind, list(KINDS))
        header = {"kind": kind, **specify("save_model", "module", module, KINDS[kind])}
    else:
        kind = check_choice("save_model", "kind", kind, list(KINDS))
        factory = KINDS[kind][check_choice("save_model", "name", name, list(KINDS[kind]))]
        check_class("save_model", "module", module, name, factory)
        header = {"kind": kind, "name": name, "options": options}
    trained = getattr(module, "trained_under", None) if transform is None else describe_transform(transform)
    if kind == "purifier" and trained is not None:
        header["transform"] = trained
    if metadata:
        header["metadata"] = _check_metadata("save_model", metadata)
    _write(path, header, module.state_dict())


def load_model(path: str | Path, kind: str | None = None, *, trust: bool = False) -> nn.Module:
    """Build the module in a file of save_model, with its weights, on the CPU and in evaluation mode.

    Args:
        path: file of save_model.
        kind: "classifier", "purifier" or "discriminator", to refuse a file of another kind; None takes any.
        trust: run the program in the file, if it carries one: the source of a classifier's class, or an archive of
            TorchScript or torch.export.

    A purifier remembers the transform under which it was trained: Defense warns about a different one.

    Raises:
        ValueError: the file is missing, is not safetensors, has no architecture, is of another kind, its weights do not
            fit, or it carries a program without `trust`.
    """
    if kind is not None:
        check_choice("load_model", "kind", kind, list(KINDS))
    header = read_header(path)
    found = header.get("kind")
    if found != kind if kind is not None else found not in KINDS:
        expected = f"a {kind or 'model'} written by save_model"
        raise ValueError(message("load_model", "path", expected, f"{path} ({found})"))
    kind = str(found)
    require_consent("load_model", path, header, trust)
    try:
        module = restore(header, KINDS[kind], load_file(str(path)))
        _check_metadata("load_model", header.get("metadata", {}))
        if kind == "purifier" and "transform" in header:
            module.trained_under = _check_description(header["transform"])
    except Exception as error:
        # Invalid options may fail anywhere in an architecture; all failures mean the same to the caller.
        reason = " ".join(str(error).split())
        raise ValueError(
            message("load_model", "path", f"a {kind} with fitting weights", f"{path} ({reason})")
        ) from error
    return module.eval()


def holds(path: str | Path, module: nn.Module) -> bool:
    """Whether a file of save_model has the architecture and the weights of a module; its metadata may be any."""
    try:
        header, state = read_header(path), load_file(str(path))
    except ValueError:
        return False
    kind, own = find_kind(module), module.state_dict()
    expected = {"kind": kind, **specify("save_model", "module", module, KINDS[kind])}
    same = {key: header.get(key) for key in expected} == expected and own.keys() == state.keys()
    return same and all(torch.equal(value.cpu(), state[name]) for name, value in own.items())


def save_defense(
    path: str | Path,
    defense: Defense,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Atomically write a defense to one safetensors file: weights and architecture of both networks, and the transform.

    Args:
        path: file to write.
        defense: a Defense whose networks come from build_classifier, build_purifier, load_model or load_classifier
            (except RobustBench models); the classifier may be inside Normalized or Resized. Any other network needs an
            attribute `architecture` = (name, options).
        dtype: type of the weights in the file; torch.float16 or bfloat16 halves it. load_defense returns float32 with
            the rounded values, so evaluate the loaded defense. Default: the type of the weights.
        metadata: further JSON-ready contents, added to those of `defense.metadata`. Commands read `classes`, the
            ordered names of the classes, `shape`, (C, H, W) of the images, and `norm` and `eps` of the training attack,
            and say so if they attack by another. Add anything that users should know: recipe, commit, data, license.

    Raises:
        TypeError, ValueError: naming the part that load_defense could not restore; or weights too large for `dtype`.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(message("save_defense", "dtype", "a floating-point torch.dtype", repr(dtype)))
    if not isinstance(defense, Defense):
        raise TypeError(message("save_defense", "defense", "a Defense", type(defense).__name__))
    if type(defense) is not Defense:
        given = f"the subclass {type(defense).__name__}, of which load_defense would make a Defense"
        raise TypeError(message("save_defense", "defense", "a Defense", given))
    described = describe_transform(defense.transform)
    try:
        restore_transform(described)
    except ValueError as error:
        expected = "one of transforms.TRANSFORMS, to which a class of your own can be added"
        raise ValueError(message("save_defense", "defense.transform", expected, described.get("shown"))) from error
    if any(True for _ in defense.transform.state_dict()):
        raise ValueError(message("save_defense", "defense.transform", "one without weights", described["name"]))
    header: dict[str, Any] = {"kind": "defense", "transform": described}
    # The transform of the purifier's training, if it was another one.
    trained_under = getattr(defense.purifier, "trained_under", None)
    if trained_under is not None and trained_under != described:
        header["trained_under"] = trained_under
    for kind in ("classifier", "purifier"):
        module: nn.Module | None = getattr(defense, kind)
        header[kind] = None if module is None else specify("save_defense", f"defense.{kind}", module, KINDS[kind])
    further = _check_metadata("save_defense", {} if metadata is None else metadata)
    header["metadata"] = _check_metadata("save_defense", {**defense.metadata, **further})
    state = {name: value for name, value in defense.state_dict().items() if not name.startswith("transform.")}
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = value if dtype is None else value.to(dtype)
            if not state[name].isfinite().all():
                raise ValueError(message("save_defense", "defense", "of finite weights", f"NaN or infinity in {name}"))
    _write(path, header, state)


def load_defense(path_or_name: str | Path, *, trust: bool = False) -> Defense:
    """Load a defense from a file of save_defense, or one that ships with the package; on the CPU, in evaluation mode.

    Args:
        path_or_name: a path that ends in .safetensors, or a name in list_defenses().
        trust: run the program in the file, if it carries one: the source of a classifier's class, or an archive of
            TorchScript or torch.export.

    Returns:
        The Defense, with the file's metadata in its attribute `metadata`.

    Raises:
        ValueError: the file or name does not exist, the file is not safetensors or holds no defense, its weights do not
            fit, or it carries a program without `trust`.
    """
    path = find_defense("load_defense", path_or_name)
    header = read_header(path)
    if header.get("kind") != "defense":
        expected = "a file written by save_defense"
        raise ValueError(message("load_defense", "path_or_name", expected, f"{path} ({header.get('kind')})"))
    if isinstance(header.get("classifier"), dict):
        require_consent("load_defense", path, header["classifier"], trust)
    try:
        state = load_file(str(path))
        if other := [name for name in state if not name.startswith(("classifier.", "purifier."))]:
            raise ValueError(f"{other[0]} is of neither network")
        networks: dict[str, Any] = {}
        for kind in ("classifier", "purifier"):
            own, spec = below(kind, state), header[kind]
            networks[kind] = None if spec is None and not own else restore(spec, KINDS[kind], own)
        if networks["classifier"] is None:
            raise ValueError("it has no classifier")
        transform = restore_transform(header["transform"])
        if networks["purifier"] is not None:
            networks["purifier"].trained_under = _check_description(header.get("trained_under", header["transform"]))
        defense = Defense(transform, networks["purifier"], networks["classifier"])
        defense.metadata = _check_metadata("load_defense", header["metadata"])
    except Exception as error:
        # As in load_model.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            message("load_defense", "path_or_name", "a whole defense of save_defense", f"{path} ({reason})")
        ) from error
    return defense.eval()


def list_defenses() -> list[str]:
    """Names of the defenses that ship with the package, for load_defense."""
    return sorted(_shipped())


def find_defense(function: str, path_or_name: str | Path) -> Path:
    """The file of a defense; for an unknown name, a ValueError lists the known ones."""
    path = Path(path_or_name)
    if path.suffix or path.exists():
        return path
    shipped = _shipped()
    if str(path_or_name) not in shipped:
        names = f"one of {', '.join(map(repr, sorted(shipped)))}" if shipped else "the package carries none"
        expected = f"a file of save_defense, or the name of a defense in the package ({names})"
        raise ValueError(message(function, "path_or_name", expected, repr(str(path_or_name))))
    return shipped[str(path_or_name)]


def read_header(path: str | Path) -> dict[str, Any]:
    """The header described at the top of this module; ValueError if there is none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("atop_fast", "null"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = identify(Path(path)) or error
        raise ValueError(message("load_model", "path", "a readable safetensors file", f"{path} ({reason})")) from error
    if not isinstance(header, dict):
        raise ValueError(message("load_model", "path", "a file written by save_model", f"{path} (no architecture)"))
    return header


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata in a file of save_model or save_defense; empty for any other file."""
    try:
        return _check_metadata("load_model", read_header(path).get("metadata", {}))
    except ValueError:
        return {}


def _write(path: str | Path, header: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    tensors: dict[str, Tensor] = {}
    memories: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, such as tied weights; the module that loads them ties them.
        shared = tensor.untyped_storage().data_ptr() in memories
        tensors[key] = tensor.clone() if shared else tensor
        memories.add(tensor.untyped_storage().data_ptr())
    text = json.dumps(header)
    write_atomic(Path(path), lambda p: save_file(tensors, str(p), {"atop_fast": text}))


def _shipped() -> dict[str, Path]:
    folder = Path(str(importlib.resources.files("atop_fast"))) / "weights"
    return {file.stem: file for file in folder.glob("*.safetensors")} if folder.is_dir() else {}


def _check_metadata(function: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata after a round trip through JSON; raises if it is not JSON-ready, or if commands could not use it."""
    if not isinstance(metadata, Mapping):
        raise TypeError(message(function, "metadata", "names and values", type(metadata).__name__))
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise TypeError(message(function, "metadata", "JSON-ready", error)) from error
    classes, shape = found.get(CLASSES, []), found.get(SHAPE, [1, 1, 1])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(message(function, CLASSES, "names", classes))
    if not isinstance(shape, list) or len(shape) != 3:
        raise ValueError(message(function, SHAPE, "(C, H, W)", shape))
    for size in shape:
        check_integer(function, SHAPE, size, low=1)
    if found.get(EPS) is not None:
        check_number(function, EPS, found[EPS], low=0)
    if not isinstance(found.get(NORM, ""), str):
        raise ValueError(message(function, NORM, "the name of a norm", found[NORM]))
    return found


def _check_description(description: Any) -> dict[str, Any]:
    """Validate the description of a transform in a file; its class may be unknown here."""
    if not isinstance(description, dict) or not isinstance(description.get("name"), str):
        raise ValueError(f"{description!r} describes no transform")
    if "shown" not in description:
        restore_transform(description)
    return description
