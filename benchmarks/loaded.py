"""Speed of training next to a busy loop, by waiting policy of the threads. Writes results/loaded--cpu-avx2.json.

python benchmarks/loaded.py [--rounds 5] [--seconds 8] [--machine cpu-avx2] [--json]

The demo's fine-tuning runs in processes that take turns: two threads that spin while they wait (GNU OpenMP's default),
spin briefly, or sleep (the setting of the command line), and one thread; each alone and next to a loop that keeps
one core busy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from _results import RESULTS, metadata, print_table, write

from atop_fast import Defense, FinetuneConfig, build_classifier, build_purifier
from atop_fast._core.threads import seconds_queued
from atop_fast.attacks import frozen
from atop_fast.purifiers import SNPatchDiscriminator
from atop_fast.randomness import seeded
from atop_fast.recipes.schema import load_recipe
from atop_fast.training.finetuning import FinetuneStep

# How threads wait, and how many there are; the first is the baseline.
VARIANTS: dict[str, dict[str, str]] = {
    "spin": {"OMP_NUM_THREADS": "2"},
    "spin for a moment": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"},
    "sleep": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
LOADS = ("nothing", "a busy loop")
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each case, in turns")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--machine", default="cpu-avx2", help="of the result file's name")
    parser.add_argument("--commit", help="commit to record; by default what git says")
    parser.add_argument("--json", action="store_true", help="write the result file")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        print(json.dumps(train(args.seconds)))
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for number in range(args.rounds):
        for load in LOADS:
            for name in VARIANTS:
                found[load, name].append(measure(name, load, args.seconds))
                print(f"round {number + 1}: {name} beside {load}: {found[load, name][-1]}", flush=True)
    rows = [row(load, name, samples, found[load, "spin"]) for (load, name), samples in found.items()]
    print_table(rows)
    if args.json:
        document = {**metadata("cpu", args.commit), "threads": 2, "seconds": args.seconds, "rows": rows}
        print(write("loaded", args.machine, RESULTS, document))


def row(load: str, name: str, samples: list[dict[str, float]], baseline: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of a case, and the median of its rounds' ratios to the baseline's."""
    ratios = [s["images_per_s"] / b["images_per_s"] for s, b in zip(samples, baseline, strict=True)]
    medians = {key: round(statistics.median(s[key] for s in samples), 3) for key in samples[0]}
    spread = {"lowest": round(min(ratios), 3), "highest": round(max(ratios), 3)}
    ratio = round(statistics.median(ratios), 3)
    return {"beside": load, "waiting": name, "rounds": len(samples), "ratio": ratio, **spread, **medians}


def measure(name: str, load: str, seconds: float) -> dict[str, float]:
    """The result of `train` in a separate process, and the load of the machine before it."""
    given = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "MKL_"))}
    command = [sys.executable, __file__, "--train", "--seconds", str(seconds)]
    before = os.getloadavg()[0]
    with busy_loop() if load != LOADS[0] else contextlib.nullcontext():
        done = subprocess.run(command, env={**given, **VARIANTS[name]}, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "load_before": before}


@contextlib.contextmanager
def busy_loop() -> Iterator[None]:
    """A process that keeps one core busy inside the block."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def train(seconds: float) -> dict[str, float]:
    """Fine-tune like the demo for so long: images, seconds of computing and of queueing for a core, each a second."""
    with seeded(0):
        recipe = load_recipe("demo")
        classifier = build_classifier("small_cnn", channels=1, **recipe.classifier.options).eval()
        defense = Defense(recipe.transform.build(), build_purifier("unet", **recipe.purifier.options), classifier)
        discriminator = SNPatchDiscriminator(**recipe.discriminator.options)
        x = torch.rand(BATCH, 1, 28, 28)
    ids = torch.arange(BATCH)
    config = FinetuneConfig(lr=3e-3, gan_weight=0.005, ce_weight=2.0, attack="pgd", steps=3, eps=0.25)
    with frozen(classifier):
        step = FinetuneStep(defense, discriminator, config, 0)
        for _ in range(3):
            step(x, ids % 10, ids, 0)
        images, start, computed, waited = 0, time.perf_counter(), time.process_time(), seconds_queued()
        while time.perf_counter() - start < seconds:
            step(x, ids % 10, ids, 0)
            images += BATCH
        elapsed = time.perf_counter() - start
    values = {"images_per_s": images, "cpu": time.process_time() - computed}
    if waited is not None and (total := seconds_queued()) is not None:
        values["queued"] = total - waited
    return {key: round(value / elapsed, 3) for key, value in values.items()}


if __name__ == "__main__":
    main()
