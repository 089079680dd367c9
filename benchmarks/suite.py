"""Measures the two tiers of the tests, and runs the first in random orders on a machine that is busy.

python benchmarks/suite.py [--tiers test test-slow] [--orders 0 1 2 ...] [--loaded] [--ci LOG] [--json]

Each tier runs by its target in the Makefile, which is set up first. LOG is what `.ci/run` printed on this machine and
commit; its last lines give the seconds of each step, set-up and tiers included. An order is the seed by which all tests
of the first tier are shuffled; even ones run with one worker, odd ones with two, while another process keeps one core
busy. --json keeps the file's rows of other runs, each with its commit. The exit status is 1 if a test fails.
"""

from __future__ import annotations

import argparse
import json
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
    parser.add_argument("--orders", type=int, nargs="*", default=[], help="seeds of random orders of the first tier")
    parser.add_argument("--loaded", action="store_true", help="a long process already keeps a core busy")
    parser.add_argument("--ci", type=Path, metavar="LOG", help="of a run of .ci/run")
    parser.add_argument("--device", default="cpu-avx2", help="of the result file's name")
    parser.add_argument("--json", action="store_true", help="write results/suite--<device>.json")
    args = parser.parse_args()
    rows = steps(args.ci.read_text()) if args.ci else []
    if args.tiers or args.orders:
        subprocess.run(["make", "setup"], cwd=ROOT, check=True)
    rows += [timed(f"make {tier}", ["make", tier]) for tier in args.tiers]
    rows += [shuffled(seed, 1 + seed % 2, args.loaded) for seed in args.orders]
    print_table(rows)
    if args.json:
        print(record(rows, args.device))
    return int(any(row["exit code"] for row in rows))


def record(rows: list[dict[str, Any]], device: str, folder: Path = RESULTS) -> Path:
    """Writes the rows in the place of earlier ones of the same runs, and keeps those of others."""
    document = metadata("cpu")
    path = folder / f"suite--{device}.json"
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "commit": ""}
    earlier = [{"commit": before["commit"], **row} for row in before["rows"]]
    new = {row["run"] for row in rows}
    rows = [row for row in earlier if row["run"] not in new] + [{**row, "commit": document["commit"]} for row in rows]
    command = "python benchmarks/suite.py --json"
    return write("suite", device, folder, {**document, "command": command, "rows": rows})


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


def shuffled(seed: int, workers: int, loaded: bool) -> dict[str, Any]:
    """The first tier in a random order next to a busy loop, or to the process that loads the machine already."""
    order = ["--random-order-bucket=global", f"--random-order-seed={seed}"]
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "worksteal", *order]
    run = f"in order {seed}, {workers} worker{'s' * (workers > 1)}, beside a busy process"
    if loaded:
        return timed(run, command)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return timed(run, command)
    finally:
        busy.kill()
        busy.wait()


if __name__ == "__main__":
    sys.exit(main())
