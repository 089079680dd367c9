"""Identifies the model and the attacks of a run folder: by state, by code, and by the model's behavior.

The printed form shows neither a function's network nor a module's Python attributes. Therefore a model is also
identified by its logits and by slopes of a loss at fixed points. They are kept as numbers and compared within rounding,
which depends on threads and machines; weights that can be reached are compared exactly.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.files import shown
from ..attacks import Attack, AutoAttack, Model, frozen
from ..defense import Defense
from ..randomness import Tag, derive_seed, random_uniform, seeded
from .judge import full_precision, judged
from .source import Source

# Number of probe images, each also mixed with noise; of draws; and of calls if draws cannot be repeated.
POINTS, DRAWS, CALLS = 4, 2, 16
# Number of times each draw is taken, to detect whether it repeats.
TIMES = 4
# Tolerated relative differences of logits and of slopes, due to rounding.
ROUNDING = {"logits": 1e-3, "slopes": 2e-2}
# Tolerated standard errors between the means of calls that cannot be repeated.
ERRORS = 8.0
# Maximum nesting of objects.
DEPTH = 12
PLAIN = (bool, int, float, complex, str, bytes, range, slice, PurePath, torch.dtype, torch.device)


def probe_images(source: Source) -> tuple[Tensor, Tensor]:
    """Some images of a source with their places, for model_identity."""
    places = torch.linspace(0, len(source) - 1, min(POINTS, len(source))).long()
    return source.take(places)[0], places


def model_identity(model: Model, points: Tensor, ids: Tensor) -> dict[str, Any]:
    """The identity of a model, JSON-ready, for `same_model`; the model and torch's generators stay as they were.

    Args:
        model: the model.
        points: images (B, C, H, W) at which it is compared.
        ids: int64 (B,), their places in the evaluated set.
    """
    walk = Walk()
    walk.text(model)
    states = sorted(_state(module) for module in walk.modules)
    return {"text": _hash(shown(model)), "weights": _hash(*states), **_probe(model, points, ids)}


def same_model(one: Any, other: Any) -> bool:
    """Whether two identities, one of which may come from a file, belong to the same model."""
    try:
        if any(one[key] != other[key] for key in ("text", "weights")):
            return False
        return all(_close(one[key], other[key], ROUNDING[key]) for key in ("logits", "slopes"))
    except (TypeError, KeyError, ValueError, RuntimeError):
        return False


def attack_identity(attack: Any, model: Model) -> str:
    """A hash of everything accessible in an attack: type, attributes, code, closure, defaults and networks.

    `model` is the evaluated model, which has a separate identity.
    """
    return _hash(Walk(model).text(attack))


class Walk:
    """Describes an object and all that it refers to as text, which is equal in every process unless something changes.

    Objects of Python's library and of torch, except tensors, modules and containers, are described only by their type.
    `modules` collects the modules that are found.
    """

    def __init__(self, model: object = None) -> None:
        self.model = model
        self.seen: dict[int, Any] = {}
        self.modules: list[nn.Module] = []

    def text(self, value: Any, depth: int = 0) -> str:
        """The description of one object."""
        if value is None or isinstance(value, PLAIN):
            return repr(value)
        if self.model is not None and value is self.model:
            return "the model"
        if id(value) in self.seen or depth > DEPTH:
            return f"again {type(value).__qualname__}"
        # Constants are excluded, because the compiler decides which share an object. `seen` keeps a reference, so that
        # ids are not reused.
        if not isinstance(value, (tuple, frozenset, types.CodeType)):
            self.seen[id(value)] = value
        parts = " ".join(self.text(part, depth + 1) for part in self._parts(value))
        return f"{self._head(value)}({parts})"

    def _head(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, np.ndarray):
            return f"{value.dtype} {value.shape} {_hash(value.tobytes())}"
        if isinstance(value, (set, frozenset)):
            return f"set {sorted(map(shown, value))}"
        if isinstance(value, nn.Module):
            self.modules.append(value)
            return f"{_name(type(value))} {shown(value)} {_state(value)}"
        if isinstance(value, types.CodeType):
            return f"code {_hash(value.co_code)} {value.co_names}"
        named = isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType))
        return f"{type(value).__name__} {_name(value)}" if named else _name(type(value))

    def _parts(self, value: Any) -> Iterator[Any]:
        if isinstance(value, (list, tuple)):
            yield from value
        elif isinstance(value, Mapping):
            yield from (part for item in value.items() for part in item)
        elif isinstance(value, (staticmethod, classmethod)):
            yield value.__func__
        elif isinstance(value, property):
            yield value.fget
        elif isinstance(value, types.MethodType):
            yield from (value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords)
        elif isinstance(value, types.CodeType):
            yield from value.co_consts
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, type):
            if not _is_library(value):
                members = vars(value)
                yield from (members[key] for key in sorted(members) if not key.startswith("__") or key == "__call__")
        elif isinstance(value, nn.Module):
            hidden = {k: v for k, v in vars(value).items() if not k.startswith("_") and k != "training"}
            yield from (type(value), hidden, *value.children())
        elif not isinstance(value, (Tensor, np.ndarray, set, frozenset, types.ModuleType)) and not _is_opaque(value):
            attributes = {**{k: getattr(value, k) for k in _slots(value)}, **getattr(value, "__dict__", {})}
            if isinstance(value, (Attack, AutoAttack)):
                # A callback only observes, and the device, log and accuracy of an AutoAttack do not change its results.
                reports = ("callback", "verbose", "log_path", "device", "accuracy")
                attributes = {k: v for k, v in attributes.items() if k not in reports}
            yield from (type(value), attributes)

    def _function(self, function: types.FunctionType) -> Iterator[Any]:
        for cell in function.__closure__ or ():
            # A cell may still be empty.
            with contextlib.suppress(ValueError):
                yield cell.cell_contents
        if _is_library(function):
            return
        yield from (function.__code__, function.__defaults__, function.__kwdefaults__)
        # Functions and objects of the same file that the code uses by name.
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                yield function.__globals__[name]


def _probe(model: Model, points: Tensor, ids: Tensor) -> dict[str, Any]:
    """Logits and slopes of a loss at fixed points, each with their means and variances over repeated calls.

    The variances are 0 for a model whose calls repeat under the seeds of torch, Python and numpy.
    """
    points, ids = judged(points).detach(), ids.to(points.device)
    key = derive_seed(0, "identity")
    noise, direction = (
        random_uniform(points.shape[1:], derive_seed(key, name), ids, 0, Tag.START).to(points)
        for name in ("noise", "slope")
    )
    points = torch.cat((points, (points + noise) / 2))
    ids, direction = ids.repeat(2), (2 * direction - 1).repeat(2, 1, 1, 1)
    with frozen(model), full_precision(points.device):
        calls = [_call(model, points, ids, direction, key, draw) for draw in TIMES * tuple(range(DRAWS))]
        if not _repeats(calls):
            calls += [_call(model, points, ids, direction, key, draw) for draw in range(CALLS - len(calls))]
    return {name: _summary(part) for name, part in zip(ROUNDING, zip(*calls, strict=True), strict=True)}


def _summary(values: Sequence[Tensor | None]) -> list[Any] | None:
    """The values of the draws with variances 0, or the mean of calls that cannot be repeated with its variance."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    stacked = torch.stack(known)
    if len(stacked) == TIMES * DRAWS:
        return [stacked[:DRAWS].tolist(), torch.zeros_like(stacked[:DRAWS]).tolist()]
    return [stacked.mean(dim=0).tolist(), (stacked.var(dim=0) / len(stacked)).tolist()]


def _repeats(calls: Sequence[tuple[Tensor, Tensor | None]]) -> bool:
    """Whether equal draws give equal values."""
    for name, values in zip(ROUNDING, zip(*calls, strict=True), strict=True):
        known = [v for v in values if v is not None]
        if len(known) == len(values):
            rounds = torch.stack(known).unflatten(0, (TIMES, DRAWS))
            if not _near(rounds, rounds[:1].expand_as(rounds), ROUNDING[name]):
                return False
    return True


def _call(model: Model, x: Tensor, ids: Tensor, direction: Tensor, key: int, draw: int) -> tuple[Tensor, Tensor | None]:
    """Logits (B, classes) of one call under fixed seeds, and slopes (B,) of a loss along a direction, if it has any."""
    arguments = (key, ids, draw) if isinstance(model, Defense) else ()
    slope: Tensor | None = None
    with seeded(derive_seed(key, draw), x.device):
        leaf = x.clone().requires_grad_()
        try:
            with torch.enable_grad():
                logits = model(leaf, *arguments)
                weights = torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype, device=logits.device)
                total = (F.log_softmax(logits, dim=1) * weights).sum()
                (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        except RuntimeError:
            # The model is not differentiable.
            gradient = None
    if gradient is not None:
        slope = (gradient * direction).flatten(1).sum(dim=1).double().nan_to_num().cpu()
    with torch.no_grad(), seeded(derive_seed(key, draw), x.device):
        logits = model(x.clone(), *arguments)
    return logits.double().nan_to_num().cpu(), slope


def _close(one: Any, other: Any, rounding: float) -> bool:
    """Whether two sets of values with their variances are equal up to rounding and noise."""
    if one is None or other is None:
        return one is other
    (a, va), (b, vb) = ((torch.tensor(part, dtype=torch.float64) for part in parts) for parts in (one, other))
    if a.shape != b.shape:
        return False
    return _near(a, b, rounding, ERRORS * (va + vb).sqrt())


def _near(a: Tensor, b: Tensor, rounding: float, more: float | Tensor = 0.0) -> bool:
    scale = torch.maximum(a.abs().max(), b.abs().max())
    return bool(((a - b).abs() <= rounding * scale + more).all())


def _state(module: nn.Module) -> str:
    tensors = {k: v for k, v in module.state_dict().items() if isinstance(v, Tensor)}
    return _hash(*(f"{k} {_tensor(v)}" for k, v in tensors.items()))


def _tensor(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {_hash(data)}"


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"


def _names(code: types.CodeType) -> set[str]:
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _slots(value: Any) -> list[str]:
    slots = (name for kind in type(value).__mro__ for name in _as_tuple(vars(kind).get("__slots__", ())))
    return [name for name in slots if not name.startswith("__") and hasattr(value, name)]


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _is_library(value: Any) -> bool:
    """Whether code belongs to Python, torch, this or another installed package, whose name and options identify it."""
    root = (getattr(value, "__module__", None) or "").partition(".")[0]
    if root == "builtins" and isinstance(value, types.FunctionType):
        # Code defined in exec.
        return False
    if root in sys.stdlib_module_names or root in ("torch", "numpy", __name__.partition(".")[0]):
        return root != "__main__"
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _is_opaque(value: Any) -> bool:
    if isinstance(value, (types.SimpleNamespace, argparse.Namespace)):
        return False
    root = type(value).__module__.partition(".")[0]
    return root in sys.stdlib_module_names or root == "torch"
