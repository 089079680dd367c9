"""The contents of a wheel, its use outside the repository, and the refusals of setup.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

PARTS = ("atop_fast", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def run(*command, cwd, **environment):
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the build reads, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / part, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        target,
    ]
    done = run(*map(str, command), cwd=source, ATOP_FAST_BUILD="none")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = target.glob("*.whl")
    return path


def test_wheel_holds_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in ("atop_fast/__init__.py", "atop_fast/py.typed", "atop_fast/kernels/gated.py"):
        assert wanted in names
    for path in ROOT.glob("atop_fast/**/*"):
        if path.suffix in (".html", ".json", ".yaml", ".py"):
            assert path.relative_to(ROOT).as_posix() in names
    foreign = [name for name in names if not name.startswith(("atop_fast/", "atop_fast-"))]
    assert not foreign, f"top-level names beside atop_fast: {foreign}"


def test_wheel_works_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    done = run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    code = (
        "import sys, torch, atop_fast, atop_fast.ops as ops, atop_fast.kernels\n"
        "from atop_fast.ops import _registry\n"
        "x = torch.rand(2, 3)\n"
        "assert torch.equal(ops.pgd_step_linf(x, x, x, 0.1, 0.0), x)\n"
        "assert _registry.owner('gated', 'cpu') == 'eager', _registry.MISSING\n"
        "assert 'kernels' not in sys.modules\n"
        "print(atop_fast.__file__)\n"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(site)


def test_setup_says_why_nothing_is_built(source):
    done = run(sys.executable, "setup.py", "--version", cwd=source, ATOP_FAST_BUILD="none")
    assert done.returncode == 0, done.stderr
    assert "atop_fast: building no native code (ATOP_FAST_BUILD=none)" in done.stdout


def test_setup_refuses_unknown_values(source):
    done = run(sys.executable, "setup.py", "--version", cwd=source, ATOP_FAST_BUILD="fast")
    assert done.returncode != 0
    assert "ATOP_FAST_BUILD must be one of auto, local, cpu, cuda, none, got 'fast'" in done.stderr


def test_setup_refuses_what_it_cannot_build(source, tmp_path):
    """Without a compiler, an explicit request fails and the automatic choice falls back aloud."""
    empty = {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
    done = run(sys.executable, "setup.py", "--version", cwd=source, ATOP_FAST_BUILD="cpu", **empty)
    assert "ATOP_FAST_BUILD=cpu cannot be met: no C++ compiler found" in done.stderr
    done = run(sys.executable, "setup.py", "--version", cwd=source, ATOP_FAST_BUILD="auto", **empty)
    assert "building no native code (no C++ compiler found)" in done.stdout


@pytest.mark.skipif(shutil.which("g++") is None or torch.cuda.is_available(), reason="no compiler, or a GPU")
def test_setup_for_this_machine_builds_cuda_only_for_a_gpu(source):
    done = run(sys.executable, "setup.py", "--version", cwd=source, ATOP_FAST_BUILD="local")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("atop_fast: building"))
    assert line.startswith("atop_fast: building CPU, torch")
    assert "(no CUDA: " in line


def test_kernels_is_no_top_level_module():
    assert "kernels" not in sys.modules
