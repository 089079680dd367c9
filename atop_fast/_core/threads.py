"""How threads wait for one another, and whether they must wait for a core. Imports no torch: see wait_asleep."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

# OpenMP reads from these how its threads wait, once, when torch loads it. If none is set, GNU's threads spin for
# milliseconds, and hold a core for which the awaited thread may be queueing.
POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Seconds between measurements in a training or an evaluation; threads that queue for more than this share of their
# time cause a message.
EVERY, SHARE = 10.0, 0.2


def wait_asleep() -> None:
    """Have the threads of this process sleep while they wait, unless the environment says how they wait.

    Does nothing once torch is loaded, because OpenMP has then read its variables.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in POLICIES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def is_command() -> bool:
    """Whether this process is a command of this package other than `bench`, which measures users' programs."""
    program, command = [*sys.argv, "", ""][:2]
    # While a package is imported for `python -m package.module`, the program's name is -m.
    ours = Path(program).name == "atop-fast" or (program == "-m" and "atop_fast.cli" in sys.orig_argv)
    return ours and command != "bench"


def spinning() -> bool:
    """Whether threads that wait keep their cores, as far as the environment tells."""
    policy, count = (os.environ.get(name, "").strip() for name in POLICIES)
    return policy.upper() != "PASSIVE" and count != "0"


def busy_cores(seconds: float = 0.25) -> float | None:
    """How many cores of this machine other processes keep busy; None if the system does not tell."""
    before = _system()
    if before is None:
        return None
    own, start = time.process_time(), time.monotonic()
    time.sleep(seconds)
    own, elapsed = time.process_time() - own, time.monotonic() - start
    after = _system()
    assert after is not None
    return max(0.0, (after - before - own) / elapsed)


class Queueing:
    """The share of time for which the threads of this process queue for a core, from one measurement to the next.

    Args:
        threads: number of compute threads; with one, nothing is measured.
        every: seconds between measurements.
    """

    def __init__(self, threads: int, every: float = EVERY) -> None:
        self.threads, self.every, self.said = threads, every, threads == 1
        self.since, self.queued = time.monotonic(), seconds_queued()

    def remark(self) -> str | None:
        """One sentence, the first time that the machine is so loaded that spinning threads delay one another."""
        now = time.monotonic()
        if self.said or now - self.since < self.every or not spinning():
            return None
        queued = seconds_queued()
        if queued is None or self.queued is None:
            return None
        share = (queued - self.queued) / (now - self.since) / self.threads
        self.since, self.queued = now, queued
        if share < SHARE:
            return None
        self.said = True
        return (
            f"{self.threads} threads queue for a core {100 * share:.0f} % of the time, as other work runs on these: "
            f"{cure()}"
        )


def cure() -> str:
    """The advice for a computation beside other work."""
    return "OMP_WAIT_POLICY=PASSIVE, or a smaller OMP_NUM_THREADS, is faster (docs/ENV.md)"


def seconds_queued() -> float | None:
    """How long the threads of this process have been ready to run without a core; None if the system does not tell."""
    times = []
    try:
        for task in Path("/proc/self/task").iterdir():
            # A thread may have ended in between.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                times.append(int((task / "schedstat").read_text().split()[1]))
    except (OSError, IndexError):
        return None
    return sum(times) / 1e9 if times else None


def _system() -> float | None:
    """Seconds for which the cores of this machine have computed anything."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
