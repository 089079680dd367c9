"""A fine-tuning step of DeepFillV2 at 256x256, part by part: python benchmarks/finetune_step.py --help

`atop-fast bench finetune` times the step as a whole; atop_fast/bench/finetune.py has it, and the variants:

    public                  the public formulation: two identical generator passes, attention sample by sample, float32
    one pass bfloat16       the same with one pass, without unused gradients, channels_last, none of our ops
    compile bfloat16        the same, the generator under torch.compile
    atop_fast, atop_fast bfloat16       atop_fast.training.FinetuneStep

--engine trains for some updates instead, by `fit` with checkpoints, metrics and averaged weights, and prints the share
of the time that is spent outside of the networks and their losses: data, transform, optimizers, and everything else.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _results
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from atop_fast.bench.finetune import batch, build
from atop_fast.bench.harness import keep_heap
from atop_fast.training.engine import fit
from atop_fast.training.feed import Feed

VARIANTS = ("public", "one pass bfloat16", "atop_fast", "atop_fast bfloat16")
PARTS = (
    "attack", "transform", "purifier", "discriminator", "losses",
    "backward of the purifier", "optimizer of the purifier",
)  # fmt: skip
# The discriminator's part has its backward pass and its optimizer in it.
NETWORKS = ("attack", "purifier", "discriminator", "losses", "backward of the purifier")
PURIFIERS = {"unet": (64, 32), "deepfill_v2": (8, 256)}


def split(step: Callable[..., Any], data: Any) -> dict[str, float]:
    """Seconds of every part, from one profiled step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(*data)
    return {part: _total(profiler, part) for part in PARTS}


def engine(purifier: str, updates: int) -> dict[str, Any]:
    """How much of the time of some updates in `fit`, start and end included, is spent outside of the networks."""
    count, size = PURIFIERS[purifier]
    step, _ = build("atop_fast bfloat16", purifier, "cpu")
    step.config = replace(step.config, epochs=updates, batch_size=count, average="ema")
    x, y, *_ = batch(count, size, "cpu")
    feed = Feed("engine", (x * 255).byte(), y, step.device)
    with tempfile.TemporaryDirectory() as folder:
        files = {"checkpoint": Path(folder) / "checkpoint.pt", "metrics": Path(folder) / "metrics.jsonl"}
        step(*batch(count, size, "cpu"))
        with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("all"):
            fit("engine", step, feed, seed=0, progress=False, **files)
    whole, inside = _total(profiler, "all"), sum(_total(profiler, part) for part in NETWORKS)
    return {
        "purifier": purifier, "batch": count, "size": size, "updates": updates, "threads": torch.get_num_threads(),
        "seconds_per_update": round(whole / updates, 4), "outside_percent": round(100 * (1 - inside / whole), 2),
    }  # fmt: skip


def _total(profiler: profile, name: str) -> float:
    return sum(event.cpu_time_total for event in profiler.key_averages() if event.key == name) / 1e6


def main() -> None:
    """Print the seconds of every part of every variant, after one step that is not counted; or the engine's share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=(*VARIANTS, "compile bfloat16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="height and width of the images")
    parser.add_argument("--engine", action="store_true", help="see above; writes results/engine--cpu.json")
    parser.add_argument("--commit", help="commit to record; by default what git says")
    args = parser.parse_args()
    keep_heap()
    if args.engine:
        rows = [engine("unet", 8), engine("deepfill_v2", 3)]
        for row in rows:
            print(row)
        _results.write("engine", "cpu", _results.RESULTS, {**_results.metadata("cpu", args.commit), "rows": rows})
        return
    data = batch(args.batch, args.size, "cpu")
    for variant in args.variants:
        step, _ = build(variant, "deepfill_v2", "cpu")
        step(*data)
        parts = split(step, data)
        print(f"{variant}: {sum(parts.values()):.2f} s")
        for part, seconds in parts.items():
            print(f"    {part:<28}{seconds:.3f}")


if __name__ == "__main__":
    main()
