"""Networks that a plain function calls, as far as its code and closure show them."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

# Nested functions, methods and containers are followed this far, and containers up to this size.
DEPTH, ITEMS = 4, 64


def hidden_modules(model: object) -> list[nn.Module]:
    """The modules that a callable refers to: by closure, global name, argument, bound object or attribute.

    Other objects are not followed, so that a module may be missing.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()

    def visit(value: Any, depth: int = 0) -> None:
        if id(value) in seen or depth > DEPTH:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
            return
        for part in _parts(value):
            visit(part, depth + 1)

    visit(model)
    return found


def foreign_modules(model: object) -> list[nn.Module]:
    """The modules that a model calls by a plain function: the model itself, or an attribute of one of its modules.

    Those that it has as parts, and therefore sets to their modes, are left out.
    """
    if not isinstance(model, nn.Module):
        return hidden_modules(model)
    own = set(model.modules())
    functions = [value for module in own for value in vars(module).values() if callable(value) and _is_foreign(value)]
    return [m for m in {m: None for f in functions for m in hidden_modules(f)} if m not in own]


def _is_foreign(value: object) -> bool:
    """Whether this is code that may call a network: functions of torch, such as activations, do not."""
    return not (getattr(value, "__module__", None) or "").startswith("torch.")


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, types.FunctionType):
        yield from _function(value)
    elif isinstance(value, types.MethodType):
        # Attributes that the method reads, or all of an object that is called itself.
        yield from _attributes(value.__self__, _names(value.__func__.__code__)) if _is_python(value) else ()
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, (list, tuple)) and len(value) <= ITEMS:
        yield from value
    elif isinstance(value, Mapping) and len(value) <= ITEMS:
        yield from value.values()
    elif callable(value) and not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).values()


def _function(function: types.FunctionType) -> Iterator[Any]:
    code, names = function.__code__, _names(function.__code__)
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # an empty cell
            continue
    values += [function.__globals__[name] for name in _global_names(code) if name in function.__globals__]
    for value in values:
        yield value
        yield from _attributes(value, names)


def _attributes(value: Any, names: set[str]) -> Iterator[Any]:
    """Values that an object, as `self` in `lambda x: self.net(x)`, holds under the names that the code reads."""
    if not isinstance(value, (type, types.ModuleType, nn.Module)):
        own = getattr(value, "__dict__", {})
        yield from (own[name] for name in names if name in own)


def _is_python(method: types.MethodType) -> bool:
    return isinstance(method.__func__, types.FunctionType)


def _names(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(part) for part in _inner(code)))


def _global_names(code: types.CodeType) -> set[str]:
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_global_names(part) for part in _inner(code)))


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    return (part for part in code.co_consts if isinstance(part, types.CodeType))
