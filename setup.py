"""Decides what native code to build, says so in one line, and builds it. docs/ENV.md lists the switches."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
# One build serves this torch and every later one.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]


def switch(name: str, choices: tuple[str, ...]) -> str:
    """An environment variable that must be one of `choices`; the first is the default."""
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        sys.exit(f"atop_fast: {name} must be one of {', '.join(choices)}, got {value!r}")
    return value


BUILD = switch("ATOP_FAST_BUILD", ("auto", "local", "cpu", "cuda", "none"))
DEBUG = switch("ATOP_FAST_DEBUG", ("0", "1")) == "1"


def cuda_toolkit() -> Path | None:
    """The folder of a usable toolkit; the nvcc on PATH may be a wrapper outside of it."""
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parent.parent]
    for home in (Path(guess) for guess in guesses if guess):
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file():
            return home
    return None


def no_native() -> str:
    """Why nothing can be compiled, or the empty string."""
    if BUILD == "none":
        return "ATOP_FAST_BUILD=none"
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None and shutil.which("g++") is None:
        return "no C++ compiler found"
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        return "ninja is missing"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is missing"
    return ""


def no_cuda(torch_cuda: str | None, toolkit: Path | None) -> str:
    """Why the CUDA library is not built, or the empty string."""
    if BUILD == "cpu":
        return "ATOP_FAST_BUILD=cpu"
    if torch_cuda is None:
        return "this torch has no CUDA"
    if toolkit is None:
        return "no CUDA toolkit in CUDA_HOME, /usr/local/cuda or on PATH"
    return ""


def native_extensions() -> dict:
    """The arguments of setup() that build the native code."""
    reason = no_native()
    if reason:
        if BUILD in ("cpu", "cuda"):
            sys.exit(f"atop_fast: ATOP_FAST_BUILD={BUILD} cannot be met: {reason}")
        print(f"atop_fast: building no native code ({reason}); eager and Triton will serve", flush=True)
        return {}
    toolkit = cuda_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit)  # read when torch.utils.cpp_extension is imported
    try:
        import torch
    except ImportError as error:
        sys.exit(f"atop_fast: torch must be installed first ({error}).\n"
                 "Install it, then run: pip install . --no-build-isolation")  # fmt: skip
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    reason = no_cuda(torch.version.cuda, toolkit)
    if not reason and BUILD == "local" and not torch.cuda.is_available():
        reason = "no GPU is visible here; ATOP_FAST_BUILD=auto builds it"
    if reason and BUILD == "cuda":
        sys.exit(f"atop_fast: ATOP_FAST_BUILD=cuda cannot be met: {reason}.\n"
                 "Check that torch.version.cuda is not None and that CUDA_HOME is a toolkit with bin/nvcc")  # fmt: skip

    class Build(BuildExtension):
        """Objects of one source for two libraries must not meet, and libraries without Python code need no ABI tag."""

        def build_extension(self, ext: Extension) -> None:
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name.rpartition(".")[2])
            super().build_extension(ext)
            self.build_temp = shared

        def get_ext_filename(self, name: str) -> str:
            return re.sub(r"(_ops_\w+)\..*", r"\1.so", super().get_ext_filename(name))

        def get_export_symbols(self, ext: Extension) -> list[str]:
            return ext.export_symbols

    arch_list = "" if reason else os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    what = "CPU" if reason else f"CPU+CUDA {torch.version.cuda}, arch {arch_list}"
    print(f"atop_fast: building {what}, torch {torch.__version__}" + (f" (no CUDA: {reason})" if reason else ""))
    sys.stdout.flush()

    # -ffp-contract=off: the same bits on every SIMD level. The rest does not change results.
    flags = ["-O0", "-g"] if DEBUG else ["-O3", "-g0"]
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
              f"-ffile-prefix-map={ROOT}/=", "-Wall", "-Wno-unknown-pragmas"]  # fmt: skip
    nvcc = ["-O3", "--fmad=false", "-Xcompiler", "-fvisibility=hidden"] + (["-g", "-lineinfo"] if DEBUG else [])
    headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.*h"))]

    def library(name: str, kind: type, patterns: list[str], macros: list[str], **options: object) -> Extension:
        sources = [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        args = {"cxx": [*flags, *macros], "nvcc": [*nvcc, *macros]}
        return kind(f"atop_fast.{name}", sources, include_dirs=[str(ROOT / "csrc")], extra_compile_args=args,
                    depends=headers, **options)  # fmt: skip

    texts = {"TORCH": torch.__version__, "FLAGS": " ".join(flags[:-3]), "CUDA": "" if reason else torch.version.cuda,
             "ARCHS": arch_list, "NOTE": reason}  # fmt: skip
    info = [f'-DATOP_{name}="{text}"' for name, text in texts.items()] + [f"-DATOP_DEBUG={int(DEBUG)}"]
    module = library("_C", CppExtension, ["csrc/module.cpp"], info)
    module.include_dirs.insert(0, pybind11.get_include())
    extensions = [module, library("_ops_cpu", CppExtension, ["csrc/ops/*.cpp", "csrc/cpu/*.cpp"], STABLE_ABI)]
    if not reason:
        macros = [*STABLE_ABI, "-DATOP_WITH_CUDA", "-DUSE_CUDA"]
        # Not all ops have CUDA kernels.
        host = [f"csrc/ops/{path.stem}.cpp" for path in ROOT.glob("csrc/cuda/*.cu")]
        extensions.append(library("_ops_cuda", CUDAExtension, [*sorted(host), "csrc/cuda/*.cu"], macros))
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build.with_options(use_ninja=True)}}


setup(
    packages=[*find_packages(include=["atop_fast*"]), "atop_fast.kernels"],
    package_dir={"atop_fast.kernels": "kernels"},
    package_data={"atop_fast": ["py.typed", "ops/owners.json", "**/*.html", "**/*.yaml", "weights/*.safetensors"]},
    include_package_data=False,
    **native_extensions(),
)
