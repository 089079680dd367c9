"""Flags that somebody needs for a while: threads that need the same ones do not put them back under each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

_LOCK = threading.Lock()
# By object and attribute: how many blocks hold it, and what it was before the first of them.
_HELD: dict[tuple[int, str], tuple[int, Any]] = {}


@contextlib.contextmanager
def holding(flags: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes, (object, name, value), inside the block; the last block that holds one puts it back.

    Blocks may be nested, and overlap in several threads, which then must want the same value.
    """
    mine: list[tuple[Any, str]] = []
    try:
        with _LOCK:
            for thing, name, value in flags:
                count, before = _HELD.get((id(thing), name), (0, getattr(thing, name)))
                _HELD[id(thing), name] = (count + 1, before)
                mine.append((thing, name))
                setattr(thing, name, value)
        yield
    finally:
        with _LOCK:
            for thing, name in mine:
                count, before = _HELD.pop((id(thing), name))
                if count > 1:
                    _HELD[id(thing), name] = (count - 1, before)
                else:
                    setattr(thing, name, before)
