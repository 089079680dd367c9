"""The suite `scaling`: time and memory against images, draws, steps, image size and processes.

Run as a program, as the suite does under torch.distributed.run, it times one evaluation and prints the seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..attacks import PGD
from ..classifiers import build_classifier
from ..defense import Defense
from ..evaluation import evaluate
from ..randomness import seeded
from .attacks import ALPHA, EPS
from .evaluate import torchattacks_eotpgd
from .harness import Case, Function, Options
from .models import defense, smooth_images

# The varied parameters, with all others at BASE; a quick run has the first two values and a quarter of the images.
AXES = {"images": (8, 16, 32, 64), "draws": (1, 4, 16), "steps": (2, 4, 8, 16), "size": (32, 64, 96)}
BASE = {"images": 16, "draws": 4, "steps": 4, "size": 32}
# Number of images in the evaluation by several processes.
EVALUATED = 64


def cases(options: Options) -> Iterator[Case]:
    """PGD with EOT along each axis, against torchattacks, and one evaluation by 1 and 2 processes."""
    model = small_defense(options.device)
    for axis, values in AXES.items():
        for value in values[:2] if options.quick else values:
            work = {**BASE, "images": BASE["images"] // (4 if options.quick else 1), axis: value}
            yield _pgd(model, axis, value, work, options.device)
    if options.device == "cpu" or torch.cuda.device_count() > 1:
        yield _processes(options.device, 1 if options.quick else 3)


def small_defense(device: str) -> Defense:
    """RT2, a U-Net and a small ResNet: a pass takes milliseconds."""
    with seeded(0):
        classifier: nn.Module = build_classifier("small_resnet")
    return defense(classifier, channels=3, width=12, device=device)


def _pgd(model: Defense, axis: str, value: int, work: dict[str, int], device: str) -> Case:
    x = smooth_images(work["images"], work["size"]).to(device)
    y = torch.zeros(len(x), dtype=torch.int64, device=device)
    step: dict[str, Any] = {"eps": EPS, "alpha": ALPHA, "steps": work["steps"], "eot_iter": work["draws"]}
    run: dict[str, Function] = {
        "torchattacks": lambda: torchattacks_eotpgd(model, x, y, **step),
        "atop_fast": lambda: PGD(model, **step, random_start=False)(x, y),
    }
    shape = f"{value} {'pixels' if axis == 'size' else axis}"
    return Case("scaling", f"PGD x EOT by {axis}", shape, "float32", run, ["atop_fast"], images=len(x), rounds=3)


def _processes(device: str, rounds: int) -> Case:
    threads = torch.get_num_threads()
    run: dict[str, Function] = {
        "1 process": _timed(1, threads, device),
        "2 processes": _timed(2, max(threads // 2, 1), device),
    }
    name, shape = "evaluation by processes", f"{EVALUATED}x3x32x32"
    return Case("scaling", name, shape, "float32", run, list(run), images=EVALUATED, rounds=rounds, own_clock=True)


def _timed(processes: int, threads: int, device: str) -> Callable[[], float]:
    def run() -> float:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [*command, "-m", "atop_fast.bench.scaling", device], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{processes} processes: {done.stderr.strip().rpartition(chr(10))[2]}")
        return float(done.stdout.split()[-1])

    return run


def main() -> None:
    """Evaluate as one of several processes; rank 0 prints the seconds, without the startup of the processes."""
    device = sys.argv[1]
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model = small_defense(device)
    x = smooth_images(EVALUATED).to(device)
    y = torch.zeros(len(x), dtype=torch.int64, device=device)
    evaluate(model, x[:8], y[:8], protocol="quick", progress=False)
    start = time.perf_counter()
    evaluate(model, x, y, protocol="quick", batch_size=16, progress=False)
    if os.environ["RANK"] == "0":
        print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
