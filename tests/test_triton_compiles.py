"""Every Triton kernel compiles for every architecture, within its registers and with 16-byte accesses. Needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A multiprocessor has 65536 registers: at 80 it still holds 6 blocks of 128 threads, each with 8 elements a thread, and
# at 104 two of the 256 threads, each with 16, of a step with norms.
MAX_REGISTERS = {
    "pgd_step_linf": 40,
    "pgd_step_linf draws": 40,
    "apgd_step_linf": 48,
    "pgd_step_l2": 80,
    "pgd_step_l2 first": 64,
    "pgd_step_l2 last": 80,
    "apgd_step_l2": 104,
    "apgd_step_l2 last": 104,
    "gated": 56,
    "gated bias": 80,
    "gated channels_last": 80,
    "gated relu": 56,
    "gated_bwd": 80,
    "gated_bwd bias": 104,
    "gated_bwd db": 104,
    "gated_bwd db channels_last": 128,
    "attack_loss": 56,
    "attack_loss few classes": 56,
    "attack_loss margin": 48,
    "attack_loss dlr": 48,
    "attack_loss targets": 72,
    "attack_loss pm": 80,
    "attack_loss pm targets": 80,
    "attack_loss most classes": 144,
    "diagonals": 64,
    "diagonals four": 64,
    "diagonals added": 64,
    "weigh": 88,
    "weigh parts": 136,
    "weigh_bwd": 40,
    "fuse_bwd": 72,
    "random_normal": 32,
    "random_normal any": 56,
    "random_bits": 40,
    "mask_blocks": 40,
    "assemble": 32,
    "assemble_bwd": 40,
    "corrupt": 56,
    "corrupt copies": 48,
    "corrupt odd blocks": 72,
    "corrupt any": 104,
    "corrupt channels_last": 80,
    "corrupt resized": 64,
    "corrupt_live": 48,
    "corrupt_bwd": 64,
    "resample": 56,
    "resample rows first": 64,
}
ATTENTION = {"diagonals", "diagonals four", "diagonals added", "weigh", "weigh parts", "weigh_bwd", "fuse_bwd"}
LOSSES = {case for case in MAX_REGISTERS if "attack_loss" in case}
# Kernels whose adjacent elements are not contiguous, or do not fill 16 bytes.
NARROW_ANY = {
    *LOSSES,
    *ATTENTION,
    "random_normal any",
    "mask_blocks",
    "corrupt any",
    "corrupt channels_last",
    "resample",
    "resample rows first",
}
NARROW_LOADS = {*NARROW_ANY, "random_bits", "random_normal", "corrupt resized"}
# A block's sum is one number.
NARROW_STORES = {*NARROW_ANY, "corrupt_live", "pgd_step_l2 first", "gated_bwd db", "gated_bwd db channels_last"}
# All others have the same bits in every backend, hence contract no multiplication with an addition.
CONTRACTED = {*LOSSES, *ATTENTION, *(case for case in MAX_REGISTERS if case.startswith("gated"))}


@pytest.mark.slow
@pytest.mark.backend("triton")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_compiles(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("aot_triton.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["case"] for row in rows} == set(MAX_REGISTERS)
    assert len(rows) == (3 * 3 + 9 * 2 + 35) * 3
    for row in rows:
        case = row["case"]
        assert row["reg"] <= MAX_REGISTERS[case], row
        assert row["stack"] == row["local"] == 0, row
        assert case in CONTRACTED or row["fma"] == 0, row
        assert case in NARROW_LOADS or ("v4.b32" in row["loads"] and "b16" not in row["loads"]), row
        assert case in NARROW_STORES or not {"b16", "b32"}.intersection(row["stores"]), row
