"""The projected steps' cases: each op against its formula in eager mode."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import torch

from .. import ops
from .harness import Case, by_backend, op_case

SHAPES = ((64, 3, 32, 32), (8, 3, 224, 224), (64, 3, 256, 256))
DRAWS = 8
# The arguments besides images: alpha, eps, and the momentum or the number of entries.
NUMBERS = {
    "pgd_step_linf": (2 / 255, 8 / 255),
    "pgd_step_l2": (0.1, 0.5),
    "apgd_step_linf": (2 / 255, 8 / 255, 0.75),
    "apgd_step_l2": (0.1, 0.5, 0.75),
    "project_l1": (12.0,),
    "pgd_step_l1": (1.0, 12.0, 600),
}


def step_cases(device: str) -> Iterator[Case]:
    """All cases; ours is the public function, in every backend that has a kernel."""
    for name in NUMBERS:
        if name == "pgd_step_linf":
            # ops.py measures the step of one draw, in every backend.
            yield _case(name, device, SHAPES[0], draws=DRAWS)
            yield _case(name, device, SHAPES[2], draws=DRAWS)
            continue
        for shape in SHAPES[:1] if "l1" in name else SHAPES:
            yield _case(name, device, shape)
        if name == "pgd_step_l2":
            yield _case(name, device, SHAPES[0], draws=DRAWS)
            for shape in SHAPES:
                yield _in_place_case(name, device, shape)


def _case(name: str, device: str, shape: tuple[int, ...], draws: int = 0) -> Case:
    x, x_prev, x0 = _images(shape, device)
    grad = torch.randn((draws, *shape) if draws else shape, device=device)
    kinds = {"project": (x, x0), "pgd": (x, grad, x0), "apgd": (x, x_prev, grad, x0)}
    tensors = kinds[name.partition("_")[0]]
    # The package exports the function under the name of its module.
    formula = importlib.import_module(f"atop_fast.ops.{name}").formula
    eager, ours = (functools.partial(f, *tensors, *NUMBERS[name]) for f in (formula, getattr(ops, name)))
    mine = by_backend(name, device, ours)
    nbytes = sum(t.nbytes for t in tensors) + x.nbytes
    text = "x".join(map(str, shape)) + (f", {draws} draws" if draws else "")
    return op_case(f"{name} forward", text, "float32", eager, mine, nbytes, 1e-6)


def _in_place_case(name: str, device: str, shape: tuple[int, ...]) -> Case:
    """In place, eager also writes into the images."""
    x, _, x0 = _images(shape, device)
    grad, numbers, moved = torch.randn_like(x), NUMBERS[name], x.clone()
    formula = importlib.import_module(f"atop_fast.ops.{name}").formula

    def eager() -> torch.Tensor:
        return x.copy_(formula(x, grad, x0, *numbers))

    ours = functools.partial(getattr(ops, f"{name}_"), moved, grad, x0, *numbers)
    mine = by_backend(f"{name}_", device, ours)
    # No check, because that would move the images; the tests compare it, and it shares the code of the other variant.
    text = "x".join(map(str, shape))
    return op_case(f"{name}_ forward", text, "float32", eager, mine, 4 * x.nbytes, tolerance=None)


def _images(shape: tuple[int, ...], device: str) -> list[torch.Tensor]:
    x0 = torch.rand(shape, device=device)
    moved = [(x0 + 0.02 * torch.randn_like(x0)).clamp(0, 1) for _ in range(2)]
    return [*moved, x0]
