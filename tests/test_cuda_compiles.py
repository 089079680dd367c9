"""Every .cu compiles for every architecture, within its registers and without spills. Needs nvcc, but no GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from toolkit import cuobjdump, nvcc

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
# Six blocks of 256 threads still fit a multiprocessor: 65536 / (256 * 40).
MAX_REGISTERS = 40
# Limits of sources with more work per thread; float64 takes the most, the other types of corrupt 64 on sm_90 and 80 on
# sm_100; the kernel of gated that sums gradients has three blocks per multiprocessor.
MORE_REGISTERS = {"assemble": 48, "attack_loss": 48, "corrupt": 90, "gated": 80, "resample": 48}
# The loops over draws, at four blocks and more; and the formulas between norms, in float64 at two.
MORE_REGISTERS |= {"pgd_step_linf": 64, "apgd_step_linf": 64, "pgd_step_l2": 128, "apgd_step_l2": 128}
# Sources whose kernels store packs of 16 bytes, wherever their template has a width above 1.
PACKED = {"apgd_step_l2", "apgd_step_linf", "assemble", "gated", "pgd_step_l2", "pgd_step_linf"}
# Limits of single kernels: the odds of attack_loss take 76 in float64 and at most 51 in other types, at three blocks.
# In float32, the formulas between norms have three blocks, too.
KERNELS = {"launch_odds_kernel": 80, "StepL2IfE": 80}


@pytest.mark.slow
@pytest.mark.backend("nvcc")
@pytest.mark.skipif(nvcc() is None, reason="no CUDA toolkit")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles(source, tmp_path):
    command = [nvcc(), "-c", "-O3", "--fmad=false", "-Xptxas=-v", "-std=c++17", f"-I{ROOT / 'csrc'}"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    done = subprocess.run([*command, source, "-o", tmp_path / "out.o"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernel = r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?Used (\d+) registers"
    registers = re.findall(kernel, done.stderr, re.DOTALL)
    kernels = [{name for name, other, _ in registers if other == arch} for arch in ARCHITECTURES]
    assert kernels[0], f"ptxas reported no kernel:\n{done.stderr}"
    assert kernels[1:] == kernels[:-1]
    for kernel, _, used in registers:
        own = [limit for name, limit in KERNELS.items() if name in kernel]
        assert int(used) <= (own or [MORE_REGISTERS.get(source.stem, MAX_REGISTERS)])[0], done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(frames) == len(registers)
    assert set(frames) == {("0", "0", "0")}, done.stderr
    if source.stem in PACKED and (tool := cuobjdump()):
        command = [tool, "--dump-sass", "--gpu-architecture=sm_90", tmp_path / "out.o"]
        listing = subprocess.run(command, capture_output=True, text=True, check=True)
        packed = {name: body for name, body in functions(listing.stdout) if re.search(r"Li[248]E", name)}
        assert packed
        for name, body in packed.items():
            for access in ("LDG", "STG"):
                assert re.search(rf"{access}\.E\S*\.128", body), f"{name} has no {access} of 16 bytes"
            # 8 values of f and of g, 4 biases a load.
            if source.stem == "gated" and "Li8E" in name:
                assert len(re.findall(r"LDG\.E\S*\.128", body)) >= 6, f"{name} loads biases one by one"


def functions(listing):
    """The names and code of the kernels in a listing of cuobjdump."""
    parts = re.split(r"^\s*Function : (\w+)$", listing, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))
