"""The floating-point types of networks, and the CPUs on which they are slow."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

from .flags import holding

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_fast(device: torch.device, precision: str) -> bool:
    """Whether torch has fast kernels for networks in this type; without them a CPU takes 10 to 100 times as long.

    CPUs without AVX-512, for example, have no fast kernels for 16-bit types.
    """
    dtype = PRECISIONS.get(precision)
    if dtype is None or device.type != "cpu":
        return True
    supported = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}[precision]
    try:
        return bool(getattr(torch.ops.mkldnn, supported)())
    except AttributeError:  # without oneDNN, or with other names in it, the answer is unknown
        return True


def lowered(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """Networks in the block compute in this type; in float32, nothing changes."""
    dtype = PRECISIONS[precision]
    if dtype is None:
        return contextlib.nullcontext()
    # Casts are not cached: the cache would outlive a captured graph, and frozen weights are cast once a pass.
    return torch.autocast(device.type, dtype, cache_enabled=False)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Plain float32 arithmetic in the block: no autocast, and neither TF32 nor bfloat16 products.

    The setting is global in torch: other threads also compute in plain float32 until the last block ends.
    """
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    backends = (cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)
    flags = [(backend, "fp32_precision", "ieee") for backend in backends]
    with holding(flags), torch.autocast(device.type, enabled=False):
        yield


def warn_if_slow(function: str, device: torch.device, precision: str) -> None:
    """Warn if networks in this type are slow on this CPU."""
    if not is_fast(device, precision):
        warnings.warn(
            f"{function}: networks in {precision} are much slower than in float32 on this CPU, for which torch has no "
            "fast kernels in that type; give precision='float32'",
            RuntimeWarning,
            stacklevel=2,
        )
