"""A fine-tuning step of DeepFillV2 at 256x256, part by part: python benchmarks/finetune_step.py --help

`atop-fast bench finetune` times the step as a whole; atop_fast/bench/finetune.py has it, and the variants:

    public                  the public formulation: two identical generator passes, attention sample by sample, float32
    one pass bfloat16       that with one pass, without gradients that nobody reads, channels_last, none of our ops
    compile bfloat16        the same, the generator under torch.compile
    atop_fast, atop_fast bfloat16       atop_fast.training.FinetuneStep
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from atop_fast.bench.finetune import batch, build
from atop_fast.bench.harness import keep_heap

VARIANTS = ("public", "one pass bfloat16", "atop_fast", "atop_fast bfloat16")
PARTS = (
    "attack", "transform", "purifier", "discriminator", "losses",
    "backward of the purifier", "optimizer of the purifier",
)  # fmt: skip


def split(step: Callable[..., Any], data: Any) -> dict[str, float]:
    """Seconds of every part, from one profiled step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(*data)
    totals = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    return {part: totals.get(part, 0.0) for part in PARTS}


def main() -> None:
    """Print the seconds of every part of every variant, after one step that is not counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=(*VARIANTS, "compile bfloat16"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="height and width of the images")
    args = parser.parse_args()
    keep_heap()
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
