"""The random transforms under pytest-benchmark: pytest benchmarks/test_transforms_bench.py

The cases of atop_fast/bench/transforms.py, each variant a benchmark of its own; --benchmark-compare and the like work
as usual. Ratios between variants are better taken from `atop-fast bench ops`, which takes turns.
"""

from __future__ import annotations

import pytest
import torch

from atop_fast.bench.harness import Case, Owned, Roofline, synchronize
from atop_fast.bench.transforms import transform_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = list(transform_cases(DEVICE))
ROOFLINE = Roofline(DEVICE)


def _name(case: Case) -> str:
    return f"{case.name}-{case.shape}-{case.dtype}".replace(" ", "-")


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, id=f"{_name(case)}-{variant}")
        for case in CASES
        for variant, function in case.run.items()
        # Changing owners in every call would be timed, too.
        if not isinstance(function, Owned)
    ],
)
def test_transform(benchmark, case, variant):
    case.judge({})
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
    share = ROOFLINE.floor(case, case.dtype) / benchmark.stats.stats.median
    benchmark.extra_info.update(bytes_moved=case.nbytes, roofline=share)
