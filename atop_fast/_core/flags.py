"""Temporarily sets attributes, reference-counted across threads; the last holder restores them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Held(NamedTuple):
    thing: Any  # a reference, so that the id is not reused
    blocks: int
    before: Any
    released: bool = False  # restored early, see put_back


_LOCK = threading.Lock()
# For (id of the object, attribute): the number of blocks that hold it, and its value before the first of them.
_HELD: dict[tuple[int, str], _Held] = {}


@contextlib.contextmanager
def holding(flags: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes, given as (object, name, value), in the block; the last block that holds one restores it.

    Blocks may be nested, and may overlap across threads if these set the same value. All attributes are read before any
    is set, because one object may expose the flag of another. After an error, here or in the block, all are restored.
    """
    mine: list[tuple[int, str]] = []
    try:
        with _LOCK:
            wanted = []
            for thing, name, value in flags:
                key = (id(thing), name)
                held = _HELD.get(key) or _Held(thing, 0, getattr(thing, name))
                _HELD[key] = held._replace(blocks=held.blocks + 1)
                mine.append(key)
                if not held.released:
                    wanted.append((thing, name, value))
            for flag in wanted:
                _set(*flag)
        yield
    finally:
        with _LOCK:
            _release(mine)


def put_back(flags: Iterable[tuple[Any, str]]) -> None:
    """Restore held attributes, given as (object, name), early: they stay restored until every holding block ends."""
    with _LOCK:
        for thing, name in flags:
            if (held := _HELD.get((id(thing), name))) is not None:
                _set(thing, name, held.before)
                _HELD[id(thing), name] = held._replace(released=True)


def _release(keys: list[tuple[int, str]]) -> None:
    failure: Exception | None = None
    for key in reversed(keys):
        held = _HELD.pop(key)
        if held.blocks > 1:
            _HELD[key] = held._replace(blocks=held.blocks - 1)
            continue
        try:
            _set(held.thing, key[1], held.before)
        except Exception as error:  # restore the others first
            failure = error
    if failure is not None:
        raise failure


def _set(thing: Any, name: str, value: Any) -> None:
    # Some objects refuse assignment even of the present value.
    if getattr(thing, name) == value:
        return
    # Flags of inference tensors can be set only in inference mode.
    inside = isinstance(thing, Tensor) and thing.is_inference()
    with torch.inference_mode() if inside else contextlib.nullcontext():
        setattr(thing, name, value)
