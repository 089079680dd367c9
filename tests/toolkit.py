"""The CUDA toolkit of this machine."""

from __future__ import annotations

import os
import shutil


def nvcc() -> str | None:
    """The CUDA compiler, in CUDA_HOME, its usual place, or on PATH."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    usual = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    return next((path for path in usual if os.path.isfile(path)), shutil.which("nvcc"))
