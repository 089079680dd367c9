"""The owners of ops: measured exceptions from the order of backends, and their way to the dispatcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atop_fast import env, ops
from atop_fast.bench.results import ROW, read, write
from atop_fast.ops import _registry

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import owners
from _results import RESULTS

native = pytest.mark.skipif("cpp" in _registry.MISSING, reason="no native build")


def results(path, date, times):
    """A result file with the seconds of `times`: (case, shape), and backend."""
    kinds = {str: "x", bool: False, int: 1, float: 1.0}
    rows = [
        {key: kinds[types[0]] for key, types in ROW.items()}
        | {"suite": "ops", "case": case, "shape": shape, "variant": backend, "ours": backend != "eager"}
        | {"dtype": "float32", "median_s": seconds}
        for (case, shape), found in times.items()
        for backend, seconds in found.items()
    ]
    write(path, {**read(RESULTS / "ops--cpu.json"), "date": date, "rows": rows})
    return path


def test_a_backend_owns_an_op_if_it_is_clearly_faster(tmp_path):
    def pair(cuda, triton):
        return {"eager": 0.1, "cuda": cuda, "triton": triton}

    times = {
        ("pgd_step_l2 forward", "small"): pair(1.0, 0.9),
        ("pgd_step_l2 forward", "large"): pair(9.0, 9.2),
        # Faster on average, but slower in one case.
        ("apgd_step_l2 forward", "small"): pair(1.0, 0.5),
        ("apgd_step_l2 forward", "large"): pair(9.0, 9.6),
        # No clear margin.
        ("random_normal forward", "small"): pair(1.0, 0.96),
        # Several functions of one op, whose backward op is measured with it.
        ("gated_elu forward", "small"): pair(1.0, 0.9),
        ("gated_relu both", "small"): pair(2.0, 1.8),
        ("random_resize_pad both", "small"): pair(2.0, 1.0),
        # No comparison.
        ("mask_blocks forward", "small"): {"eager": 2.0, "triton": 1.0},
        ("upsample_conv3x3 both", "small"): {"eager": 2.0, "transposed": 1.0},
    }
    path = results(tmp_path / "ops--cuda.json", "2026-12-01", times)
    chosen = dict.fromkeys(["gated", "gated_bwd", "resample"], "triton")
    assert owners.document([path])["cuda"] == {"files": ["ops--cuda.json"], "owners": chosen}
    assert owners.document([path])["cpu"] == {"files": [], "owners": {}}
    (row,) = [row for row in owners.compared(owners.measured([path])[0]) if row["op"] == "apgd_step_l2"]
    assert (row["cases"], row["backend"], row["against"], row["owns"]) == (2, "triton", "cuda", False)
    assert row["mean"] == pytest.approx((2 * 9 / 9.6) ** 0.5)
    assert row["worst"] == pytest.approx(9 / 9.6)
    # A later measurement of a case replaces the earlier one.
    newer = {key: pair(1.0, 0.9) for key in times if key[0] == "pgd_step_l2 forward"}
    newer[("gated_elu forward", "small")] = pair(1.0, 1.1)
    later = results(tmp_path / "again--cuda.json", "2026-12-02", newer)
    found = owners.document([later, path])["cuda"]
    assert found == {
        "files": ["again--cuda.json", "ops--cuda.json"], "owners": {"pgd_step_l2": "triton", "resample": "triton"},
    }  # fmt: skip


def test_the_exceptions_are_those_of_the_committed_results():
    assert json.loads(_registry.EXCEPTIONS.read_text()) == owners.document(owners.committed())


@pytest.fixture
def library():
    """A library for exceptions, which end with it."""
    library, before = torch.library.Library(_registry.NAMESPACE, "IMPL"), _registry.OVERRIDES.copy()
    yield library
    library._destroy()
    _registry.OVERRIDES.clear()
    _registry.OVERRIDES.update(before)


@native
def test_an_exception_reaches_the_dispatcher(library, monkeypatch):
    name, called = "pgd_step_linf", []
    op = _registry.OPS[name]

    def reference(*arguments):
        called.append(name)
        return op.reference(*arguments)

    monkeypatch.setitem(_registry.OPS, name, replace(op, reference=reference))
    x, grad = torch.rand(4, 3, 5, 7), torch.randn(4, 3, 5, 7)
    inputs = (x, grad, x.flip(0), 0.1, 0.3)
    expected = op.overload(*inputs)
    _registry.prefer({"cpu": {name: "eager"}}, library)
    assert (_registry.owner(name, "cpu"), _registry.owner("pgd_step_l2", "cpu")) == ("eager", "cpp")
    assert env.report()["Owner of each op"][name].startswith("cpu: eager, ")
    assert torch.equal(ops.pgd_step_linf(*inputs), expected)
    assert len(called) == 1
    # The kernel below remains available.
    assert torch.equal(_registry.impls(name)["cpp"](*inputs), expected)
    with _registry.owned_by("cpp", [name], "cpu"):
        assert _registry.owner(name, "cpu") == "cpp"
        assert torch.equal(op.overload(*inputs), expected)
    assert len(called) == 1
    assert _registry.owner(name, "cpu") == "eager"
    torch._dynamo.reset()
    compiled = torch.compile(ops.pgd_step_linf, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), expected)
    assert len(called) == 2


@native
@pytest.mark.parametrize("name", ["corrupt", "corrupt_bwd"])
def test_an_op_and_its_backward_op_may_have_different_owners(library, name):
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    key = {"seed": 0, "sample_ids": torch.arange(2), "draw": 0}

    def both():
        y = ops.corrupt(x, patch=4, mask_ratio=0.25, sigma=0.25, **key)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    expected = both()
    _registry.prefer({"cpu": {name: "eager"}}, library)
    assert [_registry.owner(op, "cpu") for op in ("corrupt", "corrupt_bwd")].count("eager") == 1
    assert all(map(torch.equal, both(), expected))


@pytest.mark.skipif("cuda" in _registry.MISSING or "triton" in _registry.MISSING, reason="no CUDA library or no Triton")
def test_triton_takes_the_place_of_cuda(library):
    """Without a GPU, the dispatcher's table tells."""

    def first():
        lines = torch._C._dispatch_dump("atop_fast::gated").splitlines()
        return next(line for line in lines if line.startswith("CUDA: "))

    assert ".cpp:" in first()
    _registry.prefer({"cuda": {"gated": "triton", "mask_blocks": "triton"}}, library)
    assert ".cpp:" not in first()
    assert (_registry.owner("gated", "cuda"), _registry.owner("gated_bwd", "cuda")) == ("triton", "cuda")
    assert (_registry.owner("mask_blocks", "cuda"), _registry.owner("gated", "cpu")) == ("triton", "cpp")


@pytest.mark.parametrize("name", ["gated", "conv3x3"])
def test_an_exception_without_its_backend_is_ignored(library, monkeypatch, name):
    """Be it that the backend is missing, or that it has no kernel of the op."""
    if name == "gated":
        monkeypatch.setitem(_registry.MISSING, "triton", "not installed")
    before = _registry.owner(name, "cuda")
    _registry.prefer({"cuda": {name: "triton"}}, library)
    assert _registry.owner(name, "cuda") == before
    assert (name, "cuda") not in _registry.OVERRIDES


@pytest.mark.parametrize("place", [("cpu", "gate", "cpp"), ("cpu", "gated", "cuda"), ("tpu", "gated", "eager")])
def test_unknown_names_are_refused(library, place):
    device, name, backend = place
    words = f"owners.json must be backends by device and op, got '{backend}' for '{name}' on '{device}'"
    with pytest.raises(ValueError, match=words):
        _registry.prefer({device: {name: backend}}, library)


MADE = """
import pathlib
read = pathlib.Path.read_text
made = '{"cpu": {"owners": {"gated": "eager", "square_linf": "eager"}}, "cuda": {"owners": {"gated": "triton"}}}'
pathlib.Path.read_text = lambda self, **options: made if self.name == "owners.json" else read(self, **options)
from atop_fast import env
owners = env.report()["Owner of each op"]
print(owners["gated"], owners["gated_bwd"], sep="; ")
"""


@native
@pytest.mark.slow
def test_exceptions_are_read_at_import():
    def owners_in(choice):
        command, environment = [sys.executable, "-c", MADE], {**os.environ, "ATOP_FAST_BACKEND": choice}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    on_gpu = _registry.owner("gated", "cuda")
    chosen = "triton" if on_gpu == "cuda" and "triton" not in _registry.MISSING else on_gpu
    assert owners_in("auto") == f"cpu: eager, cuda: {chosen}; cpu: cpp, cuda: {on_gpu}"
    assert owners_in("eager") == "cpu: eager, cuda: eager; cpu: eager, cuda: eager"
