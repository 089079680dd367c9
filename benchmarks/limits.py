"""Breakdown of the time of `corrupt`, for 1 and 2 threads: python benchmarks/limits.py [--json FILE]"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atop_fast import ops
from atop_fast.bench import results
from atop_fast.bench.harness import Case, Roofline, keep_heap, measure
from atop_fast.bench.transforms import CORRUPT, RATIO, SIGMA, keys
from atop_fast.ops import _registry


def parts(shape: tuple[int, ...], patch: int, size: tuple[int, int] | None) -> dict[str, Callable[[], Any]]:
    """The op and its parts."""
    x = torch.rand(shape)
    height, width = size or shape[2:]
    key = keys(len(x), "cpu")
    count = (height // patch) * (width // patch)
    blocks = ops.mask_blocks(count, round(RATIO * count), **key)
    op = functools.partial(_registry.OPS["corrupt"].overload, x, blocks)
    rest = (*key.values(), patch, 1, (height, width), torch.float32, False)
    y, gradient = torch.empty(len(x), shape[1] + 2, height, width), torch.rand(len(x), shape[1] + 2, height, width)
    whole = functools.partial(ops.corrupt, patch=patch, size=size, mask_ratio=RATIO, sigma=SIGMA, **key)

    def both() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(whole(leaf), leaf, gradient)[0]

    return {
        "whole, forward": lambda: whole(x),
        "whole, forward and backward": both,
        "kernel": lambda: op(torch.tensor(SIGMA), *rest),
        "kernel without noise": lambda: op(torch.tensor(0.0), *rest),
        "as many normal numbers": lambda: ops.random_normal((shape[1], height, width), **key),
        "fill of the output": lambda: y.fill_(1.0),
    }


def rows() -> Iterator[dict[str, Any]]:
    """The parts as variants of a case. One image of 8x8 pixels shows the fixed cost of a call."""
    roofline = Roofline("cpu")
    for shape, patch, size in (((1, 3, 8, 8), 8, None), *CORRUPT):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run = parts(shape, patch, size)
            text = "x".join(map(str, shape)) + (f" to {size[0]}x{size[1]}" if size else "")
            yield from measure(Case("limits", "corrupt", text, "float32", run, list(run)), "cpu", 0.3, roofline)


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    keep_heap()
    found = list(rows())
    results.print_rows(found)
    if args.json:
        results.write(args.json, {**results.metadata("cpu"), "rows": found})


if __name__ == "__main__":
    main()
