"""First contact with a GPU: builds, tests, measures and trains, in parts that end in time. docs/gpu.md explains it.

    python benchmarks/gpu.py prepare KIT [--data FOLDER]    where there is a network: libraries, packages and images
    python benchmarks/gpu.py run [--kit KIT] [--data FOLDER] [--pack FOLDER]
    python benchmarks/gpu.py run --rehearse           all parts on the CPU, tiny

Every part is a process with a time limit, and leaves its log and <out>/parts/<part>.json when it ends. The same call
again runs the parts that are missing or have failed. Exit code 0: all parts are done; 1: a part failed or did not end
in its time; 2: wrong arguments; 3: torch sees no GPU; 4: the time was over before all parts had begun.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUMMARY_LINES = 40
NO_GPU, TIME_OVER = 3, 4
# CIFAR-10 in a kit.
IMAGES = "images.tar.xz"


@dataclass(frozen=True)
class Part:
    """A part, its time limit, and how long it is expected to take: estimates, as nothing has run on a GPU."""

    name: str
    limit: int  # seconds
    expected: int  # seconds
    about: str


PARTS = (
    Part("setup", 240, 20, "packages, libraries, data; a build where no prebuilt library serves: 150 s"),
    Part("ceilings", 40, 12, "copy rate, matrix products in float32, TF32 and bfloat16"),
    Part("smoke", 90, 35, "every op in every backend against its formula; CUDA graphs of updates and attacks"),
    Part("tests", 120, 90, "tests of the ops in CUDA and Triton, without opcheck and torch.compile"),
    Part("ops", 80, 50, "the suite ops in its quick form, by replays"),
    Part("steps", 80, 45, "PGD steps and fine-tuning steps, eager and replayed"),
    Part("train", 335, 325, "CIFAR-10 native defense from scratch, with its verdict"),
    Part("replays", 90, 25, "a step of each attack, eager and replayed"),
    Part("eot", 100, 45, "PGD-200 x EOT-20 on the native defense, 512 images"),
    Part("autoattack", 240, 110, "AutoAttack fast and standard, 10,000 images; its original on 512"),
    Part("deepfill", 90, 25, "DeepFillV2 at 256x256, 10,000 images"),
    Part("attacks", 120, 60, "the suite attacks in its quick form"),
    Part("evaluate", 120, 60, "the suite evaluate in its quick form"),
    Part("finetune", 200, 150, "the suite finetune in full, with torch.compile"),
    Part("sanitize", 240, 200, "ops against their formulas under memcheck and racecheck"),
)
# A rehearsal's limits are longer by this factor: two busy cores are no GPU.
REHEARSAL = 5
# Parts before it leave it its time.
FIRST = "train"


def prepare(kit: Path, as_built: bool, data: Path | None) -> None:
    """Fill a folder with what a machine without a network lacks."""
    import _gpu_parts as parts

    if not as_built:
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True)
    (kit / "site").mkdir(parents=True, exist_ok=True)
    for library in ROOT.glob("atop_fast/_ops_*.so"):
        shutil.copy(library, kit)
    (kit / "sources").write_text(parts.sources() + "\n")
    for package in parts.PACKAGES:
        parts.copy_package(package, kit / "site")
    if data is not None:
        # Small JPEG files repeat their tables: xz stores them in a third of their size, which a zip file exceeds.
        with tarfile.open(kit / IMAGES, "w:xz") as archive:
            for path in sorted(path for path in data.rglob("*") if path.is_file()):
                archive.add(path, str(path.relative_to(data)))
    size = sum(file.stat().st_size for file in kit.rglob("*") if file.is_file())
    print(f"{kit}: {', '.join(sorted(path.name for path in kit.iterdir()))}; {size / 2**20:.0f} MiB")


class Run:
    """One call: which parts are done, and the time that is left."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.start = arguments, time.monotonic()
        self.out: Path = arguments.out.resolve()
        self.state = self.out / "parts"
        self.state.mkdir(parents=True, exist_ok=True)
        names = arguments.parts or [part.name for part in PARTS if not (arguments.rehearse and part.name == "sanitize")]
        scale = REHEARSAL if arguments.rehearse else 1
        self.parts = [replace(part, limit=scale * part.limit) for part in PARTS if part.name in names]

    def left(self) -> float:
        """Seconds of this call."""
        return float(self.arguments.seconds) - (time.monotonic() - self.start)

    def result(self, part: Part) -> dict[str, Any]:
        """The result of a part; empty if it has not run, or was killed together with the driver."""
        try:
            return dict(json.loads((self.state / f"{part.name}.json").read_text()))
        except (OSError, ValueError):
            return {}

    def run(self) -> int:
        """All parts that are not done; the exit code."""
        for number, part in enumerate(self.parts):
            if self.result(part).get("status") == "ok":
                continue
            later = [p for p in self.parts[number + 1 :] if p.name == FIRST and self.result(p).get("status") != "ok"]
            seconds = min(part.limit, self.left() - sum(p.limit for p in later))
            if seconds >= min(5, part.expected):
                self.do(part, seconds)
                if part.name == "setup" and self.result(part)["status"] != "ok":
                    break
        summary = self.out / "summary.txt"
        print(summary.read_text().rstrip() if summary.exists() else "no time for any part")
        statuses = [self.result(part).get("status") for part in self.parts]
        if any(status in ("failed", "timeout") for status in statuses):
            return 1
        return 0 if all(status == "ok" for status in statuses) else TIME_OVER

    def do(self, part: Part, seconds: float) -> None:
        """Run a part, and leave its result."""
        after = time.monotonic() - self.start
        print(f"==> {part.name}: {part.about}; at most {seconds:.0f} s, after {after:.0f} s", flush=True)
        begin, numbers = time.monotonic(), self.state / f"{part.name}.numbers"
        numbers.unlink(missing_ok=True)
        command = [sys.executable, str(ROOT / "benchmarks" / "_gpu_parts.py"), part.name, f"--out={self.out}"]
        command += [f"--seconds={seconds:.0f}", f"--numbers={numbers}", f"--commit={self.arguments.commit}"]
        command += ["--tiny"] if self.arguments.rehearse else []
        command += [f"--{name}={value}" for name in ("kit", "data") if (value := getattr(self.arguments, name))]
        with open(self.state / f"{part.name}.log", "w") as log:
            code = limited(command, seconds, log, self.environment())
        status = "timeout" if code is None else "ok" if code == 0 else "failed"
        found = {"part": part.name, "status": status, "seconds": round(time.monotonic() - begin, 1)}
        found |= {"limit": round(seconds), "expected": part.expected, "commit": self.arguments.commit}
        try:
            found["numbers"] = json.loads(numbers.read_text())
        except (OSError, ValueError):
            found["numbers"] = {}
        if counts := tests_in((self.state / f"{part.name}.log").read_text(errors="replace")):
            found["tests"] = counts
        temporary = self.state / f"{part.name}.new"
        temporary.write_text(json.dumps(found, indent=1) + "\n")
        temporary.replace(self.state / f"{part.name}.json")
        (self.out / "summary.txt").write_text("\n".join(self.summary()) + "\n")
        self.pack()

    def environment(self) -> dict[str, str]:
        """Variables of the parts: the checkout and the brought packages are on the path."""
        paths = [str(ROOT), str(self.out / "site"), os.environ.get("PYTHONPATH", "")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}

    def summary(self) -> list[str]:
        """At most SUMMARY_LINES lines of text: a line for each part, and what it found."""
        blocks = [self.block(part) for part in self.parts]
        # All parts get as many lines, such that none is left out.
        depth = max(d for d in range(1, 8) if d == 1 or sum(len(block[:d]) for block in blocks) < SUMMARY_LINES)
        title = f"commit {self.arguments.commit}; {'part':10} status, seconds (expected): numbers; all: parts/*.json"
        return [title, *(line[:160] for block in blocks for line in block[:depth])]

    def block(self, part: Part) -> list[str]:
        """The lines of a part, the most important first."""
        found = self.result(part)
        if not found:
            return [f"{part.name:10} not run ({part.expected} s)"]
        lines = [f"{part.name:10} {found['status']}, {found['seconds']} s ({part.expected} s)"]
        if found["status"] != "ok" and (last := last_line(self.state / f"{part.name}.log")):
            lines.append(f"    log: {last}")
        if tests := found.get("tests"):
            lines.append("    " + ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped")))
            lines += [f"    FAILED {name}" for name in tests["names"][:3]]
        return lines + [f"    {line}" for line in found["numbers"].get("summary", [])]

    def pack(self) -> None:
        """Copy results to the folder of --pack, in few files: summary, an archive of results and logs, weights."""
        folder: Path | None = self.arguments.pack
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / "results.tar.gz", "w:gz") as archive:
            archive.add(self.state, "parts")
            for path in self.state.glob("*.rows"):
                archive.add(path, f"results/{path.stem}--{'cpu' if self.arguments.rehearse else 'cuda'}.json")
            for path in (self.out / "train").glob("*.json*"):
                archive.add(path, f"train/{path.name}")
        shutil.copy(self.out / "summary.txt", folder)
        for name in ("defense.safetensors", "report.html", "report.json"):
            if (self.out / "train" / name).exists():
                shutil.copy(self.out / "train" / name, folder)


def limited(command: Sequence[str], seconds: float, log: Any, environment: dict[str, str]) -> int | None:
    """A command's exit code, or None if it was ended, with all its processes, when its time was over."""
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also of a part that has ended: what it started must not disturb the next one.
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, kind)
                process.wait(3)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def tests_in(log: str) -> dict[str, Any]:
    """How many tests a log of `pytest -v` counts, also one that was cut off, and the names of those that failed."""
    pattern = r"^(?:\[gw\d+\].*?(PASSED|FAILED|ERROR|SKIPPED) (\S+)|(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b)"
    outcomes = [(a or d, b or c) for a, b, c, d in re.findall(pattern, log, re.MULTILINE)]
    if not outcomes:
        return {}
    names = [name for outcome, name in outcomes if outcome in ("FAILED", "ERROR")]
    counts = {key: sum(o == key.upper() for o, _ in outcomes) for key in ("passed", "skipped")}
    return {**counts, "failed": len(names), "names": names}


def last_line(log: Path) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def sees_gpu() -> bool:
    """Whether torch does, in a process of its own."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("kit", type=Path)
    first.add_argument("--data", type=Path, help="CIFAR-10 as an image folder, to be packed into the kit")
    first.add_argument("--as-built", action="store_true", help="take the libraries as they are, without a build")
    second = commands.add_parser("run")
    second.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="state and results")
    second.add_argument("--kit", type=Path, help="folder of `prepare`, also with wheels of pure Python")
    second.add_argument(
        "--data", type=Path, help="CIFAR-10 as an image folder, or a zip or tar file of one; default: that of the kit"
    )
    second.add_argument("--pack", type=Path, help="folder for a copy of the results in few files")
    second.add_argument("--seconds", type=int, default=590, help="of this call")
    second.add_argument("--commit", default="unknown", help="what is tested; results name it")
    second.add_argument("--parts", type=lambda text: text.split(","), help="these alone, separated by commas")
    second.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        if arguments.data is not None and not arguments.data.is_dir():
            parser.error(f"--data: there is no folder {arguments.data}")
        prepare(arguments.kit.resolve(), arguments.as_built, arguments.data)
        return 0
    if unknown := set(arguments.parts or ()) - {part.name for part in PARTS}:
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}")
    for name in ("kit", "data"):
        if (path := getattr(arguments, name)) is not None:
            if not path.exists():
                parser.error(f"--{name}: there is no {path}")
            setattr(arguments, name, path.resolve())
    if arguments.data is None and arguments.kit and (arguments.kit / IMAGES).exists():
        arguments.data = arguments.kit / IMAGES
    if not arguments.rehearse and not sees_gpu():
        print("benchmarks/gpu.py: torch sees no GPU; nothing is done")
        return NO_GPU
    return Run(arguments).run()


if __name__ == "__main__":
    sys.exit(main())
