"""Decides whether modules are plain: a call runs only the code of their class, which neither reads nor writes state.

A network may be traced, or replaced by a copy, only if all of its modules are plain. A module that cannot be analyzed
completely counts as not plain.
"""

from __future__ import annotations

import builtins
import dis
import enum
import math
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized

# Methods that run when a module is called or read; a class that overrides one is not plain.
_CALLING = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "__getattribute__")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Instructions that write outside the function, enter a context (autocast, no_grad), import or await.
_FORBIDDEN = ("STORE_ATTR", "STORE_GLOBAL", "STORE_SUBSCR", "STORE_SLICE", "STORE_NAME", "DELETE_ATTR",
              "DELETE_GLOBAL", "DELETE_SUBSCR", "DELETE_NAME", "IMPORT", "BEFORE_WITH", "BEFORE_ASYNC", "SETUP_WITH",
              "SETUP_ASYNC", "LOAD_SPECIAL", "GET_AWAITABLE")  # fmt: skip
_BUILTINS = {
    abs, all, any, bool, enumerate, float, getattr, hasattr, int, isinstance, issubclass, len, list, max, min, range,
    reversed, round, sorted, str, sum, super, tuple, type, zip,
}  # fmt: skip
_CONSTANTS = (int, float, complex, str, bytes, type(None), type(Ellipsis), enum.Enum, torch.dtype, torch.device,
              torch.layout, torch.memory_format, torch.Size)  # fmt: skip
_MODULES = ("torch", "torchvision", "math", "operator", "typing", "collections.abc")


def is_plain(module: nn.Module) -> bool:
    """Whether a call of this module, children aside, runs only the code of its class: no hooks, no patched methods."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule) or is_parametrized(module):
        return False
    if torch_module._has_any_global_hook() or any(getattr(module, hooks) for hooks in _HOOKS):
        return False
    if any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in _CALLING):
        return False
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors if tensor is not None):
        return False
    # A callable attribute of the instance may shadow a method of its class.
    return not any(callable(value) and hasattr(kind, name) for name, value in vars(module).items())


def reads_nothing_that_changes(modules: Iterable[nn.Module], read: list[Any] | None = None) -> bool:
    """Whether the code that `forward` of these modules reaches reads only constants besides tensors.

    If given, `read` receives this code and these constants in a form that can be compared with a later call's.
    """
    reader, found = _Reader(read), list(modules)
    if not all(reader.allows(type(module).forward) for module in found):
        return False
    # A method among the attributes may read further attributes: repeat until no name is added.
    count = -1
    while count != len(reader.names):
        count = len(reader.names)
        if not all(reader.allows_attribute(module, name) for module in found for name in list(reader.names)):
            return False
    return True


class _Reader:
    """Walks the bytecode of functions and records the names of the attributes that they read."""

    def __init__(self, read: list[Any] | None) -> None:
        self.read: list[Any] = [] if read is None else read
        self.names: set[str] = set()
        self.seen: set[types.CodeType] = set()

    def allows(self, value: Any) -> bool:
        """Whether reading or calling `value` gives the same result every time."""
        self.read.append(_comparable(value))
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            return self.allows(value.fget)
        if isinstance(value, types.MethodType):
            return False
        if isinstance(value, types.FunctionType):
            defined_in_torch = value.__globals__.get("__name__", "").partition(".")[0] == "torch"
            return (defined_in_torch and _of_torch(value)) or self._allows_function(value)
        if isinstance(value, types.ModuleType):
            return value.__name__.startswith(("torch.", "torchvision.")) or value.__name__ in _MODULES
        if isinstance(value, type):
            return value in _BUILTINS or issubclass(value, (nn.Module, BaseException)) or _of_torch(value)
        if isinstance(value, (tuple, frozenset)):
            return all(map(self.allows, value))
        if isinstance(value, (types.BuiltinFunctionType, types.BuiltinMethodType)):
            modules = (torch, torch.nn.functional, math)
            return value in _BUILTINS or any(getattr(module, value.__name__, None) is value for module in modules)
        return isinstance(value, _CONSTANTS) or type(value).__module__.startswith(("torch._ops", "torch.jit._script"))

    def allows_attribute(self, module: nn.Module, name: str) -> bool:
        """`allows` for the attribute `name` of the module or its class."""
        if name in vars(module):
            value = vars(module)[name]
            return name in ("_modules", "_parameters", "_buffers") or isinstance(value, Tensor) or self.allows(value)
        # Base classes count too, because an overriding method may call theirs.
        kinds = [kind for kind in type(module).__mro__ if name in vars(kind) and not _of_torch(kind)]
        return all(self.allows(vars(kind)[name]) for kind in kinds)

    def _allows_function(self, function: types.FunctionType) -> bool:
        if hasattr(function, "__wrapped__") or vars(function):
            return False
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        try:
            closure = {name: cell.cell_contents for name, cell in cells}
        except ValueError:  # an empty cell
            return False
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        return all(map(self.allows, defaults)) and self._allows_code(function.__code__, function.__globals__, closure)

    def _allows_code(self, code: types.CodeType, names: dict[str, Any], closure: dict[str, Any]) -> bool:
        if code in self.seen:
            return True
        self.seen.add(code)
        for step in dis.get_instructions(code):
            if step.opname.startswith(_FORBIDDEN):
                return False
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                found = names if step.argval in names else vars(builtins)
                if step.argval not in found or not self.allows(found[step.argval]):
                    return False
            elif (step.opname.startswith(("STORE_DEREF", "DELETE_DEREF")) and step.argval in code.co_freevars) or (
                "DEREF" in step.opname and step.argval in closure and not self.allows(closure[step.argval])
            ):
                return False
            elif "ATTR" in step.opname or "METHOD" in step.opname:
                self.names.add(step.argval)
        inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        return all(self._allows_code(part, names, closure) for part in inner)


def _comparable(value: Any) -> Any:
    """A form for comparisons: a function's code, which may be replaced; 1, 1.0 and True, 0.0 and -0.0 differ."""
    if isinstance(value, types.FunctionType):
        return value.__code__
    return (type(value), repr(value)) if isinstance(value, (int, float, complex)) else value


def _of_torch(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").partition(".")[0] == "torch"
