"""Shared by all tests: the Triton interpreter, seeds, NaN-poisoned memory, and the count of tests by backend."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toolkit import nvcc

HAS_GPU = torch.cuda.is_available()
# Read when @triton.jit runs, so it must be set before any kernel is imported.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    with contextlib.suppress(ImportError):
        import triton_interpreter

        triton_interpreter.speed_up()
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A GPU would round the factors of convolutions to 10 bits (TF32), and tests compare float32 with specifications.
if HAS_GPU:
    for place in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
        place.fp32_precision = "ieee"
    # poisoned_memory asks for deterministic algorithms, without which cuBLAS refuses to multiply.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Several workers (pytest -n) share the processors. Tests that depend on threads set their number themselves.
if (WORKERS := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))

FLOORS = Path(__file__).parent / "floors.json"
# Bytes that a GPU must have for tests marked both gpu and slow.
LARGE = 64 * 10**9
COUNTED = ("eager", "cpp", "triton", "cuda", "nvcc")
executed: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("atop_fast")
    group.addoption(
        "--assert-counts",
        metavar="TIER",
        choices=list(json.loads(FLOORS.read_text())),
        help="fail if a backend ran fewer tests than floors.json says of this tier",
    )
    group.addoption("--require-backends", default="", help="comma-separated backends whose absence is an error")


def absent_backends() -> dict[str, str]:
    """The backends that cannot be tested on this machine, with the reason."""
    from atop_fast.ops import _registry

    absent = dict(_registry.MISSING)
    if not HAS_GPU:
        absent.setdefault("cuda", "no GPU")
    if nvcc() is None:
        absent["nvcc"] = "no CUDA toolkit"
    return absent


def gpu_memory() -> int:
    """Bytes of the first GPU."""
    return torch.cuda.get_device_properties(0).total_memory


def pytest_configure(config: pytest.Config) -> None:
    required = [name for name in config.getoption("--require-backends").split(",") if name]
    if unknown := set(required) - set(COUNTED):
        raise pytest.UsageError(f"--require-backends: unknown backend {', '.join(sorted(unknown))}")
    absent = absent_backends()
    if missing := [f"{name} ({absent[name]})" for name in required if name in absent]:
        raise pytest.UsageError(f"--require-backends: not here: {', '.join(missing)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        elif item.get_closest_marker("gpu") and item.get_closest_marker("slow") and gpu_memory() < LARGE:
            item.add_marker(pytest.mark.skip(reason="the GPU has less than 64 GB"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    marker = item.get_closest_marker("backend")
    if report.when == "call" and not report.skipped and marker:
        # Properties travel with the report from a worker to the process that counts.
        report.user_properties.append(("backend", marker.args[0]))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    executed.update(value for name, value in report.user_properties if name == "backend" and report.when == "call")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    absent = absent_backends()
    terminalreporter.section("tests executed by backend")
    for name in COUNTED:
        terminalreporter.line(f"{name:8}{executed[name]:5}" + (f"  absent: {absent[name]}" if name in absent else ""))
    for problem in _below_floor(terminalreporter.config):
        terminalreporter.line(f"ERROR: {problem}", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    if session.exitstatus == pytest.ExitCode.OK and _below_floor(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _below_floor(config: pytest.Config) -> list[str]:
    tier = config.getoption("--assert-counts")
    floors = json.loads(FLOORS.read_text())[tier] if tier else {}
    absent = absent_backends()
    return [
        f"{name}: {executed[name]} tests ran, the floor of {tier} in {FLOORS.name} is {floor}"
        for name, floor in floors.items()
        if name not in absent and executed[name] < floor
    ]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seeds all generators that other packages draw from, so that earlier tests do not matter."""
    random.seed(0)
    np.random.seed(0)
    # Without a GPU, torch.manual_seed formats a stack trace for later use, which takes longer than many a test.
    if HAS_GPU:
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_networks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a network of its module, or of models.py, in another mode or with other weights."""
    import models

    loaded = [load() for load in vars(models).values() if hasattr(load, "cache_info") and load.cache_info().currsize]
    values = [*vars(request.module).values(), *loaded]
    networks = [value for value in values if isinstance(value, torch.nn.Module)]
    before = _state(networks)
    yield
    assert _state(networks) == before, "a network that other tests share was changed"


def _state(networks: list[torch.nn.Module]) -> list[tuple[Any, ...]]:
    """The flags of all modules and parameters, and how often the values of each were written."""
    modules = [module for network in networks for module in network.modules()]
    parameters = [parameter for network in networks for parameter in network.parameters()]
    return [(id(module), module.training) for module in modules] + [
        (id(parameter), parameter.requires_grad, parameter._version) for parameter in parameters
    ]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every torch.empty, also in C++, with NaN, so that an unwritten element shows."""
    # torch.use_deterministic_algorithms also sets an option of inductor, which takes longer than many a test.
    torch._C._set_deterministic_algorithms(True)
    yield
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose plots are not drawn, which takes as long as all else in a small run."""
    monkeypatch.setattr("atop_fast.evaluation.pictures.as_png", lambda figure: b"picture")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt: a shell that starts the tests in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
