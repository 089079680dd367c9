"""Every .cu compiles for every architecture, within its registers and without spills. Needs nvcc, but no GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from toolkit import nvcc

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Six blocks of 256 threads still fit a multiprocessor: 65536 / (256 * 40).
MAX_REGISTERS = 40
# Of sources that do more in a thread; float64 takes the most, the other types of corrupt 64 on sm_90 and 80 on sm_100;
# where gated sums gradients, three blocks share a multiprocessor.
MORE_REGISTERS = {"assemble": 48, "attack_loss": 48, "corrupt": 90, "gated": 80, "resample": 48}
# The loops over draws, at four blocks and more; and the formulas between norms, at two: 90 registers in float32.
MORE_REGISTERS |= {"pgd_step_linf": 64, "apgd_step_linf": 64, "pgd_step_l2": 128, "apgd_step_l2": 128}
# Limits of single kernels: the odds of attack_loss take 76 in float64 and at most 51 in other types, at three blocks.
KERNELS = {"launch_odds_kernel": 80}


@pytest.mark.slow
@pytest.mark.backend("nvcc")
@pytest.mark.skipif(nvcc() is None, reason="no CUDA toolkit")
@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles(source, arch, tmp_path):
    command = [nvcc(), "-c", "-O3", "--fmad=false", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"]
    command += ["-std=c++17", f"-I{ROOT / 'csrc'}", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    registers = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", done.stderr, re.DOTALL)
    assert registers, f"ptxas reported no kernel:\n{done.stderr}"
    for kernel, used in registers:
        own = [limit for name, limit in KERNELS.items() if name in kernel]
        assert int(used) <= (own or [MORE_REGISTERS.get(source.stem, MAX_REGISTERS)])[0], done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(frames) == len(registers)
    assert set(frames) == {("0", "0", "0")}, done.stderr
