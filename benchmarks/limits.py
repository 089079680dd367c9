"""Where the time of `corrupt` goes, for 1 and 2 threads: python benchmarks/limits.py [--json]"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import _harness
import torch
from torch import Tensor
from transforms import CORRUPT, RATIO, SIGMA, keys

from atop_fast import ops
from atop_fast.ops import _registry


def parts(shape: tuple[int, ...], patch: int, size: tuple[int, int] | None) -> dict[str, Callable[[], Any]]:
    """The whole, and what it is made of."""
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
    """Medians in microseconds. One image of 8x8 pixels shows the fixed cost of a call."""
    for shape, patch, size in (((1, 3, 8, 8), 8, None), *CORRUPT):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            samples = _harness.time_us(parts(shape, patch, size), "cpu", 0.3)
            for part, values in samples.items():
                text = "x".join(map(str, shape)) + (f" to {size[0]}x{size[1]}" if size else "")
                yield {"shape": text, "threads": threads, "part": part, **_harness.summary(values)}


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="write the results as JSON")
    args = parser.parse_args()
    _harness.keep_heap()
    found = list(rows())
    _harness.print_table(found)
    if args.json:
        print(
            "wrote",
            _harness.write("limits", "cpu", _harness.RESULTS, {**_harness.metadata("cpu", None), "rows": found}),
        )


if __name__ == "__main__":
    main()
