"""`python -m atop_fast.env`, the registry it reads, and the environment variables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atop_fast import env
from atop_fast.ops import _registry


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_report_covers_versions_and_owners():
    report = env.report()
    assert report["Versions"]["torch"] == torch.__version__
    every = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    named = {name for namespace, _, name in every if namespace == "atop_fast"}
    # resize is no op with kernels of its own: it is resample with matrices that it makes.
    assert set(report["Owner of each op"]) == named - {"resize", "resize_bwd"}


def test_prints_aligned_text(capsys):
    assert env.main() == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    column = lines[0].index(lines[0].split()[1])
    assert all(line[column - 1] == " " != line[column] for line in lines)


def test_absence_has_a_reason():
    for backend in ("cpp", "cuda", "triton"):
        if backend not in _registry.impls("gated") and torch.cuda.is_available():
            assert _registry.MISSING[backend]


def test_owner_is_what_the_dispatcher_says():
    # random_bits is for GPUs.
    for name in _registry.OPS.keys() - {"random_bits"}:
        assert _registry.owner(name, "cpu") == ("eager" if "cpp" in _registry.MISSING else "cpp")
    assert _registry.owner("random_bits", "cpu") == "eager"


def test_build_info_and_cpu_features():
    module = _registry.native_module()
    if module is None:
        pytest.skip("no native build")
    assert {"compiler", "torch", "flags", "cuda", "arch_list", "note", "debug"} == set(module.build_info())
    assert module.cpu_features()["level"] in ("baseline", "x86-64-v3", "x86-64-v4")


def test_host_sides_are_in_one_folder():
    """Loops know neither tensors nor the dispatcher, whether or not there is a CUDA kernel beside them."""
    csrc = Path(__file__).parent.parent / "csrc"
    registered = {path for path in csrc.rglob("*.c*") if "STABLE_TORCH_LIBRARY_IMPL" in path.read_text()}
    assert registered == set((csrc / "ops").iterdir())
    loops = [path for folder in ("cpu", "cuda", "math") for path in (csrc / folder).iterdir()]
    of_torch = re.compile(r'#include [<"](torch/|common/(tensors|checks)\.h)')
    assert not [path for path in loops if of_torch.search(path.read_text())]


@pytest.mark.slow
def test_backend_eager_loads_nothing_native():
    done = python("-m", "atop_fast.env", ATOP_FAST_BACKEND="eager")
    assert done.returncode == 0, done.stderr
    assert "cpu: eager, cuda: eager" in done.stdout
    assert "cpp" not in done.stdout.partition("Missing")[0].partition("Owner")[2]


@pytest.mark.slow
def test_unknown_backend_is_an_error():
    done = python("-c", "import atop_fast", ATOP_FAST_BACKEND="fast")
    assert done.returncode != 0
    assert "ATOP_FAST_BACKEND must be one of 'auto', 'eager', got 'fast'" in done.stderr


@pytest.mark.slow
def test_import_is_light_and_imports_no_kernels():
    done = python("-c", "import atop_fast.ops, sys; print({'triton', 'kernels'} & set(sys.modules))")
    # torch itself may import triton; atop_fast must not.
    torch_alone = python("-c", "import torch, sys; print({'triton', 'kernels'} & set(sys.modules))")
    assert done.stdout == torch_alone.stdout, done.stderr


def test_a_broken_library_is_reported(tmp_path, monkeypatch):
    broken = tmp_path / "ops" / "_registry.py"
    broken.parent.mkdir()
    (tmp_path / "_ops_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(_registry, "__file__", str(broken))
    monkeypatch.setattr(_registry, "MISSING", {})
    _registry._load_library("cpp", "_ops_cpu.so", "absent")
    assert "_ops_cpu.so does not load" in _registry.MISSING["cpp"]
