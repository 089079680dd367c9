"""Compiles every Triton kernel ahead of time and prints registers, stack and access widths as JSON.

A program of its own, as Triton decides when a kernel is defined whether to interpret it.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atop_fast.kernels._launch import BLOCK, NUM_WARPS

# kernel: module, then its arguments in order; "T" is the storage type, "i" an integer divisible by 16.
KERNELS = {
    "pgd_step_linf_fwd_kernel": ("pgd_step_linf", "*T *T *T *T fp32 fp32 i", ("fp32",)),
    "gated_elu_fwd_kernel": ("gated_elu", "*T *T i i flag", ("fp32", "bf16", "fp16")),
    "gated_elu_bwd_kernel": ("gated_elu", "*T *T *T i i flag", ("fp32", "bf16", "fp16")),
}
ARCHS = (80, 90, 100)


def main() -> None:
    for name, (module, arguments, dtypes) in KERNELS.items():
        kernel = getattr(importlib.import_module(f"atop_fast.kernels.{module}"), name)
        for dtype in dtypes:
            source = _source(kernel, arguments.split(), dtype)
            for arch in ARCHS:
                built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": NUM_WARPS})
                widths = sorted(set(re.findall(r"(?:ld|st)\.global(?:\.\w+)*?\.(v\d\.b\d+|b\d+)\b", built.asm["ptx"])))
                row = {"kernel": name, "dtype": dtype, "arch": arch, "widths": widths, **_usage(built.asm["cubin"])}
                print(json.dumps(row))


def _source(kernel, arguments, dtype):
    signature, constants, attributes = {}, {}, {}
    for i, (name, argument) in enumerate(zip(kernel.arg_names, [*arguments, "block"], strict=True)):
        if argument in ("flag", "block"):
            signature[name] = "constexpr"
            constants[(i,)] = BLOCK if argument == "block" else False
        elif argument == "i" or argument.startswith("*"):
            signature[name] = "i32" if argument == "i" else f"*{dtype}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = argument
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL")}


if __name__ == "__main__":
    main()
