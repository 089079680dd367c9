"""Thread waiting policy, and detection of oversubscribed cores. Does not import torch: see wait_asleep."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

# OpenMP reads these once, when torch loads it. If neither is set, threads of GNU OpenMP spin for milliseconds at a
# barrier, and occupy a core that the awaited thread may need.
POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# Seconds between measurements in training or evaluation, and the share of time in a run queue that causes a message.
EVERY, SHARE = 10.0, 0.2


def wait_asleep() -> None:
    """Make waiting threads of this process sleep instead of spin, unless the environment sets a policy.

    Has no effect once torch is loaded, because OpenMP has then read its variables.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in POLICIES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def is_program() -> bool:
    """Whether this process is `atop-fast`."""
    program = sys.argv[0] if sys.argv else ""
    # During the import of the package for `python -m package.module`, sys.argv[0] is "-m".
    return Path(program).name == "atop-fast" or (program == "-m" and "atop_fast.cli" in sys.orig_argv)


def is_command() -> bool:
    """Whether this process is an atop-fast command other than `bench`, which measures users' programs."""
    return is_program() and sys.argv[1:2] != ["bench"]


def spinning() -> bool:
    """Whether waiting threads spin, as far as the environment tells."""
    policy, count = (os.environ.get(name, "").strip() for name in POLICIES)
    return policy.upper() != "PASSIVE" and count != "0"


def busy_cores(seconds: float = 0.25) -> float | None:
    """The number of cores that other processes keep busy; None if the system does not tell."""
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
    """Measures the share of time that the threads of this process spend in a run queue, waiting for a core.

    Args:
        threads: number of compute threads; 1 disables the measurement.
        every: seconds between measurements.
    """

    def __init__(self, threads: int, every: float = EVERY) -> None:
        self.threads, self.every, self.said = threads, every, threads == 1
        self.since, self.queued = time.monotonic(), seconds_queued()

    def remark(self) -> str | None:
        """A message, once, when the machine is so loaded that spinning threads delay one another; otherwise None."""
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
            f"{self.threads} threads queue for a core {100 * share:.0f} % of the time, because other processes use it: "
            f"{cure()}"
        )


def cure() -> str:
    """Advice for a computation on a loaded machine."""
    return "OMP_WAIT_POLICY=PASSIVE, or a smaller OMP_NUM_THREADS, is faster (docs/ENV.md)"


def seconds_queued() -> float | None:
    """Seconds that the threads of this process have spent runnable without a core; None if the system does not tell."""
    times = []
    try:
        for task in Path("/proc/self/task").iterdir():
            # The thread may have ended since it was listed.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                times.append(int((task / "schedstat").read_text().split()[1]))
    except (OSError, IndexError):
        return None
    return sum(times) / 1e9 if times else None


def _system() -> float | None:
    """Busy time of all cores of this machine, in seconds."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
