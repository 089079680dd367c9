"""The measurement harness: cases, timing in turns, peak memory, roofline, rows. docs/benchmarks.md has the method."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .._core.precision import is_fast
from .._core.waits import watched
from ..ops import _registry

Function = Callable[[], Any]
# A judge's result for each variant: "difference", "accuracy" and "agree", as far as they apply.
Quality = dict[str, dict[str, float]]
# Arguments of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Calls in a CUDA graph: enough for its launch overhead to be negligible.
CALLS = 20


@dataclass(frozen=True)
class Options:
    """Options of a run that apply to every suite.

    Attributes:
        device: "cpu" or "cuda".
        quick: fewer and smaller cases, and no torch.compile.
        compile_all: use torch.compile even if it takes minutes.
    """

    device: str = "cpu"
    quick: bool = False
    compile_all: bool = False


def no_judge(outputs: dict[str, Any]) -> Quality:
    """The judge of cases whose results are compared by tests."""
    return {}


def same_as_baseline(ours: Sequence[str], tolerance: float) -> Callable[[dict[str, Any]], Quality]:
    """A judge of tensors, or tuples of them, by the largest difference from the baseline over the largest value.

    Our variants must not exceed the tolerance.
    """

    def judge(outputs: dict[str, Any]) -> Quality:
        baseline = next(iter(outputs.values()))
        found = {name: _difference(output, baseline) for name, output in outputs.items()}
        for name in ours:
            if not found[name] <= tolerance:
                raise AssertionError(f"{name} differs from the baseline by {found[name]:.3g}, more than {tolerance}")
        return {name: {"difference": difference} for name, difference in found.items()}

    return judge


@dataclass
class Case:
    """One comparison at equal work.

    Attributes:
        suite, name, shape, dtype: the case; a variant whose name ends in bfloat16 has that dtype instead.
        run: the variants by name, the baseline first.
        ours: names of this library's variants.
        nbytes: minimum number of bytes to move: inputs read once, outputs written once.
        flops: floating-point operations of the plain formulation.
        images: number of images per run; 0 if a rate of images is meaningless.
        judge: maps the variants' first results to their quality; raises AssertionError for results not to be timed.
        rounds: samples of each variant: 0 for as many as fit into the time, or 3 if a call takes longer than a fifth of
            a second; 1 for cases that take minutes, without warm-up.
        own_clock: the functions return the seconds of their work, which runs in other processes.
        warm_up: number of calls before the first sample, unless `rounds` is 1.
        replays: on a GPU, time replays of a CUDA graph of each variant: kernels without the host's work.
    """

    suite: str
    name: str
    shape: str
    dtype: str
    run: Mapping[str, Function]
    ours: Sequence[str]
    nbytes: int = 0
    flops: int = 0
    images: int = 0
    judge: Callable[[dict[str, Any]], Quality] = field(default=no_judge)
    rounds: int = 0
    own_clock: bool = False
    warm_up: int = 2
    replays: bool = False


def owned(backend: str, device: str) -> AbstractContextManager[None]:
    """A block in which a backend owns all ops that it implements."""
    return _registry.owned_by(backend, [name for name in _registry.OPS if backend in _registry.impls(name)], device)


@dataclass(frozen=True)
class Owned:
    """A function to be run while `backend` owns the ops; the change of owners is not timed."""

    function: Function
    backend: str
    device: str

    def __call__(self) -> Any:
        with owned(self.backend, self.device):
            return self.function()


def by_backend(op: str, device: str, function: Function) -> dict[str, Function]:
    """A function over an op, in each backend that has a kernel of it for the device."""
    owner, found = _registry.owner(op, device), _registry.impls(op)
    backends = [backend for backend in _registry.KERNELS[device] if backend in found]
    return {backend: function if backend == owner else Owned(function, backend, device) for backend in backends}


def op_case(
    name: str,
    shape: str,
    dtype: str,
    formula: Function,
    ours: Mapping[str, Function],
    nbytes: int,
    tolerance: float | None,
    products: bool = False,
) -> Case:
    """A case of an op against its formula in eager mode, which is also compiled.

    Without a tolerance, results are not compared. `products`: the op consists of convolutions or matrix products, whose
    operations bound its time.
    """
    run = {"eager": formula, **ours, "compile": torch.compile(formula)}
    judge = no_judge if tolerance is None else same_as_baseline(list(ours), tolerance)
    work = flops(formula) if products else 0
    return Case("ops", name, shape, dtype, run, list(ours), nbytes, work, judge=judge)


def gradient_in(x: Tensor, function: Callable[[Tensor], Tensor], dy: Tensor) -> Tensor:
    """The gradient in `x`, by a forward and a backward pass."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, dy)[0]


class Roofline:
    """The maximum rates of a device, measured in the same run."""

    def __init__(self, device: str, seconds: float = 0.1) -> None:
        self.device, self.seconds = device, seconds
        self.rates: dict[str, float] = {}

    def floor(self, case: Case, dtype: str) -> float:
        """The minimum time of a case in seconds, or 0 if there is no bound."""
        moved = case.nbytes / self.copy(case.nbytes) if case.nbytes else 0.0
        return max(moved, case.flops / self.matmul(dtype) if case.flops else 0.0)

    def copy(self, nbytes: int) -> float:
        """Bandwidth of torch's copy at this size, in bytes read plus bytes written per second."""
        # Sizes between two powers of two share a measurement, because caches affect them similarly.
        size = 1 << max(nbytes - 1, 4095).bit_length()
        if f"copy {size}" not in self.rates:
            source = torch.zeros(size // 8, device=self.device)
            target = torch.zeros_like(source)
            self.rates[f"copy {size}"] = 2 * source.nbytes / self._seconds(lambda: target.copy_(source))
        return self.rates[f"copy {size}"]

    def matmul(self, dtype: str) -> float:
        """Operations per second of torch's product of two square matrices."""
        if f"matmul {dtype}" not in self.rates:
            n = 1024 if self.device == "cpu" else 8192
            a, b = torch.randn(2, n, n, device=self.device).to(getattr(torch, dtype))
            self.rates[f"matmul {dtype}"] = 2 * n**3 / self._seconds(lambda: a @ b)
        return self.rates[f"matmul {dtype}"]

    def _seconds(self, function: Function) -> float:
        return statistics.median(time_in_turns({"": function}, self.device, self.seconds)[""])


def keep_heap() -> None:
    """Make glibc's allocator keep freed memory for the rest of the process; has no effect on other systems.

    By default, it returns large blocks to the system, and the page faults on reallocation would be charged to the
    variant that allocates the most: eager mode would lose by a factor that warm programs do not see.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def synchronize(device: str) -> None:
    """Synchronize the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_in_turns(
    functions: Mapping[str, Function], device: str, seconds: float, rounds: int = 0
) -> dict[str, list[float]]:
    """Times of all functions in seconds, measured in turns so that a disturbance affects all of them.

    Fast functions are repeated within a sample; each gets about `seconds` in total, and at least 7 samples. With
    `rounds`, each gets that many samples of one call, without warm-up: for functions that are slow and already warm. On
    a GPU, CUDA events measure the time.
    """
    repeats = dict.fromkeys(functions, 1)
    for name, function in functions.items() if not rounds else ():
        for _ in range(3):
            repeats[name] = max(1, round(2e-3 / max(_seconds_of(function, 1, device), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + (0 if rounds else seconds * len(functions))
    while len(next(iter(samples.values()))) < (rounds or 7) or time.perf_counter() < deadline:
        for name, function in functions.items():
            samples[name].append(_seconds_of(function, repeats[name], device) / repeats[name])
    return samples


def _seconds_of(function: Function, calls: int, device: str) -> float:
    if isinstance(function, Owned):
        with owned(function.backend, function.device):
            return _seconds_of(function.function, calls, device)
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


def as_graph(function: Function) -> Function:
    """Capture CALLS calls of a warm function in one CUDA graph; a RuntimeError explains why it cannot be captured."""
    if isinstance(function, Owned):
        with owned(function.backend, function.device):
            return as_graph(function.function)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _, cause = watched(function)
    torch.cuda.current_stream().wait_stream(stream)
    if cause is not None:
        raise RuntimeError(cause)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            function()
    return graph.replay


def with_peak(function: Function, device: str) -> tuple[Any, float | None]:
    """The result of a call, and the additional memory in MiB that it needs.

    On a GPU, this counts allocated tensors; on the CPU, the growth of the process's resident memory, or None if the
    system does not report it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        # Return freed memory to the system, so that it counts again, and reset the peak (proc(5), clear_refs).
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        resident = _status("VmRSS")
    except (OSError, AttributeError):
        return function(), None
    result = function()
    return result, max(_status("VmHWM") - resident, 0) / 2**10


def flops(function: Function) -> int:
    """Floating-point operations of the convolutions and matrix products in torch's own functions."""
    with _FlopCounter() as counter:
        function()
    return counter.total


class _FlopCounter(TorchDispatchMode):
    """torch's FlopCounterMode without its tables by module, whose hooks refuse torch.autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        # Imported here, because it takes longer than the rest of the command line.
        from torch.utils.flop_counter import flop_registry

        self.counts, self.total = flop_registry, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if count := self.counts.get(func._overloadpacket):
            self.total += int(count(*args, **kwargs, out_val=result))
        return result


def measure(case: Case, device: str, seconds: float, roofline: Roofline) -> list[dict[str, Any]]:
    """The rows of a case, the baseline first; a peer that fails is reported and omitted."""
    if case.own_clock:
        own: dict[str, list[float]] = {name: [] for name in case.run}
        for name, function in case.rounds * list(case.run.items()):
            own[name].append(function())
        return [_row(case, name, own, roofline, None, {}) for name in own]
    outputs, peaks, last = {}, {}, {}
    for name, function in case.run.items():
        if name.endswith("bfloat16") and not is_fast(torch.device(device), "bfloat16"):
            print(f"{case.name}, {case.shape}: no {name}: this CPU has no fast networks in that type")
            continue
        try:
            if case.rounds != 1:
                outputs[name] = function()
                for _ in range(case.warm_up - 2):
                    function()
            start = time.perf_counter()
            result, peaks[name] = with_peak(function, device)
            last[name] = [time.perf_counter() - start]
            outputs.setdefault(name, result)
        except Exception as error:  # a peer that is missing or cannot do the work has no row, only a message
            if name in case.ours:
                raise
            print(f"{case.name}, {case.shape}: no {name}: {type(error).__name__}: {error}".partition("\n")[0])
    quality = case.judge({name: outputs[name] for name in last})
    warm = {name: case.run[name] for name in last}
    rounds = case.rounds or (3 if max(last.values()) > [0.2] else 0)
    if case.replays and device == "cuda":
        samples = _replayed(case, warm, seconds, rounds)
    else:
        samples = last if case.rounds == 1 else time_in_turns(warm, device, seconds, rounds)
    return [_row(case, name, samples, roofline, peaks[name], quality.get(name, {})) for name in last]


def _replayed(case: Case, warm: Mapping[str, Function], seconds: float, rounds: int) -> dict[str, list[float]]:
    """Times of replays, or of calls for all variants if one of them cannot be captured."""
    try:
        graphs = {name: as_graph(function) for name, function in warm.items()}
    except RuntimeError as error:
        print(f"{case.name}, {case.shape}: calls are timed, not replays: {error}".partition("\n")[0])
        return time_in_turns(warm, "cuda", seconds, rounds)
    samples = time_in_turns(graphs, "cuda", seconds, rounds)
    return {name: [value / CALLS for value in values] for name, values in samples.items()}


def _row(
    case: Case,
    name: str,
    samples: dict[str, list[float]],
    roofline: Roofline,
    peak: float | None,
    quality: dict[str, float],
) -> dict[str, Any]:
    dtype = "bfloat16" if name.endswith("bfloat16") else case.dtype
    times = samples[name]
    median, baseline = (statistics.median(values) for values in (times, next(iter(samples.values()))))
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else 3 * times
    floor = roofline.floor(case, dtype)
    return {
        "suite": case.suite, "case": case.name, "shape": case.shape, "variant": name, "ours": name in case.ours,
        "dtype": dtype, "threads": torch.get_num_threads(), "samples": len(times), "median_s": _short(median),
        "iqr_s": _short(high - low), "ratio": _short(baseline / median),
        "images_per_s": _short(case.images / median) if case.images else None,
        "roofline": _short(floor / median) if floor else None,
        "peak_mib": None if peak is None else round(peak, 1),
        **{key: None if key not in quality else _short(quality[key]) for key in ("difference", "accuracy", "agree")},
    }  # fmt: skip


def _difference(a: Any, b: Any) -> float:
    if isinstance(a, tuple):
        return max(_difference(x, y) for x, y in zip(a, b, strict=True))
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(torch.double).tiny))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
