"""Model files: safetensors with the architecture in the header, so that a file loads without further options.

The header entry "atop_fast" is JSON. For a network, it holds kind, name and options and, for a purifier, the transform
under which it was trained; for a defense, it holds these for both networks, and the transform. "metadata" holds the
caller's additions.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ._core.checks import check_choice, check_integer, check_number, message
from ._core.files import identify, load_weights, write_atomic
from .classifiers import CLASSIFIERS, Normalized, Resized
from .classifiers.programs import ARCHIVES, PYTHON, Archive, build_program, require_consent, restore_archive
from .defense import Defense
from .defenses import ActivationPruning, SelfEnsemble, WinnersTakeAll
from .purifiers import DISCRIMINATORS, PURIFIERS
from .randomness import seeded
from .transforms import RandomTransform, describe_transform, restore_transform

KINDS: dict[str, Mapping[str, Callable[..., nn.Module]]] = {
    "classifier": CLASSIFIERS,
    "purifier": PURIFIERS,
    "discriminator": DISCRIMINATORS,
}
# Classifier wrappers: the class, the attribute that holds the classifier, and a function that returns the options.
WRAPPERS: dict[str, tuple[type[nn.Module], str, Callable[[Any], dict[str, Any]]]] = {
    "normalized": (Normalized, "model", lambda m: {"mean": m.mean.flatten().tolist(), "std": m.std.flatten().tolist()}),
    "resized": (Resized, "classifier", lambda m: {"size": m.size[0]}),
    "self_ensemble": (SelfEnsemble, "model", lambda m: {"sigma_first": m.sigma_first, "sigma": m.sigma}),
    "activation_pruning": (ActivationPruning, "model", lambda m: {"ratio": m.ratio}),
    "winners_take_all": (WinnersTakeAll, "model", lambda m: {"ratio": m.ratio}),
}
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
        kind = _find_kind(module) if kind is None else check_choice("save_model", "kind", kind, list(KINDS))
        header = {"kind": kind, **_specify("save_model", "module", module, KINDS[kind])}
    else:
        kind = check_choice("save_model", "kind", kind, list(KINDS))
        factory = KINDS[kind][check_choice("save_model", "name", name, list(KINDS[kind]))]
        _check_class("save_model", "module", module, name, factory)
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
        module = _restore(header, KINDS[kind], load_file(str(path)))
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
    kind, own = _find_kind(module), module.state_dict()
    expected = {"kind": kind, **_specify("save_model", "module", module, KINDS[kind])}
    same = {key: header.get(key) for key in expected} == expected and own.keys() == state.keys()
    return same and all(torch.equal(value.cpu(), state[name]) for name, value in own.items())


def save_defense(path: str | Path, defense: Defense, *, dtype: torch.dtype | None = None, **metadata: object) -> None:
    """Atomically write a defense to one safetensors file: weights and architecture of both networks, and the transform.

    Args:
        path: file to write.
        defense: a Defense whose networks come from build_classifier, build_purifier, load_model or load_classifier
            (except RobustBench models); the classifier may be inside Normalized or Resized. Any other network needs an
            attribute `architecture` = (name, options).
        dtype: type of the weights in the file; torch.float16 or bfloat16 halves it. load_defense returns float32 with
            the rounded values, so evaluate the loaded defense. Default: the type of the weights.
        metadata: further JSON-ready contents. Commands read `classes`, the ordered names of the classes, `shape`,
            (C, H, W) of the images, and `norm` and `eps` of the training attack. Add anything that users should know:
            recipe, commit, data, license.

    Raises:
        TypeError, ValueError: naming the part that load_defense could not restore; or weights too large for `dtype`.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(message("save_defense", "dtype", "a floating-point torch.dtype", repr(dtype)))
    if not isinstance(defense, Defense):
        raise TypeError(message("save_defense", "defense", "a Defense", type(defense).__name__))
    described = describe_transform(defense.transform)
    try:
        restore_transform(described)
    except ValueError as error:
        expected = "one of transforms.TRANSFORMS, to which a class of your own can be added"
        raise ValueError(message("save_defense", "defense.transform", expected, described.get("shown"))) from error
    if any(True for _ in defense.transform.state_dict()):
        raise ValueError(message("save_defense", "defense.transform", "one without weights", described["name"]))
    header: dict[str, Any] = {"kind": "defense", "transform": described}
    for kind in ("classifier", "purifier"):
        module: nn.Module | None = getattr(defense, kind)
        header[kind] = None if module is None else _specify("save_defense", f"defense.{kind}", module, KINDS[kind])
    header["metadata"] = _check_metadata("save_defense", {**defense.metadata, **metadata})
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
        trust: see load_model.

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
            own, spec = _below(kind, state), header[kind]
            networks[kind] = None if spec is None and not own else _restore(spec, KINDS[kind], own)
        if networks["classifier"] is None:
            raise ValueError("it has no classifier")
        transform = restore_transform(header["transform"])
        if networks["purifier"] is not None:
            networks["purifier"].trained_under = header["transform"]
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
    tensors, text = {key: value.detach().cpu().contiguous() for key, value in state.items()}, json.dumps(header)
    write_atomic(Path(path), lambda p: save_file(tensors, str(p), {"atop_fast": text}))


def _shipped() -> dict[str, Path]:
    folder = Path(str(importlib.resources.files("atop_fast"))) / "weights"
    return {file.stem: file for file in folder.glob("*.safetensors")} if folder.is_dir() else {}


def _check_class(function: str, argument: str, module: nn.Module, name: str, factory: Callable[..., nn.Module]) -> None:
    """Raise unless the module is of the class that the architecture builds."""
    built = factory.func if isinstance(factory, functools.partial) else factory
    # For a function, the class of the result is unknown before the call.
    if isinstance(built, type) and type(module) is not built:
        raise ValueError(message(function, argument, f"a {built.__name__}, which {name!r} is", type(module).__name__))


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


def _find_kind(module: nn.Module) -> str:
    """The kind whose registry has the architecture of a module, or of the classifier inside a wrapper."""
    for wrapper, inside, _ in WRAPPERS.values():
        if type(module) is wrapper:
            return _find_kind(getattr(module, inside))
    name = (getattr(module, "architecture", None) or ("", {}))[0]
    further = ":" in name or name in (PYTHON, *ARCHIVES)
    kinds = [kind for kind, registry in KINDS.items() if name in registry or (kind == "classifier" and further)]
    if len(kinds) != 1:
        expected = "of build_classifier, build_purifier or load_model, or given with kind, name and options"
        raise ValueError(message("save_model", "module", expected, type(module).__name__))
    return kinds[0]


def _specify(
    function: str, argument: str, module: nn.Module, registry: Mapping[str, Callable[..., nn.Module]]
) -> dict[str, Any]:
    """The JSON-ready architecture of a module; ValueError unless its weights fit the module that this builds."""
    # Modules that torch builds for a loaded archive have a forward of their own.
    archived = {m for part in module.modules() if isinstance(part, Archive) for m in part.network.modules()}
    modules = ((name, m) for name, m in module.named_modules() if m not in archived)
    if replaced := [name for name, m in modules if {"forward", "__call__"} & vars(m).keys()]:
        given = f"{type(module).__name__} in which that of {replaced[0] or 'itself'} was replaced"
        raise ValueError(message(function, argument, "a module with its class's forward", given))
    for name, (kind, inside, options) in WRAPPERS.items():
        if type(module) is kind:
            below = _specify(function, f"{argument}.{inside}", getattr(module, inside), registry)
            return {"name": name, "options": options(module), "inside": below}
    architecture = getattr(module, "architecture", None)
    if architecture is None:
        expected = "of build_classifier, build_purifier or load_model, or with architecture=(name, options)"
        raise ValueError(message(function, argument, expected, type(module).__name__))
    name, options = architecture
    if isinstance(module, Archive):
        return {"name": name, "options": options}
    try:
        spec: dict[str, Any] = json.loads(json.dumps({"name": name, "options": dict(options)}))
        factory = _factory(name, registry)
        _check_class(function, argument, module, name, factory)
        _check_fits(functools.partial(factory, **spec["options"]), spec["options"], module.state_dict())
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        given = f"{type(module).__name__} ({' '.join(str(error).split())})"
        raise ValueError(message(function, argument, f"what {name!r} with {options} builds", given)) from error
    return spec


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the submodule `prefix`."""
    return {name.removeprefix(f"{prefix}."): t for name, t in state.items() if name.startswith(f"{prefix}.")}


def _restore(
    spec: Mapping[str, Any], registry: Mapping[str, Callable[..., nn.Module]], state: Mapping[str, Tensor]
) -> nn.Module:
    """Build the module that a header specifies, with the weights in `state`."""
    name, options = spec["name"], spec["options"]
    if "inside" in spec:
        kind, inside, _ = WRAPPERS[name]
        if any(not key.startswith(f"{inside}.") for key in state):
            raise ValueError(f"weights that {name!r} does not have")
        if options.get("size", 1) > 2**14:
            raise ValueError(f"size={options['size']}")
        return kind(_restore(spec["inside"], registry, _below(inside, state)), **options)
    if registry is CLASSIFIERS and name in ARCHIVES:
        return restore_archive(name, state)
    factory = _factory(name, registry)
    build = functools.partial(factory, **options)
    _check_fits(build, options, state)
    # The initial weights are about to be replaced, and must not consume numbers of the global generator.
    with seeded(0):
        module = build()
    load_weights(module, state)
    module.architecture = (name, options)
    return module


def _factory(name: str, registry: Mapping[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    """The constructor of architecture `name`: of the registry or, for classifiers, of a package or of source."""
    if registry is CLASSIFIERS and name == PYTHON:
        return build_program
    if registry is CLASSIFIERS and ":" in name:
        from .classifiers.packages import package_factory

        return package_factory(name)
    return registry[name]


def _check_fits(build: Callable[[], nn.Module], options: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raise unless the weights fit the module that the options build, without allocating it: it might be huge."""
    most = max([len(state), *(8 * size for tensor in state.values() for size in tensor.shape)])
    if large := [name for name, value in options.items() if _largest(value) > most]:
        raise ValueError(f"{large[0]}={options[large[0]]!r} is no option of so few weights")
    try:
        with torch.device("meta"):
            module = build()
    except Exception:
        # Some modules cannot be built on the meta device; if the options are wrong, the real construction will fail.
        return
    module.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, assign=True)
    if sum(t.numel() for t in module.buffers()) > 2**20 + 16 * sum(t.numel() for t in state.values()):
        raise ValueError("its options make more constants than it has weights")


def _largest(value: object) -> float:
    """The largest number in an option."""
    if isinstance(value, (list, dict)):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if isinstance(value, (int, float)) else 0
