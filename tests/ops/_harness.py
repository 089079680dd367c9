"""The checks that every op passes in every backend, written once. `tests/ops/test_<op>.py` supplies the samples.

On the CPU the backends are eager, cpp, and Triton in its interpreter; on a GPU eager, cuda, and Triton compiled. A test
of a backend gives it the device's dispatch key for its duration, so that each check runs through the dispatcher,
autograd and all.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from atop_fast.ops import _registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The tolerance for float64, in which the reference itself is off by a few units in the last place.
ULPS = {torch.float64: 8}
# Inductor's code around the op takes a C++ compiler up to a minute, and so runs in the second tier.
COMPILERS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))


def compilers_of(*kinds: str) -> list[Any]:
    """Each kind of an op with aot_eager; the last with inductor, too, which sees the same op in all of them."""
    return [*((kind, "aot_eager") for kind in kinds), pytest.param(kinds[-1], "inductor", marks=pytest.mark.slow)]


@dataclass(frozen=True)
class Spec:
    """The description of an op for the harness.

    `sample(shape, dtype)` makes its tensors, `numbers` are its further arguments. `formula` is the op as a user writes
    it, from torch's own differentiable functions. An `exact` op equals it in every bit. The first `differentiable`
    tensors have gradients.
    """

    name: str
    call: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    sample: Callable[[Sequence[int], torch.dtype], tuple[Tensor, ...]]
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]
    exact: bool
    numbers: tuple[float, ...] = ()
    differentiable: tuple[int, ...] = (0,)
    ops: tuple[str, ...] = field(default=())


def backends(name: str = "gated") -> list[str]:
    """The backends that this machine can run on DEVICE."""
    other = "cpp" if DEVICE == "cuda" else "cuda"
    return [backend for backend in _registry.impls(name) if backend != other]


def cases(
    but: str = "",
    op: str = "gated",
    interpreted: dict[str, Sequence[Any]] | None = None,
    traced: dict[str, Sequence[Any]] | None = None,
    **axes: Sequence[Any],
) -> Callable[..., Any]:
    """Parametrize a test over an op's backends, `but` some, and further axes, with ids like triton-fp32-2x3x33x65.

    `interpreted` holds axes of Triton's interpreter, which takes 0.1 s for a block: the same edges in smaller shapes.
    `traced` adds an axis `parts` of `opcheck`, and holds the axes of its part "traced".
    """

    def combinations(backend: str) -> list[tuple[Any, ...]]:
        own = (interpreted or {}) if is_interpreted(backend) else {}
        return list(itertools.product(*{**axes, **own}.values(), *([["registered"]] if traced is not None else [])))

    def parameter(backend: str, combination: tuple[Any, ...], *marks: pytest.MarkDecorator) -> Any:
        marks = (pytest.mark.backend(backend), *([pytest.mark.gpu] if DEVICE == "cuda" else []), *marks)
        return pytest.param(backend, *combination, id="-".join([backend, *map(_text, combination)]), marks=marks)

    parameters = [
        parameter(backend, combination)
        for backend in backends(op)
        if backend not in but.split()
        for combination in combinations(backend)
    ]
    if traced is not None:
        chosen = itertools.product(*{**axes, **traced}.values(), ["traced"])
        parameters += [parameter("eager", combination, pytest.mark.slow) for combination in chosen]
    return pytest.mark.parametrize(("backend", *axes, *(["parts"] if traced is not None else [])), parameters)


def is_interpreted(backend: str) -> bool:
    """Whether the backend is Triton's interpreter."""
    return backend == "triton" and DEVICE == "cpu"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    return SHORT[value] if isinstance(value, torch.dtype) else str(value)


def owned_by(backend: str, names: Sequence[str]) -> AbstractContextManager[None]:
    """Make `backend` own DEVICE's dispatch key of the ops `names`."""
    return _registry.owned_by(backend, names, DEVICE)


def in_layout(t: Tensor, layout: str) -> Tensor:
    """The values of `t` in another memory layout."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.clone()
    if layout == "sliced":
        wide = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1] + 1))
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if layout == "permuted":
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() == 3 else t.mT.contiguous().mT
    return t.contiguous()


def random_key(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """A seed below 0, sample ids of more than 32 bits, and draws up to 2**32 - 1."""
    ids, draws = 2**33 - 1 + 3 * torch.arange(batch), torch.arange(2**32 - batch, 2**32)
    return torch.tensor(-5, device=DEVICE), ids.to(DEVICE), draws.to(DEVICE)


def random_owners(batch: int, size: Sequence[int], patch: int, copies: int) -> Tensor:
    """Blocks of all copies, and of none."""
    count = size[0] // patch * (size[1] // patch)
    return torch.randint(0, copies + 1, (batch, count), dtype=torch.uint8, device=DEVICE)


def close(spec: Spec, actual: Tensor, expected: Tensor, eager: Tensor) -> None:
    """Assert the op's assertion class; `expected` is the float64 result and `eager` the formula in the same dtype."""
    assert actual.shape == eager.shape
    assert actual.dtype == eager.dtype
    if spec.exact:
        torch.testing.assert_close(actual, eager, rtol=0, atol=0, equal_nan=True)
        return
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places"
    finite = expected.isfinite() & eager.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(7), eager[~finite].nan_to_num(7)), "infinity in other places"
    if not finite.any():
        return
    error, own = ((t[finite].double() - expected[finite]).abs().max().item() for t in (actual, eager))
    info = torch.finfo(actual.dtype)
    largest = expected[finite].abs().max().clamp(info.tiny, info.max)
    ulp = (torch.exp2(largest.log2().floor()) * info.eps).item()
    allowed = 2 * own + ULPS.get(actual.dtype, 1) * ulp
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e} (eager's own {own:.3e}, ulp {ulp:.3e})"


def run(spec: Spec, backend: str, tensors: Sequence[Tensor]) -> Tensor:
    """The op by the implementation of `backend`."""
    with owned_by(backend, spec.ops or (spec.name,)):
        return spec.call(*tensors, *spec.numbers)


def gradients(call: Callable[..., Tensor], spec: Spec, tensors: Sequence[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """The result's gradients in the differentiable tensors, for the upstream gradient `dy`."""
    leaves = [t.detach().requires_grad_(i in spec.differentiable) for i, t in enumerate(tensors)]
    y = call(*leaves, *spec.numbers)
    return torch.autograd.grad(y, [leaves[i] for i in spec.differentiable], dy)


def same_bits(actual: Tensor, expected: Tensor, ulps: int = 0) -> None:
    """Assert equal bits, the sign of 0 included, and equal strides; any NaN equals any other."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    layouts = ([step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (actual, expected))
    assert not actual.numel() or operator.eq(*layouts), f"strides {actual.stride()} and {expected.stride()}"
    mine, wanted = (t.view(BITS[t.element_size()]).long() for t in (actual, expected))
    differs = ((mine - wanted).abs() > ulps) & ~(actual.isnan() & expected.isnan())
    if differs.any():
        where = differs.nonzero()[0].tolist()
        pair = f"{actual[tuple(where)].item()!r} and {expected[tuple(where)].item()!r}"
        pytest.fail(f"{int(differs.sum())} of {differs.numel()} bits differ, first at {where}: {pair}")


def ulps_of(backend: str, dtype: torch.dtype) -> int:
    """The error allowed to `backend`: Triton's interpreter truncates to bfloat16, whereas all others round."""
    return int(is_interpreted(backend) and dtype == torch.bfloat16)


def check_reference(backend: str, name: str, *arguments: Any) -> None:
    """The op `name` by `backend` returns the bits, dtypes and strides of its reference."""
    expected, actual = (run(*arguments) for run in (_registry.OPS[name].reference, _registry.impls(name)[backend]))
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    for mine, wanted in pairs:
        same_bits(mine, wanted, ulps_of(backend, mine.dtype))


def check_forward(spec: Spec, backend: str, tensors: Sequence[Tensor]) -> Tensor:
    """The result, which equals the formula by the op's assertion class."""
    y, expected = run(spec, backend, tensors), spec.formula(*(t.double() for t in tensors), *spec.numbers)
    close(spec, y, expected, spec.formula(*tensors, *spec.numbers))
    return y


def check_gradients(spec: Spec, backend: str, tensors: Sequence[Tensor]) -> None:
    """Every gradient equals autograd's through the formula, for a random upstream gradient."""
    dy = torch.randn_like(spec.formula(*tensors, *spec.numbers))
    exact = gradients(spec.formula, spec, [t.double() for t in tensors], dy.double())
    eager = gradients(spec.formula, spec, tensors, dy)
    with owned_by(backend, spec.ops or (spec.name,)):
        actual = gradients(spec.call, spec, tensors, dy)
    for mine, expected, own in zip(actual, exact, eager, strict=True):
        close(spec, mine, expected, own)


def check_second_backward_same(spec: Spec, backend: str, tensors: Sequence[Tensor]) -> None:
    """A second backward pass over a kept graph gives the same gradients: nothing saved was overwritten."""
    leaves = [t.detach().requires_grad_(i in spec.differentiable) for i, t in enumerate(tensors)]
    wanted = [leaves[i] for i in spec.differentiable]
    with owned_by(backend, spec.ops or (spec.name,)):
        y = spec.call(*leaves, *spec.numbers)
        dy = torch.randn_like(y)
        first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        second = torch.autograd.grad(y, wanted, dy)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def check_gradcheck(spec: Spec, backend: str, tensors: Sequence[Tensor]) -> None:
    """The gradients agree with finite differences in float64; `tensors` must lie away from kinks."""
    leaves = [t.detach().double().requires_grad_(i in spec.differentiable) for i, t in enumerate(tensors)]
    with owned_by(backend, spec.ops or (spec.name,)):
        gradcheck(backend, lambda *inputs: spec.call(*inputs, *spec.numbers), leaves)


def gradcheck(backend: str, call: Callable[..., Tensor], leaves: Any) -> None:
    """torch's gradcheck; in Triton's interpreter a random projection of the Jacobian, not all of it in 100 calls."""
    assert torch.autograd.gradcheck(call, leaves, fast_mode=is_interpreted(backend))


def check_opcheck(spec: Spec, backend: str, tensors: Sequence[Tensor], requires_grad: bool, parts: str) -> None:
    """torch's own checks of the op, as in `opcheck`."""
    leaves = [t.detach().requires_grad_(requires_grad and i in spec.differentiable) for i, t in enumerate(tensors)]
    with owned_by(backend, spec.ops or (spec.name,)):
        opcheck(_registry.OPS[spec.name].overload, (*leaves, *spec.numbers), parts)


def opcheck(op: torch._ops.OpOverload, arguments: Sequence[Any], parts: str = "registered") -> None:
    """torch's own checks: "registered" of schema, autograd registration and fake, or "traced" of AOT dispatch.

    The last traces the op with symbolic sizes, which takes 50 times as long as the others, and so runs in the second
    tier. It runs only for the backend eager, as tracing calls no kernel, and on channels_last tensors, as
    check_compiled uses contiguous ones.
    """
    utils = {
        "registered": ("test_schema", "test_autograd_registration", "test_faketensor"),
        "traced": ("test_aot_dispatch_dynamic",),
    }
    torch.library.opcheck(op, tuple(arguments), test_utils=utils[parts])


def check_compiled(
    spec: Spec, names: Sequence[str], samples: Sequence[Sequence[Tensor]], compiler: str = "aot_eager"
) -> Callable[..., Tensor]:
    """torch.compile traces the op without graph breaks, and is correct in the backends `names` and for other sizes.

    It compiles once for all backends, as compiled code calls the dispatcher, which selects one. Returns that code.
    """
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *inputs: spec.call(*inputs, *spec.numbers), fullgraph=True, dynamic=True, backend=compiler
    )
    for i, (backend, tensors) in enumerate(itertools.product(names, samples)):
        stance = torch.compiler.set_stance("fail_on_recompile" if i else "default")
        with owned_by(backend, spec.ops or (spec.name,)), stance:
            assert torch.equal(compiled(*tensors), spec.call(*tensors, *spec.numbers)), backend
    return compiled
