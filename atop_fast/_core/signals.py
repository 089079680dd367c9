"""SIGINT (Ctrl-C) and SIGTERM during work that saves what it has.

A command that was stopped ends with status 130 (SIGINT: KeyboardInterrupt) or 143 (SIGTERM: SystemExit).
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Stop:
    """Which signal has asked for an end, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Remember the first signal; a second Ctrl-C does not wait."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def leave(self, number: int | None = None, frame: FrameType | None = None) -> None:
        """Raise what ends the program with the signal's status."""
        self.signal = self.signal or number
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def stop_requests(at_once: bool = False) -> Iterator[Stop]:
    """A Stop that SIGINT and SIGTERM set inside the block; with `at_once` they end the block where it is.

    Python has signal handlers in its main thread alone. Those that a program has set stay, except that of SIGTERM where
    the work itself must get to a point at which it can save.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    own = {n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in DEFAULTS}
    numbers = {signal.SIGINT, signal.SIGTERM} - (own if at_once else own - {signal.SIGTERM})
    before = {n: signal.signal(n, stop.leave if at_once else stop.note) for n in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
