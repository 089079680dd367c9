"""Every op by every backend agrees with its specification, or both refuse the arguments."""

from __future__ import annotations

import os
from typing import Any

import _harness as harness
import hypothesis
import pytest
import torch
from _ops import GENERATORS
from _strategies import T, damaged, made
from hypothesis import strategies as st
from torch import Tensor

from atop_fast.ops import _registry

# Sums of another order than the specification's, and exponentials of another library; all others have its bits.
ROUNDED = (
    "apgd_step_l2",
    "attack_loss",
    "contextual_attention",
    "contextual_attention_bwd",
    "conv3x3",
    "conv3x3_bwd",
    "conv3x3_bwd_weight",
    "conv3x3_prepare",
    "gated",
    "gated_bwd",
    "pgd_step_l1",
    "pgd_step_l2",
    "pgd_step_l2_",
    "project_l1",
)
# Winograd's transforms multiply numbers up to 13 times as large as the result.
WINOGRAD = ("conv3x3", "conv3x3_bwd", "conv3x3_bwd_weight")
CLAMPED = ("apgd_step_linf", "pgd_step_linf", "pgd_step_linf_")
# Attacks alone call these, with arguments that they make themselves.
INTERNAL = {"frozen_conv", "frozen_conv_bwd", "hyperplane_step", "square_bump", "square_linf"}
# One op in Triton's interpreter takes as long as a hundred natively.
BACKENDS = ("cpp", "triton") if os.environ.get("ATOP_FAST_FUZZ_TRITON") else ("cpp",)


def outcome(function: Any, arguments: list[Any]) -> Any:
    """The results, those of ops in place too, or the error."""
    try:
        result = function(*arguments)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        return error
    return (arguments[0],) if result is None else result if isinstance(result, tuple) else (result,)


def wide(value: Any) -> Any:
    """Arguments for the same computation in float64."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return torch.float64 if value in (torch.float32, torch.bfloat16, torch.float16) else value


def near(name: str, actual: Tensor, eager: Tensor, exact: Tensor, values: set[str]) -> None:
    """Equal up to rounding where nothing overflows, and NaN where the specification has it in both precisions."""
    assert (actual.shape, actual.dtype) == (eager.shape, eager.dtype)
    if not actual.is_floating_point():
        return
    info = torch.finfo(actual.dtype)
    actual, eager, exact = actual.double(), eager.double(), exact.double()
    # For huge numbers, overflow depends on the order of sums; attention does not multiply NaN by weights of 0.
    if "huge" not in values and name != "contextual_attention_bwd":
        assert actual[eager.isnan() & exact.isnan()].isnan().all(), "a number where the specification has NaN"
    plain = eager.isfinite() & exact.isfinite() & (exact.abs() < info.max / 2**10)
    if not plain.any() or values.intersection(("huge", "corners", "mixed")):
        return
    mine, own = ((t[plain] - exact[plain]).abs().max().item() for t in (actual, eager))
    # Images lie in [0, 1], and so do the terms that cancel in them.
    largest = max(exact[plain].abs().max().item(), 1.0 if "step" in name or "l1" in name else info.smallest_normal)
    # In float64 the reference has errors of its own, of sums of thousands.
    ulps = 2**14 if info.bits == 64 else 2**8 if name in WINOGRAD else 2**3
    assert mine <= 2 * own + ulps * info.eps * largest, f"error {mine:.3e}, eager's own {own:.3e}, of {largest:.3e}"


def agree(backend: str, name: str, arguments: tuple[Any, ...]) -> None:
    """The property."""
    reference = _registry.OPS[name].reference
    expected = outcome(reference, made(arguments))
    with harness.owned_by(backend, (name,)):
        actual = outcome(_registry.OPS[name].overload, made(arguments))
    if isinstance(expected, RuntimeError) and "Storage size" in str(expected):
        return  # what the specification makes on its way is larger than any memory
    if isinstance(expected, Exception) or isinstance(actual, Exception):
        assert isinstance(expected, Exception), f"only {backend} refuses: {actual}"
        assert isinstance(actual, Exception), f"{backend} takes what the specification refuses: {expected}"
        return
    if name not in ROUNDED:
        for mine, wanted in zip(actual, expected, strict=True):
            # The sign of a 0 that is clamped depends on torch's SIMD.
            signed = (mine + 0.0, wanted + 0.0) if name in CLAMPED else (mine, wanted)
            harness.same_bits(*signed, harness.ulps_of(backend, mine.dtype))
        return
    exact = outcome(reference, [wide(a) for a in made(arguments)])
    if isinstance(exact, Exception):
        return
    values = {a.values for a in arguments if isinstance(a, T)}
    for mine, eager, best in zip(actual, expected, exact, strict=True):
        near(name, mine, eager, best, values)


def targets() -> list[Any]:
    return [
        pytest.param(backend, name, id=f"{backend}-{name}", marks=pytest.mark.backend(backend))
        for backend in BACKENDS
        for name in sorted(_registry.OPS.keys() - INTERNAL)
        if backend in _registry.impls(name) and (backend != "triton" or _registry.OPS[name].launcher)
    ]


def test_every_op_has_a_generator():
    assert GENERATORS.keys() == _registry.OPS.keys() - INTERNAL


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "name"), targets())
def test_agrees_with_the_specification(backend, name, count):
    @hypothesis.given(GENERATORS[name])
    def property_of(arguments):
        if count():
            agree(backend, name, arguments)

    property_of()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("backend", "name"), targets())
def test_refuses_what_the_specification_refuses(backend, name, count):
    @hypothesis.given(st.data())
    def property_of(data):
        arguments = data.draw(GENERATORS[name].flatmap(damaged))
        if count():
            agree(backend, name, arguments)

    property_of()
