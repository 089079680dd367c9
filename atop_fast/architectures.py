"""Architectures of networks as JSON, as they stand in the headers of model files: found, checked, and built."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._core.checks import message
from ._core.files import below, load_weights
from .classifiers import CLASSIFIERS, Normalized, Resized
from .classifiers.programs import ARCHIVES, PYTHON, Archive, build_program, restore_archive
from .defenses import CARSO, ActivationPruning, SelfEnsemble, WinnersTakeAll
from .purifiers import DISCRIMINATORS, PURIFIERS
from .randomness import seeded

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
    "carso": (CARSO, "model", lambda m: m.options()),
}


def check_class(function: str, argument: str, module: nn.Module, name: str, factory: Callable[..., nn.Module]) -> None:
    """Raise unless the module is of the class that the architecture builds."""
    built = factory.func if isinstance(factory, functools.partial) else factory
    # For a function, the class of the result is unknown before the call.
    if isinstance(built, type) and type(module) is not built:
        raise ValueError(message(function, argument, f"a {built.__name__}, which {name!r} is", type(module).__name__))


def find_kind(module: nn.Module) -> str:
    """The kind whose registry has the architecture of a module, or of the classifier inside a wrapper."""
    for wrapper, inside, _ in WRAPPERS.values():
        if type(module) is wrapper:
            return find_kind(getattr(module, inside))
    name = (getattr(module, "architecture", None) or ("", {}))[0]
    further = ":" in name or name in (PYTHON, *ARCHIVES)
    kinds = [kind for kind, registry in KINDS.items() if name in registry or (kind == "classifier" and further)]
    if len(kinds) != 1:
        expected = "of build_classifier, build_purifier or load_model, or given with kind, name and options"
        raise ValueError(message("save_model", "module", expected, type(module).__name__))
    return kinds[0]


def specify(
    function: str, argument: str, module: nn.Module, registry: Mapping[str, Callable[..., nn.Module]]
) -> dict[str, Any]:
    """The JSON-ready architecture of a module; ValueError unless its weights fit the module that this builds."""
    # Modules that torch builds for a loaded archive have a forward of their own.
    archived = {m for part in module.modules() if isinstance(part, Archive) for m in part.network.modules()}
    modules = ((name, m) for name, m in module.named_modules() if m not in archived)
    if replaced := [name for name, m in modules if {"forward", "__call__"} & vars(m).keys()]:
        given = f"{type(module).__name__} in which that of {replaced[0] or 'itself'} was replaced"
        raise ValueError(message(function, argument, "a module with its class's forward", given))
    if type(module) in (kind for kind, _, _ in WRAPPERS.values()) and _hooks(module):
        raise ValueError(message(function, argument, "a module without hooks", f"{type(module).__name__} with hooks"))
    for name, (kind, inside, options) in WRAPPERS.items():
        if type(module) is kind:
            inner = specify(function, f"{argument}.{inside}", getattr(module, inside), registry)
            return {"name": name, "options": options(module), "inside": inner}
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
        check_class(function, argument, module, name, factory)
        build = functools.partial(factory, **spec["options"])
        built = _check_fits(build, spec["options"], module.state_dict())
        if built is None:
            with seeded(0):
                built = build()
        _check_layers(module, built)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        given = f"{type(module).__name__} ({' '.join(str(error).split())})"
        raise ValueError(message(function, argument, f"what {name!r} with {options} builds", given)) from error
    return spec


def restore(
    spec: Mapping[str, Any], registry: Mapping[str, Callable[..., nn.Module]], state: Mapping[str, Tensor]
) -> nn.Module:
    """Build the module that a header specifies, with the weights in `state`."""
    name, options = spec["name"], spec["options"]
    if "inside" in spec:
        return _wrapped(name, options, spec["inside"], registry, state)
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


def _wrapped(
    name: str,
    options: dict[str, Any],
    spec: Mapping[str, Any],
    registry: Mapping[str, Callable[..., nn.Module]],
    state: Mapping[str, Tensor],
) -> nn.Module:
    """A wrapper around the classifier that `spec` describes, and its own weights, if it has any."""
    kind, inside, _ = WRAPPERS[name]
    own = {key: tensor for key, tensor in state.items() if not key.startswith(f"{inside}.")}
    if own and kind is not CARSO:
        raise ValueError(f"weights that {name!r} does not have")
    if options.get("size", 1) > 2**14:
        raise ValueError(f"size={options['size']}")
    if kind is CARSO:
        # A file names the layers, so that the classifier does not run on images of a size that the file chooses.
        options = {**options, "layers": list(options["layers"])}
        _check_fits(functools.partial(CARSO, nn.Identity(), **options), options, own)
    with seeded(0):
        wrapper = kind(restore(spec, registry, below(inside, state)), **options)
    if isinstance(wrapper, CARSO):
        load_weights(wrapper.purifier, below("purifier", own))
    return wrapper


def _factory(name: str, registry: Mapping[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    """The constructor of architecture `name`: of the registry or, for classifiers, of a package or of source."""
    if registry is CLASSIFIERS and name == PYTHON:
        return build_program
    if registry is CLASSIFIERS and ":" in name:
        from .classifiers.packages import package_factory

        return package_factory(name)
    return registry[name]


def _check_fits(
    build: Callable[[], nn.Module], options: dict[str, Any], state: Mapping[str, Tensor]
) -> nn.Module | None:
    """Raise unless the weights fit the module that the options build, without allocating it: it might be huge.

    Returns:
        The module on the meta device; None if it cannot be built there, and nothing was compared.
    """
    most = max([len(state), *(8 * size for tensor in state.values() for size in tensor.shape)])
    if large := [name for name, value in options.items() if _largest(value) > most]:
        raise ValueError(f"{large[0]}={options[large[0]]!r} is no option of so few weights")
    try:
        with torch.device("meta"):
            module = build()
    except Exception:
        # Some modules cannot be built on the meta device; if the options are wrong, the real construction will fail.
        return None
    module.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, assign=True)
    if sum(t.numel() for t in module.buffers()) > 2**20 + 16 * sum(t.numel() for t in state.values()):
        raise ValueError("its options make more constants than it has weights")
    return module


def _check_layers(module: nn.Module, built: nn.Module) -> None:
    """Raise unless a module has the layers, options and hooks of the one that would be loaded in its place."""
    layers, own = ({name: _layer(m) for name, m in whole.named_modules()} for whole in (built, module))
    for name in [*layers, *own]:
        if layers.get(name) != own.get(name):
            raise ValueError(f"{name or 'the module'} is {own.get(name)} instead of {layers.get(name)}")


def _layer(module: nn.Module) -> str:
    """A layer without its weights, as text: its class, its options, and how many hooks it has."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k[0] != "_"}
    plain.pop("training", None)
    values = ", ".join(f"{name}={value!r}" for name, value in sorted(plain.items()))
    hooks = _hooks(module)
    text = f"{type(module).__qualname__}({module.extra_repr()}) with {values or 'no attributes'}"
    return text + (f" and {hooks} hook(s)" if hooks else "")


def _hooks(module: nn.Module) -> int:
    """How many hooks change the inputs or outputs of a module."""
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


def _largest(value: object) -> float:
    """The largest number in an option."""
    if isinstance(value, (list, dict)):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if isinstance(value, (int, float)) else 0
