"""The CUDA kernels equal the specifications, executed on the CPU: what can be known of them without a GPU.

Bit for bit, but for the older kernels and attack_loss, whose sums have another order.

A C++ compiler builds the sources of csrc/cuda with the few names of CUDA that cuda_on_cpu.h supplies, together with the
host side of the ops, as a library for a namespace of its own; build/ keeps it until one of the sources changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from atop_fast.ops import _registry

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++"))), None)
LAUNCH = re.compile(r"(\w+(?:<[\w<>, :]*>)?)\s*<<<(.+?)>>>\(", re.DOTALL)
NAMESPACE = "atop_fast_cuda_on_cpu"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "misaligned", "misaligned channels_last")

pytestmark = [
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="no C++ compiler, or no ucontext"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.fixture(scope="module")
def cuda():
    """The ops of the CUDA library, for CPU tensors."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for op in _registry.OPS.values():
        library.define(str(op.overload._schema).partition("::")[2])
    torch.ops.load_library(built())
    yield getattr(torch.ops, NAMESPACE)
    library._destroy()


def built() -> Path:
    """The library, which build/ keeps under a hash of all that goes into it; workers wait for the one that builds."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-DTORCH_STABLE_ONLY", f"-I{CSRC}", *(f"-I{path}" for path in include_paths())]
    sources = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
    digest = hashlib.sha256(f"{flags} {run(COMPILER, '--version')} {torch.__version__}".encode())
    for path in (Path(__file__), ROOT / "tests" / "cuda_on_cpu.h", *sources):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    kept = ROOT / "build" / "tests"
    kept.mkdir(parents=True, exist_ok=True)
    library = kept / f"cuda_on_cpu-{digest.hexdigest()[:16]}.so"
    with open(kept / "lock", "w") as lock, tempfile.TemporaryDirectory(dir=kept) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            build(Path(folder), flags).rename(library)
    return library


def build(folder: Path, flags: list[str]) -> Path:
    """The library, built in `folder`."""
    shutil.copy(ROOT / "tests" / "cuda_on_cpu.h", folder / "cuda_runtime.h")
    for path in CSRC.glob("cuda/*.cu*"):
        name = path.name if path.suffix == ".cuh" else f"{path.stem}.cpp"
        (folder / name).write_text(LAUNCH.sub(r"on_cpu::Launch(\2)(\1, ", path.read_text()))
    # In one unit, each in a namespace of its own: torch's headers take longer to read than all of it to compile.
    hosts = [host(CSRC / "ops" / f"{kernel.stem}.cpp") for kernel in sorted(CSRC.glob("cuda/*.cu"))]
    (folder / "hosts.cpp").write_text("".join(hosts))

    def compiled(path: Path) -> Path:
        run(COMPILER, *flags, f"-I{folder}", "-c", path, "-o", path.with_suffix(".o"))
        return path.with_suffix(".o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted(folder.glob("*.cpp"))))
    paths = [f"-L{path}" for path in library_paths()]
    run(COMPILER, "-shared", *objects, *paths, "-ltorch_cpu", "-o", folder / "ops.so")
    return folder / "ops.so"


def host(path: Path) -> str:
    """The host side of an op, which registers in the library's namespace."""
    own = f"host_{path.stem}"
    text = path.read_text().replace("(atop_fast,", f"({NAMESPACE},").replace("&atop::", f"&atop::{own}::")
    return text.replace("namespace atop {", f"namespace atop::{own} {{")


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(cuda, name, *args):
    """Assert that the op equals its reference in bits and layout, and return the result."""
    expected = _registry.OPS[name].reference(*args)
    actual = getattr(cuda, name)(*args)
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    for a, b in pairs:
        assert strides(a) == strides(b)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return actual


def strides(t):
    """Those that matter."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def key(batch, draws=None):
    """A seed, sample ids and draws that fill their bits."""
    draws = torch.randint(0, 2**32, (batch,)) if draws is None else torch.tensor(draws)
    return torch.tensor(-(2**40) - 3), torch.randint(-(2**62), 2**62, (batch,)), draws


def images(shape, dtype, layout="contiguous"):
    """Images in [-0.3, 1.3] with special values; if misaligned, they begin one element into their storage."""
    if dtype == torch.uint8:
        x = torch.randint(0, 256, shape, dtype=dtype)
    else:
        x = (torch.rand(shape) * 1.6 - 0.3).to(dtype)
        for i, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1.0)):
            x.view(-1)[7 * i % x.numel()] = value
    if "channels_last" in layout:
        x = x.contiguous(memory_format=torch.channels_last)
    if "misaligned" not in layout:
        return x
    return torch.empty(x.numel() + 1, dtype=dtype)[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 1027])
def test_random_normal(cuda, count):
    check(cuda, "random_normal", *key(3), 1, count)
    check(cuda, "random_normal", *key(2, draws=2**32 - 1), 1, count)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("blocks", [1, 16, 33, 257, 4101])
def test_mask_blocks(cuda, blocks, copies):
    """More than one warp, thread block and tile of words, and numbers of masked blocks that must be clipped."""
    for masked in (torch.tensor([-3, blocks // 3, blocks + 5]), torch.tensor(blocks // 2)):
        check(cuda, "mask_blocks", *key(3), masked, blocks, copies)


# Shape, new size, patch: whole octets; an octet over three rows; shorter ones; enlarged and reduced.
CASES = [
    ((2, 3, 8, 8), None, 4),
    ((1, 2, 28, 28), None, 7),
    ((2, 3, 6, 10), None, 2),
    ((1, 5, 5, 7), None, 1),
    ((2, 3, 7, 5), (12, 16), 4),
    ((1, 2, 10, 9), (5, 7), 1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "size", "patch"), CASES, ids=str)
def test_corrupt(cuda, shape, size, patch, layout):
    height, width = size = list(size or shape[2:])
    batch, blocks = shape[0], (height // patch) * (width // patch)
    types = [(given, wanted) for given in (torch.uint8, *FLOATS) for wanted in FLOATS]
    for given, wanted in [*types, (torch.float64, torch.float64)]:
        for copies, sigma in ((1, torch.tensor(0.25)), (3, torch.tensor([0.0, 0.5])[:batch])):
            k = key(batch)
            owners = check(cuda, "mask_blocks", *k, torch.tensor(blocks // 2 + 1), blocks, copies)
            call = (images(shape, given, layout), owners, sigma, *k, patch, copies, size)
            _, live = check(cuda, "corrupt", *call, wanted, True)
            check(cuda, "corrupt", *call, wanted, False)
            check(cuda, "corrupt_live", *call)
            if given != torch.uint8:
                dy = images((batch * copies, shape[1] + 2, *size), given, layout)
                check(cuda, "corrupt_bwd", dy, live, owners, patch, copies, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "_", "patch"), CASES[:4], ids=str)
def test_assemble(cuda, shape, _, patch, layout):
    batch, blocks = shape[0], (shape[2] // patch) * (shape[3] // patch)
    for dtype in (*FLOATS, torch.float64):
        for copies in (1, 5):
            owners = check(cuda, "mask_blocks", *key(batch), torch.tensor(3 * blocks // 4), blocks, copies)
            check(cuda, "assemble", images((batch * copies, *shape[1:]), dtype, layout), owners, patch)
            check(cuda, "assemble_bwd", images(shape, dtype, layout), owners, patch, copies)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "size"), [((2, 3, 8, 8), (16, 5)), ((1, 6, 9, 4), (3, 20)), ((1, 1, 1, 1), (3, 2))])
def test_resample(cuda, shape, size, layout):
    axis_taps = importlib.import_module("atop_fast.ops.resize").axis_taps
    for dtype in (*FLOATS, torch.float64):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for antialias in (False, True):
            axes = [axis_taps(*pair, antialias) for pair in zip(shape[2:], size, strict=True)]
            taps, transposed = (
                [t for axis in axes for t in (axis[i].start, axis[i].weight.to(wide))] for i in range(2)
            )
            y = check(cuda, "resample", images(shape, dtype, layout), *taps, *transposed)
            check(cuda, "resample", y, *transposed, *taps)


def test_resample_of_each_sample_apart(cuda):
    """Every sample has matrices of its own, and columns that do not exist are not read."""
    x, start, weight = torch.rand(3, 2, 5, 4), torch.randint(0, 3, (3, 6)), torch.rand(3, 6, 2)
    taps = (start, weight, start, weight)
    check(cuda, "resample", x, *taps, *taps)
    wild = torch.tensor([[-100, 2**40, 3]])
    taps = (wild, weight[:1, :3], wild, weight[:1, :3])
    assert cuda.resample(x, *taps, *taps).isfinite().all()


@pytest.mark.parametrize("classes", [4, 10, 33, 1001])
def test_attack_loss(cuda, classes):
    """Sums have an order of their own in a warp, so that losses and gradients agree up to rounding."""
    op = _registry.OPS["attack_loss"]
    for dtype in (*FLOATS, torch.float64):
        z = images((19, 1, 1, classes), dtype).flatten(1)
        labels, targets = (torch.randint(-1, classes + 1, (19,)) for _ in range(2))
        for chosen, kind in [(None, kind) for kind in range(6)] + [(targets, kind) for kind in (1, 2, 3, 5)]:
            actual = cuda.attack_loss(z, labels, chosen, kind)
            for a, b in zip(actual, op.reference(z, labels, chosen, kind), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)


# Whole packs, and samples of odd lengths; in every layout.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("draws", [0, 3])
@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (2, 3, 5, 7)], ids=str)
def test_steps(cuda, shape, draws, layout):
    check_steps(cuda, shape, draws, layout, torch.float32)


# A sample of one element; the longest of one part; of several parts.
@pytest.mark.parametrize("shape", [(4,), (1, 8192), (2, 8193)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_steps_of_any_length(cuda, shape, dtype):
    check_steps(cuda, shape, 2, "contiguous", dtype)


def check_steps(cuda, shape, draws, layout, dtype):
    x, x_prev, x0 = (images(shape, dtype, layout).nan_to_num(0.5).clamp(0, 1) for _ in range(3))
    grad = torch.stack([images(shape, dtype, layout) - 0.5 for _ in range(draws or 1)])
    grad = grad if draws else grad[0]
    numbers = torch.rand(3, shape[0], dtype=dtype)
    for alpha, eps, momentum in ((None, None, None), (*numbers[:2], None), numbers):
        check(cuda, "pgd_step_linf", x, grad, x0, 0.1, 0.2, alpha, eps)
        check(cuda, "apgd_step_linf", x, x_prev, grad, x0, 0.1, 0.2, 0.75, alpha, eps, momentum)
    grad = grad.nan_to_num(0, 1, -1)
    check_rounded(cuda, "pgd_step_l2", x, grad, x0, 0.1, 0.2, numbers[0])
    check_rounded(cuda, "apgd_step_l2", x, x_prev, grad, x0, 0.1, 0.2, 0.75, *numbers)


# Whole packs and single elements; one part and several.
@pytest.mark.parametrize("inner", [16, 105, 8196, 8195])
@pytest.mark.parametrize("draws", [0, 2])
def test_steps_of_small_gradients(cuda, inner, draws):
    for dtype, small, least in ((torch.float32, 1e-30, 1e-42), (torch.float64, 1e-200, 1e-315)):
        x, x_prev, x0 = torch.rand(3, 4, inner, dtype=dtype)
        sizes = torch.tensor([1, small, least, 0], dtype=dtype)[:, None]
        grad = (torch.randint(0, 2, (4, inner)) * 2 - 1) * sizes
        grad = torch.stack([grad, torch.zeros_like(grad)]) if draws else grad
        check_rounded(cuda, "pgd_step_l2", x, grad, x0, 0.1, 0.2)
        check_rounded(cuda, "apgd_step_l2", x, x_prev, grad, x0, 0.1, 0.2, 0.75)


def check_rounded(cuda, name, *args):
    """Assert that the op equals its reference up to rounding."""
    expected, actual = _registry.OPS[name].reference(*args), getattr(cuda, name)(*args)
    assert strides(actual) == strides(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 if expected.dtype == torch.float32 else 1e-14)


def test_steps_of_odd_gradients(cuda):
    x, x0, grad = torch.rand(3, 3, 40), torch.rand(3, 3, 40), torch.randn(3, 3, 40)
    grad[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    grad[1, 1, 3] = torch.nan
    grad[2] = 0
    check_rounded(cuda, "pgd_step_l2", x, grad, x0, 0.1, 0.2)
    check_rounded(cuda, "apgd_step_l2", x, x0, grad, x0, 0.1, 0.2, 0.75)
    moved = x.clone()
    cuda.pgd_step_l2_(moved, grad, x0, 0.1, 0.2)
    assert torch.equal(moved, cuda.pgd_step_l2(x, grad, x0, 0.1, 0.2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 16, 3, 3)], ids=str)
def test_gated(cuda, shape, layout):
    """Packs and single numbers in each layout."""
    for dtype in (*FLOATS, torch.float64):
        h, dy, bias = gate(shape, dtype, layout)
        finite = h.nan_to_num(0, 1, -1)
        check_close(cuda, "gated", h, None, 0)
        check_close(cuda, "gated", h, bias.to(dtype), 1)
        check_close(cuda, "gated_bwd", dy, finite, None, 0, False)
        check_close(cuda, "gated_bwd", dy, finite, bias, 1, False)
        for activation in (0, 1):
            check_close(cuda, "gated_bwd", dy, finite, bias, activation, True)


# Several parts, and more channels than a block has threads.
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((1, 2, 130, 131), "contiguous"), ((1, 2, 130, 131), "channels_last"), ((1, 522, 6, 6), "channels_last")],
    ids=str,
)
def test_gated_of_many(cuda, shape, layout):
    h, dy, bias = gate(shape, torch.float32, "misaligned " * (shape[1] > 2) + layout)
    check_close(cuda, "gated_bwd", dy, h.nan_to_num(0, 1, -1), bias, 0, True)


def gate(shape, dtype, layout):
    dy = images((shape[0], shape[1] // 2, *shape[2:]), dtype, layout).nan_to_num(1, 1, 1)
    return 3 * images(shape, dtype, layout) - 1.5, dy, torch.randn(shape[1])


def check_close(cuda, name, *args):
    """Assert that the op equals its reference up to rounding, sums included."""
    expected, actual = _registry.OPS[name].reference(*args), getattr(cuda, name)(*args)
    for a, b in zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]:
        assert strides(a) == strides(b)
        tolerance = max(1e-12 if a.dtype == torch.float64 else 1e-5, 2 * torch.finfo(a.dtype).eps)
        scale = 1 + (0 if name == "gated" or a.dim() > 1 else dy_sum(args[0]))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def dy_sum(dy):
    """The tolerance of sums over batch and pixels."""
    return dy.abs().sum(dim=(0, 2, 3)).max().item() if dy.numel() else 0
