"""Every Triton kernel compiles for every architecture, within its registers and with 16-byte accesses. Needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# A multiprocessor has 65536 registers: at 80 it still holds 6 blocks of 128 threads, each with 8 elements a thread.
MAX_REGISTERS = {"pgd_step_linf_fwd_kernel": 40, "gated_elu_fwd_kernel": 56, "gated_elu_bwd_kernel": 80}


@pytest.mark.backend("triton")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_compiles(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("aot_triton.py")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == (1 + 3 + 3) * 3
    for row in rows:
        assert row["reg"] <= MAX_REGISTERS[row["kernel"]], row
        assert row["stack"] == row["local"] == 0, row
        assert row["widths"] == ["v4.b32"], row
