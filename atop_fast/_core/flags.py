"""Flags that somebody needs for a while: threads that need the same ones do not put them back under each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Held(NamedTuple):
    thing: Any  # kept alive, so that no other object gets its id
    blocks: int
    before: Any
    released: bool = False  # before all blocks have ended, see put_back


_LOCK = threading.Lock()
# By the object's id and the attribute: how many blocks hold it, and its value before the first of them.
_HELD: dict[tuple[int, str], _Held] = {}


@contextlib.contextmanager
def holding(flags: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes, (object, name, value), inside the block; the last block that holds one restores it.

    Blocks may be nested, and may overlap in several threads, which must then want the same value. All are read before
    one is set: an object may show the flag of another. After an error, here or in the block, everything is restored.
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
    """Restore held attributes, (object, name), early: for all blocks that hold them, until all of these have ended."""
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
        except Exception as error:  # the others are restored all the same
            failure = error
    if failure is not None:
        raise failure


def _set(thing: Any, name: str, value: Any) -> None:
    # An attribute that is right already is not set: some objects refuse it.
    if getattr(thing, name) == value:
        return
    # The flags of tensors made in inference mode can be set only in that mode.
    inside = isinstance(thing, Tensor) and thing.is_inference()
    with torch.inference_mode() if inside else contextlib.nullcontext():
        setattr(thing, name, value)
