"""Shared by the tests of the projected steps: samples, and checks of their common guarantees."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import _harness as harness
import pytest
import torch
from _harness import DEVICE

from atop_fast import ops
from atop_fast.ops import _registry

DRAWS = 3
BLOCK = 4096  # the longest of any kernel; a sample of more than CUDA's 8192 elements is in several parts
# For Triton's interpreter, whose kernels' blocks are no longer.
LONG = {"inner": ((3, 5, 7), (BLOCK + 1,))}
SHAPES = ((0, 3), (1,), (5,), (2, 3, 0, 5), (3, BLOCK - 1), (2, BLOCK + 1), (2, 3, 33, 97), (3, 7, 5))


@dataclass(frozen=True)
class Step:
    """A step op as its tests see it: `numbers` by name, `others` the tensors of x's shape after x and before grad."""

    name: str
    numbers: dict[str, float]
    formula: Any
    exact: bool
    others: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("x", *self.others, "grad", "x0")

    def __call__(self, *arguments: Any) -> torch.Tensor:
        return getattr(ops, self.name)(*arguments)

    def spec(self, **changes: Any) -> harness.Spec:
        options = {
            "name": self.name, "call": self, "formula": self.formula, "sample": self.sample, "exact": self.exact,
            "dtypes": (torch.float32, torch.float64), "shapes": SHAPES, "numbers": tuple(self.numbers.values()),
        }  # fmt: skip
        return harness.Spec(**{**options, **changes})

    def sample(self, shape, dtype, draws: int = 0) -> tuple[torch.Tensor, ...]:
        """Clean images, images around them, and a gradient; the step leaves the ball and the range in places."""
        eps = self.numbers["eps"] / (1 if self.exact else math.sqrt(max(1, math.prod(shape[1:]))))
        x0 = torch.rand(shape, dtype=dtype, device=DEVICE)
        moved = [x0 + eps * torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(1 + len(self.others))]
        full = (draws, *shape) if draws else shape
        return *moved, torch.randn(full, dtype=dtype, device=DEVICE), x0

    def per_sample(self, batch: int, dtype, shape=None) -> tuple[torch.Tensor, ...]:
        """Other numbers for every sample, or one as a tensor of shape ()."""
        shape = (batch,) if shape is None else shape
        return tuple(n * (0.5 + torch.rand(shape, dtype=dtype, device=DEVICE)) for n in self.numbers.values())


def check_equal(step: Step, backend: str, tensors, numbers) -> torch.Tensor:
    """The op equals the formula by its assertion class, and returns the layout of empty_like; its result."""
    with harness.owned_by(backend, (step.name,)):
        actual = step(*tensors, *numbers)
    wide = [n.double() if isinstance(n, torch.Tensor) else n for n in numbers]
    expected = step.formula(*(t.double() for t in tensors), *wide)
    harness.close(step.spec(), actual, expected, step.formula(*tensors, *numbers))
    assert actual.stride() == torch.empty_like(tensors[0]).stride()
    return actual


def check_numbers_and_draws(step: Step, backend: str, shape, layout: str, dtype) -> None:
    """Numbers of every kind, with and without draws, in `layout`; draws whose gradient has it, and has not.

    Triton's interpreter takes every other kind in turn, so that over the layouts each meets every number of draws.
    """
    every, turn = (2, harness.LAYOUTS.index(layout)) if harness.is_interpreted(backend) else (1, 0)
    for draws in (0, 1, DRAWS):
        tensors = step.sample(shape, dtype, draws)
        laid = [t if t.dim() > len(shape) else harness.in_layout(t, layout) for t in tensors]
        i = step.tensors.index("grad")
        choices = [laid[i]]
        if draws:
            choices.append(torch.stack([harness.in_layout(g, layout) for g in tensors[i]]))
            if layout == "channels_last" and len(shape) == 4:
                choices.append(tensors[i].movedim(2, -1).contiguous().movedim(-1, 2))
        mixed = list(step.numbers.values())
        mixed[0] = step.per_sample(shape[0], dtype)[0]
        for grad in choices:
            laid[i] = grad
            kinds = (
                step.per_sample(shape[0], dtype),
                step.per_sample(shape[0], dtype, ()),
                [n.repeat(2)[::2] for n in step.per_sample(shape[0], dtype)],
                mixed,
            )
            for numbers in kinds[turn % every :: every]:
                check_equal(step, backend, laid, numbers)
            turn += 1


def check_tensors_like_numbers(step: Step, backend: str) -> None:
    """A number, a tensor of shape () and one for each sample give the same bits."""
    tensors = step.sample((4, 3, 5, 5), torch.float32)
    numbers = tuple(step.numbers.values())
    with harness.owned_by(backend, (step.name,)):
        expected = step(*tensors, *numbers)
        for shape in ((), (4,)):
            as_tensors = [torch.full(shape, n, device=DEVICE) for n in numbers]
            assert torch.equal(step(*tensors, *as_tensors), expected)


def check_samples_are_independent(step: Step, backend: str, inner) -> None:
    """A sample's result does not depend on the batch that it is in, to the last bit."""
    tensors = step.sample((5, *inner), torch.float32)
    numbers = step.per_sample(5, torch.float32)
    with harness.owned_by(backend, (step.name,)):
        whole = step(*tensors, *numbers)
        for i in (0, 3):
            alone = step(*(t[i : i + 1] for t in tensors), *(n[i : i + 1] for n in numbers))
            assert torch.equal(alone[0], whole[i])


def check_in_place(step: Step, backend: str, layout: str) -> None:
    """The twin in place gives the bits of the op, for any layout, draws and numbers, and nothing more."""
    shape = (2, 3, 9, 7)
    names = (step.name, f"{step.name}_")
    for draws in (0, DRAWS):
        x, grad, x0 = step.sample(shape, torch.float32, draws)
        x, x0 = harness.in_layout(x, layout), harness.in_layout(x0, layout)
        for numbers in (tuple(step.numbers.values()), step.per_sample(2, torch.float32)):
            kept = [t.clone() for t in (grad, x0)]
            with harness.owned_by(backend, names):
                expected = step(x, grad, x0, *numbers)
                moved = torch.empty_strided(x.shape, x.stride(), device=DEVICE).copy_(x)
                assert getattr(ops, names[1])(moved, grad, x0, *numbers) is moved
            assert torch.equal(moved, expected)
            assert torch.equal(grad, kept[0])
            assert torch.equal(x0, kept[1])


def check_gradients(step: Step, backend: str, differentiable) -> None:
    """Gradients with draws and per-sample numbers, against autograd through the formula."""
    tensors = step.sample((4, 3, 9, 7), torch.float32, DRAWS)
    numbers = step.per_sample(4, torch.float32)
    wide = [n.double() for n in numbers]
    dy = torch.randn_like(tensors[0])

    def through(call, inputs, numbers, dy):
        leaves = [t.detach().requires_grad_(i in differentiable) for i, t in enumerate(inputs)]
        return torch.autograd.grad(call(*leaves, *numbers), [leaves[i] for i in differentiable], dy)

    exact = through(step.formula, [t.double() for t in tensors], wide, dy.double())
    eager = through(step.formula, tensors, numbers, dy)
    with harness.owned_by(backend, (step.name,)):
        actual = through(step, tensors, numbers, dy)
    for mine, expected, own in zip(actual, exact, eager, strict=True):
        harness.close(step.spec(exact=False), mine, expected, own)


def check_compiles_once(step: Step) -> None:
    """torch.compile traces the op without graph breaks; new numbers and other backends do not recompile it."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *arguments: step(*arguments), fullgraph=True, backend="aot_eager")
    tensors = step.sample((4, 3, 5, 5), torch.float32, DRAWS)
    for i, (backend, _) in enumerate(itertools.product(harness.backends(), range(2))):
        numbers = step.per_sample(4, torch.float32)
        stance = torch.compiler.set_stance("fail_on_recompile" if i else "default")
        with harness.owned_by(backend, (step.name,)), stance:
            assert torch.equal(compiled(*tensors, *numbers), step(*tensors, *numbers)), backend


def small_gradients(shape, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of an ordinary sample, of 1e-30, of a subnormal number and of 0, and their signs as ordinary ones."""
    sign = torch.randint(0, 2, (4, *shape), device=DEVICE).to(dtype) * 2 - 1
    sign[3] = 0
    least = 1e-42 if dtype == torch.float32 else 1e-315
    sizes = torch.tensor([1, 1e-30 if dtype == torch.float32 else 1e-200, least, 1], dtype=dtype, device=DEVICE)
    return sign * sizes.view(-1, *(1,) * len(shape)), sign


def check_small_gradients(step: Step, backend: str, inner, draws: int) -> None:
    """Only the direction of a gradient counts, however small it is, and an ordinary one beside it keeps its bits."""
    for dtype in (torch.float32, torch.float64):
        tensors = dict(zip(step.tensors, step.sample((4, *inner), dtype), strict=True))
        small, ordinary = small_gradients(inner, dtype)
        if draws:
            small, ordinary = (torch.stack([g] + [torch.zeros_like(g)] * (draws - 1)) for g in (small, ordinary))
        numbers = step.per_sample(4, dtype)
        with harness.owned_by(backend, (step.name,)):
            actual = step(*(tensors | {"grad": small}).values(), *numbers)
            expected = step(*(tensors | {"grad": ordinary}).values(), *numbers)
        assert torch.equal(actual[::3], expected[::3])
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)
        assert not torch.equal(expected[1:3], tensors["x"][1:3].clamp(0, 1))


def check_refuses_gradients(step: Step) -> None:
    """Steps that are not differentiable raise, unless autograd does not record."""
    tensors = step.sample((2, 3), torch.float32)
    for i, argument in enumerate(step.tensors):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        with pytest.raises(ValueError, match=f"{step.name}: {argument} must be a tensor that does not require grad"):
            step(*leaves, *step.numbers.values())
        with torch.no_grad():
            assert not step(*leaves, *step.numbers.values()).requires_grad


def bad_arguments(step: Step):
    """Changes to valid arguments, the error and its words, for a batch of two."""
    found = [
        ({"x": torch.rand(2, 3).int()}, TypeError, "x must be a float32 or float64 tensor, got torch.int32"),
        ({"grad": torch.rand(3, 2)}, ValueError, r"grad must be of the shape of x \(2, 3\), got \(3, 2\)"),
        ({"grad": torch.rand(4, 2, 2)}, ValueError, r"grad must be of the shape of x \(2, 3\), got \(2, 2\)"),
        ({"grad": torch.rand(0, 2, 3)}, ValueError, "grad must be of at least one draw, got none"),
        ({"eps": -0.5}, ValueError, "eps must be finite and >= 0, got -0.5"),
    ]
    for name in (*step.others, "x0"):
        words = f"{name} must be of the dtype of x torch.float32, got torch.float64"
        found.append(({name: torch.rand(2, 3).double()}, TypeError, words))
    for name in step.numbers:
        words = rf"{name} must be of shape \(\) or \(2,\), got \(3,\)"
        found.append(({name: math.nan}, ValueError, f"{name} must be finite( and >= 0)?, got nan"))
        found.append(({name: torch.rand(3)}, ValueError, words))
        found.append(({name: torch.rand(2, 1)}, ValueError, rf"{name} must be of shape \(\) or \(2,\), got \(2, 1\)"))
        found.append(
            (
                {name: torch.rand(2).double()},
                TypeError,
                f"{name} must be of the dtype of x torch.float32, got torch.float64",
            )
        )
    return found


def check_bad_input(step: Step, backend: str, functions) -> None:
    """Every bad argument is named, by the function and, from the op itself, in the same words."""
    plural = {"alpha": "alphas", "eps": "epsilons", "momentum": "momenta"}
    for change, error, words in bad_arguments(step):
        arguments = {name: torch.rand(2, 3) for name in step.tensors} | step.numbers | change
        # The op takes what replaces a number in an argument of its own.
        split = {plural[k]: v for k, v in arguments.items() if k in step.numbers and isinstance(v, torch.Tensor)}
        plain = {k: 1 if plural.get(k) in split else v for k, v in arguments.items()}
        with harness.owned_by(backend, functions):
            for name in functions:
                with pytest.raises(error, match=f"{name}: {words}"):
                    getattr(ops, name)(**arguments)
            with pytest.raises(RuntimeError if backend == "cpp" else error, match=words):
                _registry.OPS[step.name].overload(**plain, **split)
