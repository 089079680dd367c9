"""Measures the two tiers of the tests, and runs the first in random orders next to a busy loop.

python benchmarks/suite.py [--tiers test test-slow] [--shuffles 10] [--ci LOG] [--device cpu-avx2] [--json]

Each tier runs by its target in the Makefile, which is set up first. LOG is what `.ci/run` printed on this machine and
commit; its last lines give the seconds of each step, set-up and tiers included. Each shuffle runs all tests of the
first tier in a new random order, alternately with one worker and with two, while another process keeps one core busy.
The exit status is 1 if a test fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _results import RESULTS, metadata, print_table, write

ROOT = Path(__file__).parent.parent
STEP = re.compile(r"^==> (\S+), (\d+) s: (.*)$", re.MULTILINE)
TOTAL = re.compile(r"^==> in all (\d+) s$", re.MULTILINE)
LAST = re.compile(r"^=* ?(.*\b(?:passed|failed|error).*) in [\d.]+s", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiers", nargs="*", default=["test", "test-slow"], help="targets of the Makefile")
    parser.add_argument("--shuffles", type=int, default=0, help="runs of the first tier in random order")
    parser.add_argument("--ci", type=Path, metavar="LOG", help="of a run of .ci/run")
    parser.add_argument("--device", default="cpu-avx2", help="of the result file's name")
    parser.add_argument("--json", action="store_true", help="write results/suite--<device>.json")
    args = parser.parse_args()
    rows = steps(args.ci.read_text()) if args.ci else []
    if args.tiers or args.shuffles:
        subprocess.run(["make", "setup"], cwd=ROOT, check=True)
    rows += [timed(f"make {tier}", ["make", tier]) for tier in args.tiers]
    for seed in range(args.shuffles):
        rows.append(shuffled(seed, workers=1 + seed % 2))
    print_table(rows)
    if args.json:
        log = " --ci LOG" if args.ci else ""
        command = f"python benchmarks/suite.py --tiers {' '.join(args.tiers)} --shuffles {args.shuffles}{log}"
        print(write("suite", args.device, RESULTS, {**metadata("cpu"), "command": command, "rows": rows}))
    return int(any(row["exit code"] for row in rows))


def steps(log: str) -> list[dict[str, Any]]:
    """The steps of a finished run of .ci/run, which ends at the first failure, and its seconds in all."""
    total = TOTAL.search(log)
    if total is None:
        raise ValueError("suite: --ci must be the log of a run that passed, got one without its last line")
    rows = []
    for name, seconds, last in STEP.findall(log):
        tests = LAST.search(last)
        rows.append({"run": f"CI, {name}", "seconds": int(seconds), "exit code": 0, "tests": tests[1] if tests else ""})
    return [*rows, {"run": ".ci/run", "seconds": int(total[1]), "exit code": 0, "tests": ""}]


def timed(name: str, command: list[str]) -> dict[str, Any]:
    """Seconds, exit code and pytest's last line of a command, whose output is shown as it comes."""
    begin, lines = time.monotonic(), []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    seconds = round(time.monotonic() - begin)
    found = LAST.findall("".join(lines))
    return {
        "run": name,
        "seconds": seconds,
        "exit code": process.returncode,
        "tests": found[-1] if found else "no result",
    }


def shuffled(seed: int, workers: int) -> dict[str, Any]:
    """The first tier in a random order next to a busy loop."""
    order = ["--random-order-bucket=global", f"--random-order-seed={seed}"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "worksteal", *order]
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return timed(f"in order {seed}, {workers} worker{'s' * (workers > 1)}, beside a busy loop", command)
    finally:
        busy.kill()
        busy.wait()


if __name__ == "__main__":
    sys.exit(main())
