"""Triton's interpreter, made faster for tests; what kernels compute stays the same.

A launch replaces the builtins of triton.language and restores them at its end. Triton does the same in every call of a
device function, tl.sum and tl.max included, and looks through a thousand names for what is replaced already. It builds
a table of types for every number that it spreads over a block, and compares the shapes of two blocks by objects for
each of their numbers. And it repeats all arithmetic of 32-bit integers in 64 bits, to detect overflow: tests compare
results with specifications, which an overflow that matters would change.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def speed_up() -> None:
    """Patch the language once a launch, look types up, compare shapes at once, and leave out checks of overflow."""
    patch, launch, look_up = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    broadcast = TritonSemantic.broadcast_impl_value
    patched: set[int] = set()
    types: dict[str, Any] = {}

    def patch_first(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def look_up_once(dtype: Any) -> Any:
        if dtype.name not in types:
            types[dtype.name] = look_up(dtype)
        return types[dtype.name]

    def broadcast_if_needed(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.handle.data.shape == rhs.handle.data.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    interpreter._patch_lang = patch_first
    interpreter.GridExecutor.__call__ = launch_anew
    interpreter._get_np_dtype = look_up_once
    TritonSemantic.broadcast_impl_value = broadcast_if_needed
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
