"""The random transforms under pytest-benchmark: pytest benchmarks/test_transforms_bench.py

The cases of ops.py (transforms.py), each variant a benchmark of its own; --benchmark-compare and the like work as
usual. Ratios between variants are better taken from ops.py, which measures them in turns.
"""

from __future__ import annotations

import pytest
import torch
from _harness import Case, copy_gbps, synchronize
from transforms import transform_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = list(transform_cases(DEVICE))


def _name(case: Case) -> str:
    return f"{case.op}-{case.direction}-{case.shape}-{str(case.dtype).removeprefix('torch.')}".replace(" ", "-")


@pytest.mark.parametrize(
    ("case", "variant"),
    [pytest.param(case, variant, id=f"{_name(case)}-{variant}") for case in CASES for variant in case.run],
)
def test_transform(benchmark, case, variant):
    case.check()
    torch._dynamo.reset()
    function = case.run[variant]
    try:
        function()
    except Exception as error:  # a peer that cannot do the work is no competitor
        pytest.skip(f"{variant}: {type(error).__name__}: {error}".partition("\n")[0])

    def run() -> None:
        function()
        synchronize(DEVICE)

    benchmark.group = _name(case)
    benchmark(run)
    gbps = case.nbytes / benchmark.stats.stats.median / 1e9
    benchmark.extra_info.update(bytes_moved=case.nbytes, gbps=gbps, share_of_copy=gbps / copy_gbps(case.nbytes, DEVICE))
