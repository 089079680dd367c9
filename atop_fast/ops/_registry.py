"""The registry of ops: their definitions, the available backends, and the backend that the dispatcher calls.

An op is defined once, in Python, so that it exists regardless of what was compiled. Its reference implementation serves
every device without a kernel and is also the fake. The C++ and CUDA libraries register their kernels when they are
loaded; Triton takes the CUDA key of ops that still have no kernel there. `owners.json` holds the exceptions from this
order, as measured (benchmarks/owners.py). From then on, the dispatcher chooses.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._core.checks import message

NAMESPACE = "atop_fast"
BACKENDS = ("eager", "cpp", "triton", "cuda")
# The backends with kernels for each device, in the order in which they own ops.
KERNELS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
# The exceptions from this order that were measured.
EXCEPTIONS = Path(__file__).parent / "owners.json"

# The registrations live as long as this object does.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Op:
    """One op: its overload, and its reference and the launcher of its Triton kernel, if any, both behind its check."""

    overload: Any
    reference: Callable[..., Any]
    launcher: Callable[..., Any] | None


OPS: dict[str, Op] = {}
# Reasons why backends are missing; filled by `load`.
MISSING: dict[str, str] = {}
# The backends that were registered over the dispatcher's own kernel, by op and device, and native kernels below them.
OVERRIDES: dict[tuple[str, str], str] = {}
_COVERED: dict[tuple[str, str], Any] = {}


def define(
    schema: str, reference: Callable[..., Any], *, check: Callable[..., None] | None, kernels: str | None
) -> Any:
    """Define an op by `schema`, with `reference` as fallback kernel and fake, and return its overload.

    `check(name, *arguments)` raises unless the op takes the arguments. It precedes the reference and Triton's launcher;
    native code has checks of its own, with the same messages. None is for ops whose only caller makes the arguments.
    The launcher is `launch_<op>` in `atop_fast.kernels.<kernels>`. None means that the op has no GPU kernels, so that
    the reference serves there.
    """
    name = schema.partition("(")[0]

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            if check is not None:
                check(name, *arguments)
            return function(*arguments)

        return run

    def launch(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{NAMESPACE}.kernels.{kernels}"), f"launch_{name}")(*arguments)

    LIBRARY.define(schema)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    OPS[name] = Op(overload, checked(reference), checked(launch) if kernels else None)
    LIBRARY.impl(name, OPS[name].reference, "CompositeExplicitAutograd")
    return overload


def forbid_double_backward(name: str) -> None:
    """Make differentiating the backward op `name` an error; without a formula, the result would be silently wrong."""
    forward = name.partition("_bwd")[0]

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{forward}: double backward is not supported")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=LIBRARY)


def load() -> None:
    """Load the native libraries and register Triton, once all ops are defined; fills `MISSING`."""
    choice = os.environ.get("ATOP_FAST_BACKEND") or "auto"
    if choice not in ("auto", "eager"):
        raise ValueError(f"atop_fast: ATOP_FAST_BACKEND must be one of 'auto', 'eager', got {choice!r}")
    if choice == "eager":
        MISSING.update(dict.fromkeys(("cpp", "cuda", "triton"), "ATOP_FAST_BACKEND=eager"))
        return
    _load_library("cpp", "_ops_cpu.so", "not built (see ATOP_FAST_BUILD in docs/ENV.md)")
    if torch.version.cuda is None:
        MISSING["cuda"] = "this torch has no CUDA"
    else:
        _load_library("cuda", "_ops_cuda.so", (build_info() or {}).get("note") or "not built (see docs/ENV.md)")
    if importlib.util.find_spec("triton") is None:
        MISSING["triton"] = "triton is not installed"
    elif torch.version.cuda:
        for name, op in OPS.items():
            if op.launcher and not _has_kernel(name, "CUDA"):
                LIBRARY.impl(name, op.launcher, "CUDA")
    document = json.loads(EXCEPTIONS.read_text(encoding="utf-8"))
    prefer({device: part["owners"] for device, part in document.items()}, LIBRARY)


def prefer(owners: Mapping[str, Mapping[str, str]], library: torch.library.Library) -> None:
    """Give ops the owners {device: {op: backend}} as long as `library` lives; backends that are missing are ignored.

    Raises:
        ValueError: `owners` names an unknown device, op or backend.
    """
    for device, chosen in owners.items():
        for name, backend in chosen.items():
            if device not in KERNELS or name not in OPS or backend not in ("eager", *KERNELS[device]):
                given = f"{backend!r} for {name!r} on {device!r}"
                raise ValueError(message("atop_fast", EXCEPTIONS.name, "backends by device and op", given))
            if (device == "cpu" or torch.version.cuda) and _implementation(name, backend):
                _override(name, backend, device, library)


def build_info() -> dict[str, Any] | None:
    """How the native code was built, or None if there is none."""
    return None if (module := native_module()) is None else module.build_info()


def native_module() -> Any:
    """The pybind11 module `atop_fast._C`, or None if it was not built."""
    try:
        return importlib.import_module(f"{NAMESPACE}._C")
    except ModuleNotFoundError:
        return None


def impls(name: str) -> dict[str, Callable[..., Any]]:
    """The implementations of op `name` that can run on this machine, by backend, for tests and benchmarks.

    They bypass the dispatcher's choice and autograd. "cpp" takes CPU tensors and "cuda" CUDA tensors; "triton" takes
    CUDA tensors, or CPU tensors in the interpreter (TRITON_INTERPRET=1).
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    usable = {"triton": torch.cuda.is_available() or interpreted, "cuda": torch.cuda.is_available()}
    found = {backend: _implementation(name, backend) for backend in BACKENDS if usable.get(backend, True)}
    return {backend: function for backend, function in found.items() if function is not None}


def owner(name: str, device: str) -> str:
    """The backend that the dispatcher calls for op `name` on `device` ("cpu" or "cuda"), as it reports itself."""
    if (name, device) in OVERRIDES:
        return OVERRIDES[name, device]
    if not _has_kernel(name, device.upper()):
        return "eager"
    return KERNELS[device][0] if _is_native(name, device) else "triton"


@contextlib.contextmanager
def owned_by(backend: str, names: Sequence[str], device: str) -> Iterator[None]:
    """Make the dispatcher call `backend` for the ops `names` on `device` in the block; for tests and benchmarks."""
    library, before = torch.library.Library(NAMESPACE, "IMPL"), OVERRIDES.copy()
    try:
        for name in names:
            _override(name, backend, device, library)
        yield
    finally:
        library._destroy()
        OVERRIDES.clear()
        OVERRIDES.update(before)


def _override(name: str, backend: str, device: str, library: torch.library.Library) -> None:
    """Register a backend over the dispatcher's kernel, unless it owns the op."""
    if owner(name, device) == backend:
        return
    function = _implementation(name, backend)
    if function is None:
        raise ValueError(message("atop_fast", "backend", f"one that implements {name}", backend))
    if _is_native(name, device) and (name, device) not in OVERRIDES:
        _COVERED[name, device] = torch.library.get_kernel(OPS[name].overload, device.upper())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about replaced kernels, which is the intention here
        library.impl(name, function, device.upper(), allow_override=True)
    OVERRIDES[name, device] = backend


def _implementation(name: str, backend: str) -> Callable[..., Any] | None:
    """A backend's implementation of an op, or None if there is none in this installation."""
    if backend == "eager":
        return OPS[name].reference
    if backend in MISSING:
        return None
    if backend == "triton":
        return OPS[name].launcher
    device = "cpu" if backend == "cpp" else "cuda"
    return functools.partial(_call_native, name, device) if _is_native(name, device) else None


def _call_native(name: str, device: str, *arguments: Any) -> Any:
    """Call the native kernel, whatever was registered over it."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.upper()))
    if (name, device) in OVERRIDES:
        return _COVERED[name, device].call_boxed(keys, *arguments)
    return OPS[name].overload.redispatch(keys, *arguments)


def _load_library(backend: str, file: str, absent: str) -> None:
    path = Path(__file__).parent.parent / file
    if not path.is_file():
        MISSING[backend] = absent
        return
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        MISSING[backend] = f"{file} does not load: {error}"


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def _is_native(name: str, device: str) -> bool:
    """Whether a native library has registered a kernel, be it the one that the dispatcher calls or one below it."""
    entries = torch._C._dispatch_dump(f"{NAMESPACE}::{name}")
    return bool(re.search(rf"^{device.upper()}(?: \(inactive\))?: registered at \S+\.cpp:\d+", entries, re.MULTILINE))
