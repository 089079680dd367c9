"""Interrupts trainings and evaluations at random moments, resumes each, and checks its saved state and its result.

python benchmarks/faults.py [--count 40] [--seed 0] [--json]

For each fault it reports how the process ended, how many completed updates or attacked batches were lost, and whether
the run, resumed by the same call, ends with the same bits as an undisturbed one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import _victims
from _reliability import faults_by_kind
from _results import RESULTS, metadata, print_table, write
from _victims import UNITS, UPDATES, Job, child, kept, result

# Children of a server that has only imported the package start quickly.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["atop_fast", "atop_fast.training"])

SENT = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
INSIDE = ("disk full", "read-only folder", "out of memory", "NaN from the model", "clock jumps")
FAULTS = {
    "training": (*SENT, *INSIDE, "a worker raises", "a worker is killed", "a rank is killed"),
    "evaluation": (*SENT, *INSIDE, "a rank is killed"),
}
# How a run may end; "went on" is the end of a run that the fault does not stop.
ENDS = {
    "kill -9": ("killed",),
    "SIGTERM": ("SystemExit", "terminated"),
    "Ctrl-C": ("KeyboardInterrupt",),
    "disk full": ("OSError",),
    "read-only folder": ("OSError", "PermissionError", "ValueError"),
    "out of memory": ("went on", "OutOfMemoryError"),
    "NaN from the model": ("ValueError",),
    "clock jumps": ("went on",),
    "a worker raises": ("OSError",),
    "a worker is killed": ("RuntimeError",),
    "a rank is killed": ("killed, the other: ConnectionError",),
}
# Faults of one run before it may end.
MOST = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=40, help="faults, in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="add to results/reliability--cpu.json")
    args = parser.parse_args()
    begin = time.monotonic()
    faults = inject(args.count, args.seed)
    print_table(faults_by_kind(faults))
    wrong = [fault for fault in faults if not fault["right"]]
    for fault in wrong:
        print(f"WRONG: {fault}")
    print(f"{len(faults)} faults in {time.monotonic() - begin:.0f} s, {len(wrong)} with a wrong outcome")
    if args.json:
        print(record(faults, args.seed))
    sys.exit(bool(wrong))


def record(faults: list[dict[str, Any]], seed: int) -> Path:
    """Write the faults to the result file; they replace earlier ones with this seed."""
    path = RESULTS / "reliability--cpu.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    keys = ("task", "fault", "done", "lost", "ended", "equal", "right")
    rows = [row for row in rows if row["seed"] != seed]
    rows += [{"seed": seed, **{key: fault[key] for key in keys}} for fault in faults]
    rows.sort(key=lambda row: row["seed"])
    seeds = ", ".join(str(number) for number in dict.fromkeys(row["seed"] for row in rows))
    command = f"python benchmarks/faults.py --seed S --json, for S = {seeds}"
    return write("reliability", "cpu", RESULTS, {**metadata("cpu", None), "command": command, "rows": rows})


def inject(count: int, seed: int, kinds: dict[str, tuple[str, ...]] = FAULTS) -> list[dict[str, Any]]:
    """Inject about `count` faults, evenly over the kinds of each task; returns their effects, and which were right."""
    pairs = [(task, fault) for task, faults in kinds.items() for fault in faults]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        runs = _Runs(Path(name))
        for number, (task, fault) in enumerate(pairs):
            share = count // len(pairs) + (number < count % len(pairs))
            moments = random.Random(f"{seed} {task} {fault}")
            for _ in range(5 * count):
                if share <= 0:
                    break
                injected = runs.disturbed(task, fault, min(share, MOST), moments)
                found += injected
                share -= len(injected)
    return found


class _Runs:
    """Runs in one folder, and the result of each kind without faults."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.numbers = folder, itertools.count()
        self.wanted: dict[tuple[str, int], Any] = {}

    def disturbed(self, task: str, fault: str, most: int, moments: random.Random) -> list[dict[str, Any]]:
        """A run with up to `most` faults, fewer if it ends earlier, which is then resumed to its end."""
        size, total = 1 + (fault == "a rank is killed"), {"training": UPDATES, "evaluation": UNITS}[task]
        if (task, size) not in self.wanted:
            self.wanted[task, size] = self._end(self._job(task, size))
        job = self._job(task, size)
        # Read by two processes where their end is the fault; the images are the same.
        job = replace(job, workers=2 if fault.startswith("a worker") else -1)
        injected = []
        while len(injected) < most and (left := total - kept(task, job.folder)) > 1:
            moment = kept(task, job.folder) + moments.randrange(0, max(1, min(left - 1, total // 3)))
            # A process that waits for one that never came is torchrun's to end.
            moment += size - 1
            if (outcome := self._fault(job, fault, moment, moments)) is None:
                break
            injected.append(outcome)
            if outcome["ended"] == "went on":
                break
        equal = self._end(job) == self.wanted[task, size]
        leftovers = [path.name for path in job.folder.rglob(".*")]
        for outcome in injected:
            fitting = outcome["ended"] in ENDS[fault] and outcome["lost"] <= size
            outcome.update(equal=equal, leftovers=leftovers, right=equal and fitting and not leftovers)
        shutil.rmtree(job.folder)
        return injected

    def _fault(self, job: Job, fault: str, moment: int, moments: random.Random) -> dict[str, Any] | None:
        """One fault; None if the run ended before it."""
        inside = "" if fault in SENT or fault == "a rank is killed" else fault
        reads = moments.randrange(1, _victims.IMAGES // 2)
        job = replace(job, fault=inside, moment=reads if job.workers > 0 else moment, seed=moments.randrange(2**32))
        begin = job.done.value = kept(job.task, job.folder)
        said = [Path(f"{job.folder}.ended-{rank}") for rank in range(job.size)]
        for path in said:
            path.unlink(missing_ok=True)
        processes = self._start(job)
        if not inside:
            while all(p.is_alive() for p in processes) and not (
                job.done.value >= moment and all(path.exists() for path in said)
            ):
                time.sleep(0.0005)
            # Anywhere in the work of an update, or in writing what came of it.
            time.sleep(moments.random() * 0.03)
            victim = moments.choice(processes)
            if not victim.is_alive():
                self._join(job, processes)
                return None
            os.kill(victim.pid, SENT.get(fault, signal.SIGKILL))
        self._join(job, processes)
        for folder in (job.folder, *filter(Path.is_dir, job.folder.iterdir())):
            folder.chmod(0o755)
        ended, text = self._ended(job, processes)
        if ended == "went on" and job.workers > 0:
            return None
        done, left = job.done.value, kept(job.task, job.folder)
        return {"task": job.task, "fault": fault, "moment": done - begin, "done": done, "lost": done - left,
                "ended": ended, "text": text}  # fmt: skip

    def _job(self, task: str, size: int) -> Job:
        folder = self.folder / str(next(self.numbers))
        folder.mkdir()
        return Job(task, folder, CONTEXT.RawValue("i", 0), size=size)

    def _start(self, job: Job) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        jobs = [replace(job, rank=rank, port=port) for rank in range(job.size)]
        processes = [CONTEXT.Process(target=child, args=(each,)) for each in jobs]
        for process in processes:
            process.start()
        return processes

    def _join(self, job: Job, processes: list[Any]) -> None:
        for process in processes:
            process.join(300)
            if process.exitcode is None:
                raise RuntimeError(f"{job} has not ended: {Path(f'{job.folder}.log').read_text()[-2000:]}")

    def _ended(self, job: Job, processes: list[Any]) -> tuple[str, str]:
        ends, texts = [], []
        for rank, process in enumerate(processes):
            path = Path(f"{job.folder}.ended-{rank}")
            kind, text = json.loads((path.exists() and path.read_text()) or "[null, null]")
            names = {0: "went on", -signal.SIGKILL: "killed", -signal.SIGTERM: "terminated"}
            ends.append(kind or names.get(process.exitcode, f"exit {process.exitcode}"))
            texts.append(text or "")
        return ", the other: ".join(sorted(ends, key=lambda end: end != "killed")), "; ".join(filter(None, texts))[:200]

    def _end(self, job: Job) -> Any:
        """The job done to its end."""
        job = replace(job, fault="")
        job.done.value = kept(job.task, job.folder)
        processes = self._start(job)
        self._join(job, processes)
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{job} has failed: {Path(f'{job.folder}.log').read_text()[-2000:]}")
        return result(job.task, job.folder, job.size)


if __name__ == "__main__":
    main()
