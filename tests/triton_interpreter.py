"""Triton's interpreter, made faster for tests; what kernels compute stays the same.

A launch replaces the builtins of triton.language and restores them at its end. Triton does the same in every call of a
device function, tl.sum and tl.max included, and looks through a thousand names for what is replaced already. It builds
a table of types for every number that it spreads over a block, describes the shape of every value anew, in the value
and in its type, and compares the shapes of two blocks by objects for each of their numbers. And it repeats all
arithmetic of 32-bit integers in 64 bits, to detect overflow: tests compare results with specifications, which an
overflow that matters would change.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up() -> None:
    """Patch the language once a launch, look types up, compare shapes at once, and leave out checks of overflow."""
    _patch_once()
    core.block_type.__init__ = _remembering(core.block_type.__init__, _block, ("element_ty",))
    core.tensor.__init__ = _remembering(core.tensor.__init__, _value, ("handle", "type", "dtype"))
    look_up, broadcast = interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value
    types: dict[str, Any] = {}

    def look_up_once(dtype: Any) -> Any:
        if dtype.name not in types:
            types[dtype.name] = look_up(dtype)
        return types[dtype.name]

    def broadcast_if_needed(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.handle.data.shape == rhs.handle.data.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    interpreter._get_np_dtype = look_up_once
    TritonSemantic.broadcast_impl_value = broadcast_if_needed
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patch_once() -> None:
    """Patch the language once a launch, by names that are found once."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()
    names: dict[Any, list[str]] = {}

    def patch_first(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def patch_known(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]
        for name in names[package]:
            if core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_lang = patch_first
    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._patch_builtin = patch_known


def _remembering(init: Callable[..., None], values: Callable[..., tuple[Any, Any]], own: tuple[str, ...]) -> Any:
    """A faster `init`, of objects that never change: those with the same key share all attributes but their `own`.

    `values` gives the key and the values of `own` for the arguments of `init`.
    """
    known: dict[Any, dict[str, Any]] = {}

    def initialize(self: Any, *args: Any) -> None:
        key, mine = values(*args)
        if key in known:
            self.__dict__.update(known[key])
            self.__dict__.update(zip(own, mine, strict=True))
            return
        init(self, *args)
        known[key] = {name: value for name, value in vars(self).items() if name not in own}

    return initialize


def _block(element: Any, shape: Any) -> tuple[Any, Any]:
    """Key and own attribute of a type of blocks; the key's name holds the element's."""
    return (element.name, *(getattr(size, "value", size) for size in shape)), (element,)


def _value(handle: Any, type: Any) -> tuple[Any, Any]:
    """Key and own attributes of a value, whose shape is that of its type."""
    return tuple(type.shape) if type.is_block() else (), (handle, type, type.scalar)
