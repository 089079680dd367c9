"""Two lengths of the same properties: a fixed short one in the suite, and a long random one in a box of time.

`make fuzz` sets ATOP_FAST_FUZZ to the number of inputs of each target, and fails if all of them together had fewer than
ATOP_FAST_FUZZ_FLOOR. Hypothesis keeps what fails in .hypothesis and tries it first in the next run.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "ops")]

INPUTS = int(os.environ.get("ATOP_FAST_FUZZ", "0"))
FLOOR = int(os.environ.get("ATOP_FAST_FUZZ_FLOOR", "0"))
# Seconds of one target; what is drawn later is neither run nor counted.
BOX = 30.0
tried: Counter[str] = Counter()

# The first examples of a target import what it needs, and machines are shared: time says nothing here.
_OPTIONS = {"deadline": None, "print_blob": True, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("short", max_examples=15, derandomize=True, database=None, **_OPTIONS)
hypothesis.settings.register_profile("long", max_examples=INPUTS or 1, **_OPTIONS)
hypothesis.settings.load_profile("long" if INPUTS else "short")


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[], bool]:
    """Called with every input: counts it, or says that the time of the target is over."""
    target, start = request.node.name, time.monotonic()

    def call() -> bool:
        if time.monotonic() - start > BOX:
            return False
        tried[target] += 1
        return True

    return call


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if INPUTS:
        terminalreporter.section("inputs by target")
        for target, number in sorted(tried.items()):
            terminalreporter.line(f"{number:7}  {target}")
        terminalreporter.line(f"{tried.total():7}  in all")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if tried.total() < FLOOR and session.exitstatus == pytest.ExitCode.OK:
        print(f"\nERROR: {tried.total()} inputs, fewer than {FLOOR}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
