"""Compiles every Triton kernel ahead of time and prints registers, stack and access widths as JSON.

A program of its own, as Triton decides when a kernel is defined whether to interpret it.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atop_fast.kernels._launch import BLOCK, EXACT, GATHER_BLOCK, NUM_WARPS
from atop_fast.kernels._steps import NORM_BLOCK, NORM_WARPS
from atop_fast.kernels.attack_loss import MAX_CLASSES, MIN_BLOCK
from atop_fast.kernels.contextual_attention import ROW_TILE, ROW_WARPS
from atop_fast.kernels.contextual_attention import TILE as TILE_OF_DIAGONALS
from atop_fast.kernels.gated import TILE as TILE_OF_SUMS
from atop_fast.kernels.mask_blocks import TILE

FLOATS = ("fp32", "bf16", "fp16")
FP32 = FLOATS[:1]
# The key of the randomness, and what corrupt reads: its numbers follow the pointers of its outputs.
KEY = "*i64 *i64 *i64"
CORRUPT = f"*u8 *fp32 {KEY}"
# Arguments of attack_loss: inputs and outputs, without and with targets; then its kind and its columns.
LOSS, TARGETED = (f"*T *i64 {targets} *fp32 *fp32 *i8 i32 i32" for targets in ("=None", "*i64"))
# How a projected step gets two of its numbers, its draws, and the length of a sample; what it reads, writes and sums.
STEP = "fp32 =None i fp32 =None i =1 i i"
STEPS = "fp32 *fp32 i32 fp32 *fp32 i32 =4 i i"
SCRATCH = "*T *T *T *T *fp32"

# case: kernel, its arguments in order, its block, storage types; "T" is the storage type, "i" an integer divisible by
# 16, "i32" any other and "=x" the constant x. Exact kernels are compiled as they are launched.
CASES = {
    "pgd_step_linf": ("pgd_step_linf.pgd_step_linf_fwd_kernel", f"*T *T *T *T {STEP}", BLOCK, ("fp32",)),
    # Four draws, and numbers of every sample.
    "pgd_step_linf draws": ("pgd_step_linf.pgd_step_linf_fwd_kernel", f"*T *T *T *T {STEPS}", BLOCK, ("fp32",)),
    "apgd_step_linf": (
        "apgd_step_linf.apgd_step_linf_fwd_kernel",
        f"*T *T *T *T *T fp32 =None i {STEP}",
        BLOCK,
        ("fp32",),
    ),
    # A sample of one block; the first launch, with draws, and the last of one of many.
    "pgd_step_l2": ("pgd_step_l2.pgd_step_l2_fwd_kernel", f"*T *T *T *T =None =None {STEP} =-1", NORM_BLOCK, ("fp32",)),
    "pgd_step_l2 first": ("pgd_step_l2.pgd_step_l2_fwd_kernel", f"{SCRATCH} *T {STEPS} =0", NORM_BLOCK, ("fp32",)),
    "pgd_step_l2 last": ("pgd_step_l2.pgd_step_l2_fwd_kernel", f"{SCRATCH} =None {STEP} =2", NORM_BLOCK, ("fp32",)),
    "apgd_step_l2": (
        "apgd_step_l2.apgd_step_l2_fwd_kernel",
        f"*T *T *T *T *T =None =None fp32 =None i {STEP} =-1",
        NORM_BLOCK,
        ("fp32",),
    ),
    "apgd_step_l2 last": (
        "apgd_step_l2.apgd_step_l2_fwd_kernel",
        f"*T {SCRATCH} =None fp32 =None i {STEP} =3",
        NORM_BLOCK,
        ("fp32",),
    ),
    "gated": ("gated.gated_fwd_kernel", "*T =None *T i =1 i i =False =False =True", BLOCK, FLOATS),
    "gated bias": ("gated.gated_fwd_kernel", "*T *fp32 *T i i i i =False =False =True", BLOCK, FLOATS[:2]),
    "gated channels_last": ("gated.gated_fwd_kernel", "*T *fp32 *T i =1 i i =False =True =True", BLOCK, FLOATS[:2]),
    "gated relu": ("gated.gated_fwd_kernel", "*T =None *T i =1 i i =False =False =False", BLOCK, ("fp32",)),
    "gated_bwd": ("gated.gated_bwd_kernel", "*T *T =None *T i =1 i i =False =False =True", BLOCK, FLOATS),
    "gated_bwd bias": ("gated.gated_bwd_kernel", "*T *T *fp32 *T i =1 i i =False =True =True", BLOCK, ("bf16",)),
    "gated_bwd db": (
        "gated.gated_sums_kernel",
        "*T *T *fp32 *T *fp32 i i i32 i =False =True =1",
        TILE_OF_SUMS,
        FLOATS[:2],
    ),
    "gated_bwd db channels_last": (
        "gated.gated_sums_kernel",
        "*T *T *fp32 *T *fp32 i i i32 i32 =True =True =16",
        TILE_OF_SUMS,
        FLOATS[:2],
    ),
    "attack_loss": ("attack_loss.attack_loss_kernel", f"{LOSS} =0 =1024", BLOCK, FLOATS),
    "attack_loss few classes": ("attack_loss.attack_loss_kernel", f"{LOSS} =0 =16", MIN_BLOCK, ("fp32",)),
    "attack_loss margin": ("attack_loss.attack_loss_kernel", f"{LOSS} =1 =1024", BLOCK, ("fp32",)),
    "attack_loss dlr": ("attack_loss.attack_loss_kernel", f"{LOSS} =2 =16", MIN_BLOCK, ("fp32",)),
    "attack_loss targets": ("attack_loss.attack_loss_kernel", f"{TARGETED} =2 =1024", BLOCK, ("fp32",)),
    "attack_loss pm": ("attack_loss.attack_loss_kernel", f"{LOSS} =3 =1024", BLOCK, ("fp32",)),
    "attack_loss pm targets": ("attack_loss.attack_loss_kernel", f"{TARGETED} =3 =16", MIN_BLOCK, ("fp32",)),
    "attack_loss most classes": ("attack_loss.attack_loss_kernel", f"{TARGETED} =2 =4096", MAX_CLASSES, ("fp32",)),
    # The scores, a share of pasted weights, and their gradient, at 32 x 32 places.
    "diagonals": (
        "contextual_attention.diagonals_kernel",
        "*T *T *T i i i32 i32 =3 =False =16",
        TILE_OF_DIAGONALS,
        FP32,
    ),
    "diagonals four": (
        "contextual_attention.diagonals_kernel",
        "*T =None *T i i i32 i32 =2 =False =16",
        TILE_OF_DIAGONALS,
        FP32,
    ),
    "diagonals added": (
        "contextual_attention.diagonals_kernel",
        "*T =None *T i i i32 i32 =2 =True =16",
        TILE_OF_DIAGONALS,
        FP32,
    ),
    "weigh": ("contextual_attention.weigh_fwd_kernel", "*T *u8 *T i i =True =2", ROW_TILE, FP32),
    # Rows of more than 2048 places.
    "weigh parts": ("contextual_attention.weigh_fwd_kernel", "*T *u8 *T i i =False =1", ROW_TILE, FP32),
    "weigh_bwd": ("contextual_attention.weigh_bwd_kernel", "*T *T i i =2", ROW_TILE, FP32),
    "fuse_bwd": ("contextual_attention.fuse_bwd_kernel", "*T *T *T *T *T i i =16", TILE_OF_DIAGONALS, FP32),
    # COUNT is divisible by 4, and is not.
    "random_normal": ("random_normal.random_normal_kernel", f"{KEY} *T i32 i32 i32 =True", BLOCK, ("fp32",)),
    "random_normal any": ("random_normal.random_normal_kernel", f"{KEY} *T i32 i32 i32 =False", BLOCK, ("fp32",)),
    "random_bits": ("random_bits.random_bits_kernel", f"{KEY} *i64 i32 i32 i32", BLOCK, ("fp32",)),
    "mask_blocks": ("mask_blocks.mask_blocks_kernel", f"{KEY} *i64 *u8 i32 i32 i32 i32 i =8", TILE, ("fp32",)),
    "assemble": ("assemble.assemble_fwd_kernel", "*T *u8 *T i32 i32 i i =3 =8 =False", BLOCK, FLOATS[:2]),
    "assemble_bwd": ("assemble.assemble_bwd_kernel", "*T *u8 *T i32 i i =3 =4 =8 =False", BLOCK, FLOATS[:2]),
    "corrupt": (
        "corrupt.corrupt_fwd_kernel",
        f"*T {CORRUPT} *T *u8 i32 i32 i32 i32 i i i i =3 =1 =8 =8 =False =False",
        BLOCK,
        FLOATS[:2],
    ),
    # Four copies, nothing saved.
    "corrupt copies": (
        "corrupt.corrupt_fwd_kernel",
        f"*T {CORRUPT} *T =None i32 i32 i32 i32 i i i i =3 =4 =8 =8 =False =False",
        BLOCK,
        ("bf16",),
    ),
    # Blocks of 7 pixels.
    "corrupt odd blocks": (
        "corrupt.corrupt_fwd_kernel",
        f"*T {CORRUPT} *T *u8 i32 i32 i32 i32 i32 i32 i32 i32 =3 =1 =1 =4 =False =False",
        BLOCK,
        ("fp32",),
    ),
    # Any size.
    "corrupt any": (
        "corrupt.corrupt_fwd_kernel",
        f"*T {CORRUPT} *T *u8 i32 i32 i32 i32 i32 i32 i32 i32 =3 =1 =1 =1 =False =False",
        BLOCK,
        ("fp32",),
    ),
    "corrupt channels_last": (
        "corrupt.corrupt_fwd_kernel",
        f"*T {CORRUPT} *T *u8 i32 i32 i32 i32 i i i i =3 =1 =8 =8 =False =True",
        BLOCK,
        ("bf16",),
    ),
    "corrupt resized": (
        "corrupt.corrupt_fwd_kernel",
        f"*u8 {CORRUPT} *T *u8 i32 i32 i32 i32 i i i i =3 =1 =8 =8 =True =False",
        GATHER_BLOCK,
        ("fp32",),
    ),
    "corrupt_live": (
        "corrupt.corrupt_fwd_kernel",
        f"*T {CORRUPT} =None *u8 i32 i32 i32 i32 i i i i =3 =1 =8 =8 =False =False",
        BLOCK,
        ("fp32",),
    ),
    "corrupt_bwd": ("corrupt.corrupt_bwd_kernel", "*T *u8 *u8 *T i32 i i =3 =4 =8 =8 =False", BLOCK, FLOATS[:2]),
    "resample": (
        "resample.resample_kernel",
        "*T *i64 *fp32 *i64 *fp32 *T i32 i32 i32 i i i i i =2 =2 =False =False",
        GATHER_BLOCK,
        FLOATS[:2],
    ),
    # As the gradient of a magnification.
    "resample rows first": (
        "resample.resample_kernel",
        "*T *i64 *fp32 *i64 *fp32 *T i32 i32 i32 i i i i i =4 =4 =False =True",
        GATHER_BLOCK,
        ("fp32",),
    ),
}
# Kernels without bitwise guarantees contract multiplications with additions.
CONTRACTED = ("attack_loss", "contextual_attention", "gated")
ARCHS = (80, 90, 100)


def main() -> None:
    for case, (path, arguments, block, dtypes) in CASES.items():
        module, name = path.split(".")
        kernel = getattr(importlib.import_module(f"atop_fast.kernels.{module}"), name)
        # attack_loss has blocks as large, but is launched with the usual warps.
        warps = NORM_WARPS if block == NORM_BLOCK and "_l2" in name else NUM_WARPS
        warps = ROW_WARPS if name.startswith("weigh_") else warps
        options = {"num_warps": warps, **({} if module in CONTRACTED else EXACT)}
        for dtype in dtypes:
            source = _source(kernel, [*arguments.split(), f"={block}"], dtype)
            for arch in ARCHS:
                built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
                ptx = built.asm["ptx"]
                row = {"case": case, "dtype": dtype, "arch": arch, "loads": _widths("ld", ptx)}
                row |= {"stores": _widths("st", ptx), "fma": ptx.count("fma.rn"), **_usage(built.asm["cubin"])}
                print(json.dumps(row))


def _source(kernel, arguments, dtype):
    signature, constants, attributes = {}, {}, {}
    for i, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=True)):
        if argument.startswith("="):
            signature[name] = "constexpr"
            constants[(i,)] = ast.literal_eval(argument[1:])
        else:
            signature[name] = {"*T": f"*{dtype}", "i": "i32"}.get(argument, argument)
            if argument == "i" or argument.startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _widths(access: str, ptx: str) -> list[str]:
    """The widths of the loads from global memory, or of the stores to it."""
    return sorted(set(re.findall(rf"{access}\.global(?:\.\w+)*?\.(v\d\.b\d+|b\d+)\b", ptx)))


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
