"""`python -m atop_fast.env`: versions, the native build, the backend of each op, and why a backend is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from ._core.precision import PRECISIONS, is_fast
from ._core.threads import busy_cores, cure, spinning
from .ops import _registry

PACKAGES = ("torch", "torchvision", "triton", "numpy", "safetensors")


def report() -> dict[str, dict[str, str]]:
    """A description of this installation, as sections of (name, value)."""
    return {
        "Versions": _versions(),
        "Native build": _build(),
        "Devices": _devices(),
        "Owner of each op": {
            name: ", ".join(f"{device}: {_registry.owner(name, device)}" for device in ("cpu", "cuda"))
            for name in sorted(_registry.OPS)
        },
        "Missing": dict(_registry.MISSING) or {"nothing": "every backend is here"},
    }


def main() -> int:
    """Print the report as aligned text."""
    sections = report()
    width = max(len(name) for section in sections.values() for name in section)
    print("\n\n".join(_section(title, values, width) for title, values in sections.items()))
    return 0


def cpu_model() -> str:
    """The name of the processor, as reported by the system."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _section(title: str, values: dict[str, str], width: int) -> str:
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in values.items())])


def _versions() -> dict[str, str]:
    versions = {"atop-fast": _version("atop-fast"), "python": platform.python_version()}
    versions.update({package: _version(package) for package in PACKAGES})
    versions["torch"] = torch.__version__
    versions["CUDA of torch"] = torch.version.cuda or "none"
    return versions


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _build() -> dict[str, str]:
    info = _registry.build_info()
    if info is None:
        return {"native code": "not built; eager and Triton serve (see ATOP_FAST_BUILD in docs/ENV.md)"}
    cuda = f"CUDA {info['cuda']}, arch {info['arch_list']}" if info["cuda"] else f"no CUDA: {info['note']}"
    return {
        "compiler": info["compiler"],
        "flags": info["flags"],
        "built with torch": info["torch"],
        "libraries": "CPU, " + cuda,
    }


def _devices() -> dict[str, str]:
    threads = f"{torch.get_num_threads()}, which {'spin' if spinning() else 'sleep'} while they wait"
    devices = {"CPU": cpu_model(), "threads": threads, "load": _load()}
    if module := _registry.native_module():
        features: dict[str, Any] = module.cpu_features()
        level = features.pop("level")
        names = " ".join(name for name, present in features.items() if present)
        devices["SIMD"] = f"kernels for {level}" + (f" ({names})" if names else "")
    slow = [name for name in PRECISIONS if not is_fast(torch.device("cpu"), name)]
    devices["networks"] = f"slow on the CPU in {', '.join(slow)}" if slow else "fast on the CPU in 16 bits, too"
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        devices[f"GPU {i}"] = f"{properties.name}, {properties.major}.{properties.minor}, {memory}"
    if not torch.cuda.is_available():
        devices["GPU"] = "none visible"
    return devices


def _load() -> str:
    busy, cores, threads = busy_cores(), os.cpu_count() or 1, torch.get_num_threads()
    if busy is None:
        return "unknown"
    text = f"{busy:.1f} of {cores} cores are busy with other work"
    return f"{text}: {cure()}" if 1 < threads > cores - busy + 0.3 and spinning() else text


if __name__ == "__main__":
    sys.exit(main())
